"""The names that a weight has in the released files, in transformers' three Blip classes, and with us.

Everything goes through our names, those of a Lightning checkpoint's `state_dict` (`model.…`, `momentum.…`, `queue.…`):

- ours <-> released is one table, `ROWS`; we keep q, k, v (and k, v of a picture) as one matrix, they apart
- transformers' layout is the released one with another ViT, `VISION`
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

# names ----------------------------------------------------------------------------------------------------------------
# `#` is the number of a block, `*` is weight or bias. Several names on the right are one tensor on the left, cut by rows.

SELF_ATTENTION = [
    ("qkv.*", "attention.self.query.* attention.self.key.* attention.self.value.*"),
    ("out.*", "attention.output.dense.*"),
    ("norm.*", "attention.output.LayerNorm.*"),
]
CROSS_ATTENTION = [
    ("query.*", "crossattention.self.query.*"),
    ("key_value.*", "crossattention.self.key.* crossattention.self.value.*"),
    ("out.*", "crossattention.output.dense.*"),
    ("norm.*", "crossattention.output.LayerNorm.*"),
]
TWIN = [  # NLVR2's: one for each picture, and what makes one of both
    *[
        row
        for half in "01"
        for row in (
            (f"halves.{half}.query.*", f"crossattention.self{half}.query.*"),
            (f"halves.{half}.key_value.*", f"crossattention.self{half}.key.* crossattention.self{half}.value.*"),
            (f"halves.{half}.out.*", f"crossattention.output.dense{half}.*"),
        )
    ],
    ("merge.*", "crossattention.output.merge_layer.*"),
]
FEED_FORWARD = [("fc1.*", "intermediate.dense.*"), ("fc2.*", "output.dense.*"), ("norm.*", "output.LayerNorm.*")]
EMBEDDINGS = [
    ("word.weight", "word_embeddings.weight"),
    ("position.weight", "position_embeddings.weight"),
    ("norm.*", "LayerNorm.*"),
]
LM_HEAD = [
    ("transform.*", "transform.dense.*"),
    ("norm.*", "transform.LayerNorm.*"),
    ("output.bias", "bias"),
    ("output.*", "decoder.*"),
]
VISION = [  # released, transformers
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.*", "embeddings.patch_embedding.*"),
    ("blocks.#.norm1.*", "encoder.layers.#.layer_norm1.*"),
    ("blocks.#.attn.qkv.*", "encoder.layers.#.self_attn.qkv.*"),
    ("blocks.#.attn.proj.*", "encoder.layers.#.self_attn.projection.*"),
    ("blocks.#.norm2.*", "encoder.layers.#.layer_norm2.*"),
    ("blocks.#.mlp.fc1.*", "encoder.layers.#.mlp.fc1.*"),
    ("blocks.#.mlp.fc2.*", "encoder.layers.#.mlp.fc2.*"),
    ("norm.*", "post_layernorm.*"),
]


def _under(ours: str, theirs: str, table: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    return [(ours + left, [theirs + name for name in right.split()]) for left, right in table]


def _text(block: str, embeddings: str, theirs: str, attention: str, feed_forward: str) -> list[tuple[str, list[str]]]:
    layer = f"{theirs}encoder.layer.#."
    return [
        *_under(embeddings, f"{theirs}embeddings.", EMBEDDINGS),
        *_under(f"{block}{attention}.", layer, SELF_ATTENTION),
        *_under(f"{block}{feed_forward}.", layer, FEED_FORWARD),
    ]


_SAME = [(name, name) for name, _ in VISION]
_DECODER = "model.med.decoder.#."
ROWS: list[tuple[str, list[str]]] = [
    *_under("model.visual_encoder.", "visual_encoder.", _SAME),
    *_text("model.med.encoder.#.", "model.med.embeddings.", "text_encoder.", "self_attention", "feed_forward"),
    *_under("model.med.encoder.#.cross_attention.", "text_encoder.encoder.layer.#.", CROSS_ATTENTION + TWIN),
    *_text(_DECODER, "model.med.decoder_embeddings.", "text_decoder.bert.", "self_attention", "feed_forward"),
    *_under(f"{_DECODER}cross_attention.", "text_decoder.bert.encoder.layer.#.", CROSS_ATTENTION),
    *_under("model.med.lm_head.", "text_decoder.cls.predictions.", LM_HEAD),
    *[(f"model.{name}.*", [f"{name}.*"]) for name in ("vision_proj", "text_proj", "itm_head")],
    ("model.nlvr_head.#.*", ["cls_head.#.*"]),
    ("model.temperature", ["temp"]),
    *_under("momentum.visual_encoder.", "visual_encoder_m.", _SAME),
    *[(f"momentum.{name}.*", [f"{name}_m.*"]) for name in ("vision_proj", "text_proj")],
    *_under("momentum.embeddings.", "text_encoder_m.embeddings.", EMBEDDINGS),
    *_under("momentum.self_attentions.#.", "text_encoder_m.encoder.layer.#.", SELF_ATTENTION),
    *_under("momentum.feed_forwards.#.", "text_encoder_m.encoder.layer.#.", FEED_FORWARD),
]


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\#", r"(\d{1,4})").replace(r"\*", "(weight|bias)"))


def _fill(name: str, found: re.Match[str]) -> str:
    for piece in found.groups():
        name = re.sub(r"[#*]", piece, name, count=1)
    return name


_FROM_OURS = [(_pattern(ours), theirs) for ours, theirs in ROWS]
_TO_OURS = [(_pattern(name), ours, i, len(theirs)) for ours, theirs in ROWS for i, name in enumerate(theirs)]
_VISION_TO_RELEASED = [(_pattern(f"vision_model.{right}"), f"visual_encoder.{left}") for left, right in VISION]
_VISION_TO_TRANSFORMERS = [(_pattern(f"visual_encoder.{left}"), f"vision_model.{right}") for left, right in VISION]


def _rename_vision(tensors: Mapping[str, Tensor], table: list[tuple[re.Pattern[str], str]]) -> Tensors:
    def rename(name: str) -> str:
        return next((_fill(new, found) for old, new in table if (found := old.fullmatch(name))), name)

    return {rename(name): tensor for name, tensor in tensors.items()}


# parts: what a file or a model has or lacks -----------------------------------------------------------------------------

TWINS, MERGES, NLVR_HEAD = "twin cross-attention", "merge layers", "NLVR2 head"
_PARTS = {
    r"model\.visual_encoder\.": "image encoder",
    r"model\.med\.embeddings\.": "text embeddings",
    r"model\.med\.encoder\.\d+\.cross_attention\.halves\.": TWINS,
    r"model\.med\.encoder\.\d+\.cross_attention\.merge\.": MERGES,
    r"model\.med\.encoder\.": "text encoder",
    r"model\.med\.(decoder|decoder_embeddings|lm_head)\.": "text decoder",
    r"model\.(vision|text)_proj\.": "ITC projections",
    r"model\.itm_head\.": "ITM head",
    r"model\.nlvr_head\.": NLVR_HEAD,
    r"model\.temperature$": "temperature",
    r"momentum\.": "momentum encoder",
    r"queue\.": "queue",
}
_ENCODER = ("image encoder", "text embeddings", "text encoder")
_MATCHER = (*_ENCODER, "ITC projections", "ITM head")
_STATE = ("temperature", "momentum encoder", "queue")
RELEASED = {  # what the files of the released classes hold
    "pretrain": (*_MATCHER, "text decoder", *_STATE),
    "captioner": ("image encoder", "text decoder"),
    "base": _ENCODER,
    "itm": _MATCHER,
    "retrieval": (*_MATCHER, *_STATE),
    "vqa": (*_ENCODER, "text decoder"),
    "nlvr": (*_ENCODER, TWINS, MERGES, NLVR_HEAD),
}
TRANSFORMERS = {
    "BlipForConditionalGeneration": ("image encoder", "text decoder"),
    "BlipForImageTextRetrieval": _MATCHER,
    "BlipForQuestionAnswering": (*_ENCODER, "text decoder"),
}


def part(name: str) -> str:
    """Which part of a model a tensor of ours belongs to, in words."""
    return next((words for pattern, words in _PARTS.items() if re.match(pattern, name)), "unknown part")


def listed(names: Collection[str], most: int = 4) -> str:
    shown = sorted(names)[:most]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


# released <-> ours ----------------------------------------------------------------------------------------------------


def from_released(tensors: Mapping[str, Tensor]) -> tuple[Tensors, dict[str, str]]:
    """Released names to ours, and what was dropped with the reason.

    ValueError: a name that no released task of this table has, a part of a joint tensor that is missing, or tensors that
    are one with us and differ in the file.
    """
    ours: Tensors = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    dropped: dict[str, str] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        if name.endswith("embeddings.position_ids"):
            dropped[name] = "counted, not stored"
        elif name.startswith("text_encoder_m.") and ".crossattention." in name:
            dropped[name] = "the momentum encoder never looks at pictures"
        elif name in ("image_queue", "text_queue"):
            ours[f"queue.{name[:-6]}"] = tensor.T
            ours.setdefault("queue.ids", tensor.new_full(tensor.shape[1:], -1, dtype=torch.long))
        elif name == "idx_queue":
            ours["queue.ids"] = tensor.flatten().masked_fill(tensor.flatten() < 0, -1)
        elif name in ("queue_ptr", "ptr_queue"):
            ours["queue.place"] = tensor.reshape(())
        else:
            place = _place(name)
            if place is None:
                unknown.append(name)
                continue
            target, number, count = place
            if count > 1:
                pieces.setdefault(target, {})[number] = tensor
            elif not _same(ours.setdefault(target, tensor), tensor):
                raise ValueError(f"{name} differs from the tensor it is tied to ({target})")
    if unknown:
        raise ValueError(f"{len(unknown)} tensors belong to no released layout known here: {listed(unknown)}")
    for target, parts in pieces.items():
        count = 3 if ".qkv." in target else 2
        if len(parts) < count:
            raise ValueError(f"{target} is made of {count} tensors of the file, of which it has {len(parts)}")
        ours[target] = torch.cat([parts[i] for i in range(count)])
    return _completed(ours), dropped


def _place(name: str) -> tuple[str, int, int] | None:
    """Our name for a released one, which of our tensor's pieces it is, and of how many; None where nobody knows it."""
    for pattern, ours, number, count in _TO_OURS:
        if found := pattern.fullmatch(name):
            return _fill(ours, found), number, count
    return None


def _completed(ours: Tensors) -> Tensors:
    """Adds the second names of tensors that a file stores once: the output matrix, and a lone decoder's embeddings."""
    word, output = "model.med.decoder_embeddings.word.weight", "model.med.lm_head.output.weight"
    if word in ours and output not in ours:
        ours[output] = ours[word]
    if not any(name.startswith("model.med.embeddings.") for name in ours):
        lone = {n: t for n, t in ours.items() if n.startswith("model.med.decoder_embeddings.")}
        ours.update({name.replace("decoder_embeddings", "embeddings"): tensor for name, tensor in lone.items()})
    return ours


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and (a.is_meta or torch.equal(a, b)))


def released_names(ours: Mapping[str, Tensor]) -> Tensors:
    """Parameters (or gradients) under our names to all their released names, joint tensors cut; others are left out."""
    out: Tensors = {}
    for name, tensor in ours.items():
        for pattern, theirs in _FROM_OURS:
            if found := pattern.fullmatch(name):
                pieces = tensor.chunk(len(theirs)) if len(theirs) > 1 else [tensor]
                out.update({_fill(their, found): piece for their, piece in zip(theirs, pieces, strict=True)})
    return out


def to_released(ours: Mapping[str, Tensor], kind: str) -> tuple[Tensors, dict[str, str]]:
    """A file's tensors as the released class `kind` (see `RELEASED`) stores them, and what that file cannot hold."""
    kept, dropped = _only(ours, RELEASED, kind, "released")
    out = released_names({name: tensor for name, tensor in kept.items() if part(name) != "queue"})
    for prefix in ("text_encoder.", "text_decoder.bert.", "text_encoder_m."):
        table = out.get(f"{prefix}embeddings.position_embeddings.weight")
        if table is not None:
            out[f"{prefix}embeddings.position_ids"] = torch.arange(table.shape[0], device=table.device)[None]
    if "queue.image" in kept:
        retrieval = kind == "retrieval"
        out["image_queue"], out["text_queue"] = kept["queue.image"].T, kept["queue.text"].T
        out["ptr_queue" if retrieval else "queue_ptr"] = kept["queue.place"].reshape(1)
        if retrieval:
            out["idx_queue"] = kept["queue.ids"].masked_fill(kept["queue.ids"] < 0, -100)[None]
        # The released momentum encoder carries a cross-attention that it never uses: the online one fills the place.
        cross = {n: t for n, t in out.items() if n.startswith("text_encoder.") and ".crossattention." in n}
        out.update({name.replace("text_encoder.", "text_encoder_m.", 1): tensor for name, tensor in cross.items()})
    return {name: tensor.contiguous() for name, tensor in out.items()}, dropped


def to_transformers(ours: Mapping[str, Tensor], kind: str) -> tuple[Tensors, dict[str, str]]:
    """The tensors of the transformers class `kind` (see `TRANSFORMERS`), and what that class cannot hold."""
    kept, dropped = _only(ours, TRANSFORMERS, kind, "transformers")
    looks = {t.shape[1] for n, t in kept.items() if n.endswith(".cross_attention.key_value.weight")}
    if len(looks) > 1:
        raise ValueError(
            f"a transformers {kind} file has one width of what encoder and decoder look at, and not {sorted(looks)}: "
            "pictures as wide as texts (ViT-B)"
        )
    out = _rename_vision(released_names(kept), _VISION_TO_TRANSFORMERS)
    return {name: tensor.contiguous() for name, tensor in out.items()}, dropped


def from_transformers(tensors: Mapping[str, Tensor]) -> tuple[Tensors, dict[str, str]]:
    """transformers' names to ours, and what was dropped with the reason; errors as in `from_released`."""
    return from_released(_rename_vision(tensors, _VISION_TO_RELEASED))


def _only(
    ours: Mapping[str, Tensor], kinds: dict[str, tuple[str, ...]], kind: str, layout: str
) -> tuple[Tensors, dict[str, str]]:
    """The tensors that a file of this kind holds, and the others; refuses where a part is missing or has no place."""
    if kind not in kinds:
        raise ValueError(f"the {layout} layout has no task {kind!r}; choose one of {', '.join(kinds)}")
    kept = {name: tensor for name, tensor in ours.items() if part(name) in kinds[kind]}
    has = {part(name) for name in ours}
    lacking = [words for words in kinds[kind] if words not in has | {MERGES}]  # a shallow NLVR2 model merges nowhere
    if lacking:
        raise ValueError(f"a {layout} {kind} file needs what this model lacks: {', '.join(lacking)}")
    if TWINS in has and TWINS not in kinds[kind]:
        raise ValueError(f"a {layout} {kind} file has one cross-attention in a block, and not NLVR2's two")
    homeless = [n for n in kept if part(n) != "queue" and not any(p.fullmatch(n) for p, _ in _FROM_OURS)]
    if homeless:
        raise ValueError(
            f"the {layout} layout has no place for {listed(homeless)} (only stem 'patch' can be converted)"
        )
    return kept, {n: f"a {layout} {kind} file has no {part(n)}" for n in ours if n not in kept}

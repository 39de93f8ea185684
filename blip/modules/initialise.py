"""Starting from what others trained: BERT for the text transformer, an ImageNet ViT for the image encoder.

As released (paper section 4.1): self-attentions of encoder and decoder, feed-forwards, embeddings and the head of the
language model come from BERT; cross-attentions and the rows of [DEC] and [ENC] keep their random start.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from blip.modules.blip import BLIP
from blip.modules.checkpoint import Report, tensors_of
from blip.modules.names import Tensors, from_released, listed
from blip.modules.vit import resize_position_embedding

ADDED = 2  # [DEC] and [ENC] stand behind BERT's vocabulary
NOT_OURS = {
    "pooler.": "BLIP has no pooler",
    "token_type": "BLIP has no token types",
    "cls.seq_relationship.": "BLIP has no such head",
}
HEADS = ("head.", "head_dist.", "pre_logits.", "fc_norm.")


@torch.no_grad()
def from_bert(model: BLIP, source: str | Path, lm_head: bool = True) -> Report:
    """Fills the text transformer from BERT: a folder or file, or a name on the hub; says what came from what.

    lm_head: whether the source must have the head of a masked language model (else ours keeps its random start).
    ValueError: something expected is missing, or the vocabulary, widths or number of blocks do not fit.
    """
    theirs = _stored(source)
    if theirs is None:
        from transformers import AutoModelForMaskedLM

        theirs = AutoModelForMaskedLM.from_pretrained(str(source)).state_dict()
    report = Report(f"text transformer from {source}")
    released: Tensors = {}
    for name, tensor in theirs.items():
        plain = (
            name.removeprefix("bert.")
            .replace("LayerNorm.gamma", "LayerNorm.weight")
            .replace("LayerNorm.beta", "LayerNorm.bias")
        )
        why = next((why for part, why in NOT_OURS.items() if part in plain), None)
        if why or plain.endswith("position_ids"):
            report.dropped[name] = why or "counted, not stored"
        elif plain.startswith("cls.predictions."):
            released[f"text_decoder.{plain}"] = tensor
        else:
            released[f"text_encoder.{plain}"] = released[f"text_decoder.bert.{plain}"] = tensor
    try:
        given, _ = from_released(released)
    except ValueError as error:
        raise ValueError(f"{source} does not hold a BERT: {error}") from error

    own = {
        f"model.med.{name}": tensor
        for name, tensor in model.med.state_dict().items()
        if ".cross_attention." not in name
    }
    spare = (
        () if lm_head else ("model.med.lm_head.transform.", "model.med.lm_head.norm.", "model.med.lm_head.output.bias")
    )
    _complete(source, own, given, spare)
    report.dropped |= {n: "more blocks than the model has" for n in given if n not in own and _is_block(n)}
    for name, target in own.items():
        if name not in given:
            report.missing[name] = "not in the source, keeps its random start"
            continue
        tensor = given[name]
        if name.endswith(("word.weight", "output.weight", "output.bias")):
            if not 0 <= target.shape[0] - tensor.shape[0] <= ADDED:
                raise ValueError(
                    f"{source} knows {tensor.shape[0]} word pieces, the tokenizer {target.shape[0]} with [DEC] and [ENC]: "
                    "take the vocabulary of the source"
                )
            if tensor.shape[0] < target.shape[0]:
                report.resized[name] = (
                    f"{tensor.shape[0]} rows of {target.shape[0]}, the others keep their random start"
                )
        elif name.endswith("position.weight") and tensor.shape[0] > target.shape[0]:
            report.resized[name] = f"the first {target.shape[0]} of {tensor.shape[0]} positions"
            tensor = tensor[: target.shape[0]]
        rows = target[: tensor.shape[0]] if name in report.resized else target
        _copy(source, name, tensor, rows)
        report.loaded.append(name)
    for block in (*getattr(model.med, "encoder", ()), *getattr(model.med, "decoder", ())):
        names = [f"cross_attention.{name}" for name, _ in block.cross_attention.named_parameters()]
        report.missing |= {name: "BERT looks at nothing: random start" for name in names}
    return report


@torch.no_grad()
def from_vit(model: BLIP, source: str | Path) -> Report:
    """Fills the image encoder from an ImageNet ViT: a folder or file, or a name in timm; says what came from what.

    Position embeddings are resized, the classifier is left out. ValueError: something expected is missing or does not fit.
    """
    theirs = _stored(source)
    if theirs is None:
        import timm

        theirs = timm.create_model(str(source), pretrained=True, num_classes=0).state_dict()
    report = Report(f"image encoder from {source}")
    report.dropped = {name: "BLIP has no classifier" for name in theirs if name.startswith(HEADS)}
    given = {f"model.visual_encoder.{name}": t for name, t in theirs.items() if name not in report.dropped}
    own = {f"model.visual_encoder.{name}": t for name, t in model.visual_encoder.state_dict().items()}
    _complete(source, own, given, ())
    extra = [name for name in given if name not in own]
    if extra:
        raise ValueError(f"{source} has {len(extra)} tensors that the image encoder lacks: {listed(extra)}")
    for name, target in own.items():
        tensor = given[name]
        if name.endswith("pos_embed") and tensor.shape[1] != target.shape[1]:
            report.resized[name] = f"{tensor.shape[1] - 1} -> {target.shape[1] - 1} patches"
            tensor = resize_position_embedding(tensor, round((target.shape[1] - 1) ** 0.5))
        _copy(source, name, tensor, target)
        report.loaded.append(name)
    return report


def _stored(source: str | Path) -> Tensors | None:
    """The tensors of a local file or folder; None where there is none of that name."""
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: neither model.safetensors nor pytorch_model.bin in this folder")
        path = found[0]
    return tensors_of(path) if path.is_file() else None


def _complete(
    source: str | Path, own: Mapping[str, Tensor], given: Mapping[str, Tensor], spare: tuple[str, ...]
) -> None:
    missing = [name for name in own if name not in given and not name.startswith(spare or ("nothing",))]
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} tensors that the model is to start from: {listed(missing)}")


def _copy(source: str | Path, name: str, tensor: Tensor, target: Tensor) -> None:
    if tensor.shape != target.shape:
        raise ValueError(f"{source}: {name} has shape {list(tensor.shape)}, the model {list(target.shape)}")
    target.copy_(tensor)


def _is_block(name: str) -> bool:
    return name.startswith(("model.med.encoder.", "model.med.decoder."))

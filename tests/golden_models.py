"""What runs for each golden case: the code that trains and serves, with the folder's inputs and draws put in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor

from blip.layout import TextLayout
from blip.modules.blip import BLIP, BLIPConfig
from blip.modules.checkpoint import Weights, load, nodes, sizes
from blip.modules.names import from_released, released_names
from blip.modules.vit import resize_position_embedding
from blip.tasks import contrastive, pretrain
from blip.tasks.distributed import rank
from blip.tasks.pretrain import PretrainTask
from blip.text import Tokenizer

PADDED = "padding, which packed tokens have none of"
NO_CROSS = "our momentum encoder never looks at pictures and carries no cross-attention"
NOISE = "its true gradient is zero, so that float32 steps amplify rounding noise"
RESOLVED = 1e-6
USED = {"med_config.": "an input of the run", "vit.": "an input of the run", "hyper.": "an input of the run"}


def _weights(folder: Path, tensors: dict[str, Tensor]) -> Weights:
    ours, dropped = from_released(tensors)
    return Weights(folder, "released", ours, dropped)


def _config(case: dict[str, Any], weights: Weights) -> BLIPConfig:
    """Sizes from the shapes; heads, which shapes don't show, from the case."""
    heads = (case["dims"]["vision_heads"], case["dims"]["text_heads"])
    return sizes(weights.tensors, heads, dropout=0.0)


def _model(
    folder: Path,
    case: dict[str, Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    spare: tuple[str, ...] = (),
    **parts: bool,
) -> BLIP:
    weights = _weights(folder, tensors)
    model = BLIP(_config(case, weights), **parts).to(dtype).eval()
    load(model, weights, spare=("temperature", *spare))
    return model


def _texts(ids: Tensor, mask: Tensor) -> tuple[Tensor, TextLayout]:
    layout = TextLayout.from_lengths(mask.sum(1).tolist(), longest=ids.shape[1])
    return layout.pack(ids), layout


def _ids(folder: Path, case: dict[str, Any], captions: list[str], max_tokens: int, width: int) -> Tensor:
    """The captions by our tokenizer, padded to [n, width]; ValueError where its special ids are not the folder's."""
    tokenizer = Tokenizer.load(folder / case["vocab_file"])
    special = case["special_ids"]
    if (tokenizer.dec_id, tokenizer.enc_id, len(tokenizer)) != (
        special["bos_DEC"],
        special["enc_ENC"],
        case["tokenizer_length"],
    ):
        raise ValueError(
            f"special ids {tokenizer.dec_id}, {tokenizer.enc_id} of {len(tokenizer)}: the folder has {special}"
        )
    rows = tokenizer.encode(captions, max_tokens)
    return torch.tensor([row + [tokenizer.pad_id] * (width - len(row)) for row in rows])


def digest(tensors: dict[str, Tensor], names: list[str]) -> Tensor:
    """[n, 3] float64: sum, norm, and the sum of x_i cos(i + 1), for each name."""
    rows = []
    for name in names:
        x = tensors[name].detach().double().flatten()
        wave = torch.cos(torch.arange(1, x.numel() + 1, dtype=torch.float64))
        rows.append(torch.stack([x.sum(), x.norm(), (x * wave).sum()]))
    return torch.stack(rows)


def _gradients(model: BLIP) -> dict[str, Tensor]:
    named = model.named_parameters(remove_duplicate=False)
    return released_names({f"model.{name}": p.grad for name, p in named if p.grad is not None})


def _tied(model: BLIP, stored: Collection[str]) -> list[list[str]]:
    """Released names, of those that the file stores, that are one tensor with us."""
    groups: dict[tuple[int, int], list[str]] = {}
    named = {f"model.{n}": p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    for name, tensor in released_names(named).items():
        if name not in stored:
            continue
        groups.setdefault((tensor.data_ptr(), tensor.numel()), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _same_groups(ours: list[list[str]], theirs: list[list[str]]) -> Any:
    """Theirs where the groups are the same sets, else ours: the order within a list says nothing."""
    return theirs if {frozenset(g) for g in ours} == {frozenset(g) for g in theirs} else ours


def _noisy(case: dict[str, Any]) -> set[str]:
    listed = case.get("f32_after_step_noisy_parameters", {})
    return {*case.get("zero_gradient_parameters", []), *listed.get("values", listed)}


# pretrain -------------------------------------------------------------------------------------------------------------


class Replayed:
    """A task with the folder's draws and alphas in place of its own; `seen` keeps what its last step contrasted."""

    progress = 0.0  # the run's alpha is the step's progress: see `_replayed`

    def uniform(self, size: int) -> Tensor:
        return self.draws

    def log(self, *args: Any, **kwargs: Any) -> None: ...

    def log_dict(self, *args: Any, **kwargs: Any) -> None: ...

    def contrast(self, image: Tensor, text: Tensor, momentum_image: Tensor, momentum_text: Tensor, *rest: Any) -> Any:
        self.seen = {
            "image_feat": image,
            "text_feat": text,
            "image_feat_m": momentum_image,
            "text_feat_m": momentum_text,
        }
        return super().contrast(image, text, momentum_image, momentum_text, *rest)


class Pretraining(Replayed, PretrainTask): ...


def _replayed(
    kind: Any, folder: Path, case: dict[str, Any], weights: Weights, dtype: torch.dtype, **objectives: Any
) -> Any:
    """A `Replayed` task of this class with the case's sizes, queue and momentum, as released but for `objectives`."""
    hyper = case["hyper"]
    objectives = {
        **{"keys": "local", "negatives": "local", "itc_weight": 1.0, "itm_weight": 1.0, "queue_start": 0.0},
        **{"alpha": 1.0, "alpha_start": 0.0, "alpha_end": 1.0, "queue_size": hyper["queue_size"]},
        **{"momentum": hyper["momentum"], "momentum_ramp": False, "momentum_dropout": True},
        **objectives,
    }
    task = kind(
        objectives,
        hyper["max_length"],
        model=nodes(_config(case, weights)),
        tokenizer=Tokenizer.load(folder / case["vocab_file"]).to_json(),
        optimizer=lambda groups: torch.optim.AdamW(groups),
        schedule=lambda *_: 1.0,
        evaluators={},
    ).to(dtype)
    task.load_state_dict(weights.tensors)
    return task.train()


def run_pretrain(
    out: Any,
    folder: Path,
    case: dict[str, Any],
    tensors: dict[str, Tensor],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    own = {"positives": "pair", "negative_floor": 1e-4, "lm_weight": 1.0, "itm_start": 0.0, "label_smoothing": 0.1}
    task = _replayed(Pretraining, folder, case, _weights(folder, tensors), dtype, **own)
    hyper, model = case["hyper"], task.model
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=hyper["weight_decay"])
    lists: dict[str, list] = {"multinomial.indices": []}
    steps = len(hyper["lr_per_step"])
    draws = inputs["multinomial.u"].to(dtype).view(steps, 2, -1)
    for step in range(1, steps + 1):
        image, ids, mask = (inputs[f"step{step}.{n}"] for n in ("image", "input_ids", "attention_mask"))
        made = _ids(folder, case, case["captions"][step - 1], hyper["max_length"], ids.shape[1])
        if not torch.equal(made, ids):
            raise ValueError(f"{folder}: the captions of step {step} give other ids than the folder's")
        size = image.shape[0]
        packed, layout = _texts(ids, mask)
        picture_ids = torch.arange(size) + step * size
        batch = SimpleNamespace(image=image.to(dtype), input_ids=packed, layout=layout, image_ids=picture_ids)
        task.progress, task.draws = hyper["alpha_per_step"][step - 1], draws[step - 1]
        made = _train(task, batch)
        gradients = _gradients(model)
        for group in optimizer.param_groups:
            group["lr"] = hyper["lr_per_step"][step - 1]
        optimizer.step()
        optimizer.zero_grad()
        task.after_step()
        made |= {
            "after.image_queue": task.queue.image.T.clone(),
            "after.text_queue": task.queue.text.T.clone(),
            "after.queue_ptr": task.queue.place.reshape(1).clone(),
            "after.temp": model.temperature.detach().clone(),
            "digest.grad": digest(gradients, case["digest_names"]["grad"]),
        }
        made |= {f"grad.{name}": gradient for name, gradient in gradients.items()}
        out.tensors |= {f"step{step}.{name}": tensor for name, tensor in made.items()}
        out.masks[f"step{step}.lm_logits"] = (mask.bool(), PADDED)
        lists["multinomial.indices"] += made["neg_index"].tolist()

    state = {name: tensor.detach() for name, tensor in task.state_dict().items()}
    names = released_names({name: tensor for name, tensor in state.items() if not name.startswith("queue.")})
    _after(out, case, f"step{steps}", names, dtype)
    if dtype == torch.float32:
        _leave_noise(out, folder, f"step{steps}")
    out.lists = {
        **lists,
        "captions": case["captions"],  # their ids were compared above
        "tied_groups": _same_groups(_tied(model, tensors), case["tied_groups"]),
        "parameters_without_gradient": sorted(set(case["digest_names"]["grad"]) - set(gradients)),
    }
    out.reasons |= USED | {
        "digest_names": "names of rows",
        "zero_gradient_parameters": "names of what float32 leaves out",
    }


def _after(out: Any, case: dict[str, Any], step: str, names: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Parameters and momentum parameters after the last step, full and as digests."""
    noisy = _noisy(case) if dtype == torch.float32 else set()
    noisy |= {n for n in names if n.endswith("attn.qkv.bias")} if noisy else set()
    for kind in ("param", "momentum"):
        rows = case["digest_names"][f"{step}.{kind}"]
        left = {name for name in rows if name not in names}
        if kind == "momentum" and not all(".crossattention." in name for name in left):
            raise ValueError(f"our model lacks {sorted(left)[:3]}")
        given = {name: names.get(name, torch.zeros(1)) for name in rows}
        out.tensors[f"{step}.digest.{kind}"] = digest(given, rows)
        skip = left if kind == "momentum" else noisy
        keep = torch.tensor([name not in skip for name in rows])
        out.masks[f"{step}.digest.{kind}"] = (keep, NO_CROSS if kind == "momentum" else NOISE)
        for name in rows:
            full = f"{step}.after.{kind}.{name}"
            if name in left:
                out.reasons[full] = NO_CROSS
            elif kind == "param" and name in noisy and name.endswith("attn.qkv.bias"):
                out.tensors[full] = names[name]
                thirds = torch.ones(3, names[name].numel() // 3, dtype=torch.bool)
                thirds[1] = False
                out.masks[full] = (thirds.flatten(), NOISE)
            elif kind == "param" and name in noisy:
                out.reasons[full] = NOISE
            else:
                out.tensors[full] = names[name]


def _leave_noise(out: Any, folder: Path, step: str, first: str = "step1.grad.") -> None:
    """Leaves out the places whose first gradient float32 cannot resolve: Adam divides by it, and steps by noise."""
    path = folder / "f64.safetensors"
    for name, gradient in (load_file(path) if path.exists() else {}).items():
        full = name.replace(first, f"{step}.after.param.")
        if name.startswith(first) and full not in out.masks:
            noise = (gradient != 0) & (gradient.abs() < RESOLVED)
            if noise.any():
                out.masks[full] = (~noise, f"a gradient below {RESOLVED:g}, from which float32 makes a step of noise")


@contextmanager
def recording(**functions: ModuleType) -> Iterator[dict[int, dict[str, list]]]:
    """What functions, named with the module that calls them, are given and give back: a list for each rank and name."""
    calls: dict[int, dict[str, list]] = defaultdict(lambda: defaultdict(list))

    def watched(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            result = function(*args)
            calls[rank()][name].append((args, result))
            return result

        return call

    with ExitStack() as stack:
        for name, module in functions.items():
            stack.enter_context(patch.object(module, name, watched(name, getattr(module, name))))
        yield calls


CONTRASTIVE = dict.fromkeys(("soft_targets", "itc_loss", "negative_weights", "draw", "itm_loss"), contrastive)


def _train(task: Pretraining, batch: SimpleNamespace) -> dict[str, Tensor]:
    """One training step with backward, and what passed between its functions."""
    states: list[Tensor] = []
    lm_states = task.model.lm_states

    def watched_states(*args: Any) -> Tensor:
        states.append(lm_states(*args))
        return states[-1]

    with recording(**CONTRASTIVE, lm_loss=pretrain) as calls, patch.object(task.model, "lm_states", watched_states):
        loss = task.training_step(batch, 0)
    loss.backward()
    with torch.no_grad():
        logits = batch.layout.pad(task.model.med.lm_head(states[0]))
    made = {
        **task.seen,
        **contrasted(calls[0]),
        **{"loss": loss, "loss_lm": calls[0]["lm_loss"][0][1], "lm_logits": logits},
    }
    return {name: tensor.detach() for name, tensor in made.items()}


def contrasted(calls: dict[str, list]) -> dict[str, Tensor]:
    """What ITC and ITM of one step made, by the folder's names."""
    (image_targets, text_targets), ((sims, itc),) = calls["soft_targets"], calls["itc_loss"]
    ((matched, itm),) = calls["itm_loss"]
    return {
        **{"loss_ita": itc, "loss_itm": itm, "itm_logits": matched[0]},
        **{"sim_i2t": sims[0], "sim_t2i": sims[1]},
        **{"sim_i2t_m": image_targets[0][1], "sim_t2i_m": text_targets[0][1]},
        **{"sim_i2t_targets": image_targets[1], "sim_t2i_targets": text_targets[1]},
        "neg_weights": torch.cat([result for _, result in calls["negative_weights"]]),
        "neg_index": torch.cat([result[0] for _, result in calls["draw"]]),
    }


# the other cases ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def run_features(
    out: Any,
    folder: Path,
    case: dict[str, Any],
    tensors: dict[str, Tensor],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    model = _model(folder, case, tensors, dtype, ("ITC projections", "ITM head"), decoder=False)
    image = inputs["image"].to(dtype)
    states = model.visual_encoder(image)
    out.tensors = {"image": states, "patch_embed": model.visual_encoder.patch_embed(image)}
    made = []
    for i, caption in enumerate(case["captions"]):
        ids, mask = inputs[f"caption{i}.input_ids"], inputs[f"caption{i}.attention_mask"]
        packed, layout = _texts(ids, mask)
        enc = packed.index_fill(0, layout.firsts, model.config.enc_id)
        looking = model.med.encode(enc, layout, model.med.look(states[i : i + 1]))
        out.tensors[f"caption{i}.text"] = layout.pad(model.med.encode(packed, layout))
        out.tensors[f"caption{i}.multimodal"] = layout.pad(looking)
        same = torch.equal(_ids(folder, case, [caption], ids.shape[1], ids.shape[1]), ids)
        made.append(caption if same else None)
    out.lists = {"captions": made, "tied_groups": _same_groups(_tied(model, tensors), case["tied_groups"])}
    out.reasons = USED


@torch.no_grad()
def run_itm(
    out: Any,
    folder: Path,
    case: dict[str, Any],
    tensors: dict[str, Tensor],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    model = _model(folder, case, tensors, dtype, decoder=False)
    packed, layout = _texts(inputs["input_ids"], inputs["attention_mask"])
    states = model.visual_encoder(inputs["image"].to(dtype))
    cross = model.med.look(states)
    as_they_are = model.med.encode(packed, layout, cross)[layout.firsts]  # the released class leaves [CLS] in place
    out.tensors = {
        "itm_logits": model.itm_head(as_they_are),
        "itm_logits_with_ENC": model.itm_logits(packed, layout, cross),
        "itc_sim": model.image_features(states) @ model.text_features(packed, layout).T,
    }
    width = inputs["input_ids"].shape[1]
    made = _ids(folder, case, case["captions"], case["max_length"], width)
    same = torch.equal(made, inputs["input_ids"])
    out.lists = {
        "captions": case["captions"] if same else made.tolist(),
        "tied_groups": _same_groups(_tied(model, tensors), case["tied_groups"]),
    }
    out.reasons = USED


def run_positions(
    out: Any,
    folder: Path,
    case: dict[str, Any],
    tensors: dict[str, Tensor],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    table = inputs["pos_embed"].to(dtype)
    out.tensors = {f"pos_embed_{g}x{g}": resize_position_embedding(table, g) for g in case["out_grids"]}
    out.lists = {"out_grids": case["out_grids"]}


RUNS = {
    "pretrain": run_pretrain,
    "feature_extractor": run_features,
    "itm": run_itm,
    "interpolate_pos_embed": run_positions,
}

"""The golden case `nlvr`: logits, loss and gradients, and how one cross-attention starts both halves of a twin."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from blip.modules.checkpoint import load, nodes
from blip.modules.names import released_names
from blip.modules.nlvr import merges_from
from blip.tasks.nlvr import NLVRTask
from blip.text import Tokenizer
from tests.golden_models import USED, _config, _gradients, _ids, _same_groups, _texts, _tied, _weights, digest


class Replay(NLVRTask):
    def log(self, *args: Any, **kwargs: Any) -> None: ...


def run_nlvr(
    out: Any,
    folder: Path,
    case: dict[str, Any],
    tensors: dict[str, Tensor],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    weights = _weights(folder, tensors)
    task = Replay(
        merges_from(weights.tensors),
        model=nodes(_config(case, weights)),
        tokenizer=Tokenizer.load(folder / case["vocab_file"]).to_json(),
        optimizer=lambda groups: torch.optim.AdamW(groups),
        schedule=lambda *_: 1.0,
        evaluators={},
    ).to(dtype)
    load(task.model, weights)
    ids, labels = inputs["input_ids"], inputs["targets"]
    packed, layout = _texts(ids, inputs["attention_mask"])
    image = torch.stack(inputs["image"].to(dtype).chunk(2), dim=1)  # all first pictures, then all second ones
    with torch.no_grad():
        logits = task.eval().model.nlvr_logits(image, packed, layout)
    loss = task.train().training_step(SimpleNamespace(image=image, input_ids=packed, layout=layout, labels=labels), 0)
    loss.backward()
    gradients = _gradients(task.model)
    out.tensors = {
        "logits": logits,
        "loss": loss,
        "digest.grad": digest(gradients, case["digest_names"]["grad"]),
        **{f"grad.{name}": gradient for name, gradient in gradients.items()},
    }
    width = ids.shape[1]
    out.lists = {
        "texts": case["texts"] if torch.equal(_ids(folder, case, case["texts"], width, width), ids) else None,
        "targets": labels.tolist(),
        "merge_layers": list(range(task.merge_from, case["dims"]["text_layers"])),
        "tied_groups": _same_groups(_tied(task.model, tensors), case["tied_groups"]),
        "parameters_without_gradient": sorted(set(case["digest_names"]["grad"]) - set(gradients)),
    }
    renames = case["loading_a_pretrain_checkpoint"]["renames"]
    filled, missing = _started(folder, tensors, renames, task)
    for start, halves in renames.items():
        out.lists[f"loading_a_pretrain_checkpoint.renames.{start}"] = [h for h in halves if h in filled[start]]
    out.lists["loading_a_pretrain_checkpoint.keys_of_model_not_covered"] = missing
    out.reasons |= USED | {
        "digest_names": "names of rows",
        "zero_gradient_parameters": "names of what float32 leaves out",
    }


def _started(
    folder: Path, tensors: dict[str, Tensor], renames: dict[str, list[str]], task: Replay
) -> tuple[dict[str, list[str]], list[str]]:
    """Starts the task from a file with one cross-attention: which released names each tensor filled, which none filled."""
    new = {half for halves in renames.values() for half in halves}
    generator = torch.Generator().manual_seed(0)
    single = {name: torch.randn(tensors[halves[0]].shape, generator=generator) for name, halves in renames.items()}
    rest = {n: t for n, t in tensors.items() if n not in new and not n.startswith("cls_head") and "merge" not in n}
    task = deepcopy(task).float()
    (report,) = task.take(_weights(folder, rest | single))
    state = released_names({f"model.{name}": tensor for name, tensor in task.model.state_dict().items()})
    equal = {
        name: [n for n in new if tensor.shape == state[n].shape and torch.equal(tensor, state[n])]
        for name, tensor in single.items()
    }
    return equal, sorted(released_names(dict.fromkeys(report.missing, torch.zeros(1))))

"""The golden case `retrieval`: fine-tuning steps alone and of two ranks, negatives of the own rank and of both."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from blip.modules.names import released_names
from blip.tasks import contrastive
from blip.tasks.retrieval import RetrievalTask
from tests.golden_models import (
    CONTRASTIVE,
    USED,
    Replayed,
    _after,
    _gradients,
    _ids,
    _leave_noise,
    _replayed,
    _same_groups,
    _texts,
    _tied,
    _weights,
    contrasted,
    digest,
    recording,
)
from tests.ranks import as_ranks


class Finetuning(Replayed, RetrievalTask): ...


def run_retrieval(
    out: Any,
    folder: Path,
    case: dict[str, Any],
    tensors: dict[str, Tensor],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    weights = _weights(folder, tensors)
    steps = len(case["hyper"]["alpha_per_step"])

    def batch(rank: int | None, step: int) -> tuple[SimpleNamespace, Tensor]:
        """The batch of a step (of a rank), and its draws."""
        prefix = f"single.step{step}." if rank is None else f"ddp.rank{rank}.step{step}."
        captions = case["single"]["captions"] if rank is None else case["ddp"]["captions_rank_step"][rank]
        image, ids, mask = (inputs[f"{prefix}{n}"] for n in ("image", "input_ids", "attention_mask"))
        if not torch.equal(_ids(folder, case, captions[step - 1], case["hyper"]["max_length"], ids.shape[1]), ids):
            raise ValueError(f"{folder}: the captions of {prefix[:-1]} give other ids than the folder's")
        packed, layout = _texts(ids, mask)
        made = SimpleNamespace(
            image=image.to(dtype), input_ids=packed, layout=layout, image_ids=inputs[f"{prefix}idx"], keys=None
        )
        return made, inputs[f"{prefix}u"].to(dtype).view(2, -1)

    def train(rank: int | None, negatives: str) -> dict[str, dict[str, Tensor]]:
        """All steps (of a rank): {"": what all ranks hold in common, "rank0.": what is its own}."""
        own = {"negatives": negatives, "positives": "image", "negative_floor": 0.0}
        task = _replayed(Finetuning, folder, case, weights, dtype, **own)
        common: dict[str, Tensor] = {}
        own: dict[str, Tensor] = {}
        if rank is None:
            task.model.temperature.data.fill_(torch.tensor(case["single"]["initial_temp_override"]))
        optimizer = torch.optim.AdamW(
            task.model.parameters(), lr=case["hyper"]["lr"], weight_decay=case["hyper"]["weight_decay"]
        )
        mine = common if rank is None else own
        for step in range(1, steps + 1):
            task.progress = case["hyper"]["alpha_per_step"][step - 1]
            rows, task.draws = batch(rank, step)
            seen = calls[rank or 0]
            seen.clear()
            loss = task.training_step(rows, 0)
            loss.backward()
            made = {**task.seen, **contrasted(seen), "loss": loss}
            made["sim_targets"] = seen["match_targets"][0][1]
            gradients = _gradients(task.model)
            made |= _graded(gradients, case)
            mine |= {f"step{step}.{name}": tensor.detach().clone() for name, tensor in made.items()}
            if rank is not None:
                for parameter in task.model.parameters():
                    assert parameter.grad is not None
                    parameter.grad = contrastive.mean_over_ranks(parameter.grad)
                meant = _graded(_gradients(task.model), case)
                common |= {f"step{step}.{name}": tensor.detach().clone() for name, tensor in meant.items()}
            optimizer.step()
            optimizer.zero_grad()
            task.after_step()
            ids = task.queue.ids
            common |= {
                f"step{step}.after.{name}": tensor.detach().clone()
                for name, tensor in {
                    "image_queue": task.queue.image.T,
                    "text_queue": task.queue.text.T,
                    "idx_queue": ids.masked_fill(ids < 0, -100)[None],
                    "ptr_queue": task.queue.place.reshape(1),
                    "temp": task.model.temperature,
                }.items()
            }
        state = {name: tensor.detach() for name, tensor in task.state_dict().items()}
        state = released_names({name: tensor for name, tensor in state.items() if not name.startswith("queue.")})
        tied = _tied(task.model, tensors)
        return {"common": common, "own": own, "state": state, "tied": tied, "gradients": gradients}

    with recording(**CONTRASTIVE, match_targets=contrastive) as calls:
        runs = {"single": [train(None, "local")]}
        for negatives in ("local", "all"):
            runs[f"ddp_{negatives}"] = as_ranks(2, lambda rank, how=negatives: train(rank, how))

    last = f"step{steps}"
    rows = {f"{run}.{last}.{kind}": case["digest_names"][kind] for run in runs for kind in ("param", "momentum")}
    for run, ranks in runs.items():
        out.tensors |= {f"{run}.{name}": tensor for name, tensor in ranks[0]["common"].items()}
        for rank, made in enumerate(ranks):
            out.tensors |= {f"{run}.rank{rank}.{name}": tensor for name, tensor in made["own"].items()}
            if not all(torch.equal(a, ranks[0]["state"][n]) for n, a in made["state"].items()):
                raise ValueError(f"{run}: rank {rank} holds other parameters than rank 0")
        _after(out, {**case, "digest_names": rows}, f"{run}.{last}", ranks[0]["state"], dtype)
        if dtype == torch.float32:
            _leave_noise(out, folder, f"{run}.{last}", f"{run}.step1.grad.")
    first = runs["single"][0]
    out.lists = {
        **{"single.captions": case["single"]["captions"], "ddp.captions_rank_step": case["ddp"]["captions_rank_step"]},
        "single.idx": [inputs[f"single.step{step}.idx"].tolist() for step in range(1, steps + 1)],
        "ddp.idx_rank_step": [
            [inputs[f"ddp.rank{rank}.step{step}.idx"].tolist() for step in range(1, steps + 1)] for rank in range(2)
        ],
        "tied_groups": _same_groups(first["tied"], case["tied_groups"]),
        "parameters_without_gradient": sorted(set(case["digest_names"]["grad"]) - set(first["gradients"])),
    }
    out.reasons |= USED | {
        "ddp_wrapper_check": "says of the released code that averaging is what DistributedDataParallel does",
        "digest_names": "names of rows",
        "zero_gradient_parameters": "names of what float32 leaves out",
    }


def _graded(gradients: dict[str, Tensor], case: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients in full, and as digests."""
    made = {f"grad.{name}": gradient for name, gradient in gradients.items()}
    return made | {"digest.grad": digest(gradients, case["digest_names"]["grad"])}

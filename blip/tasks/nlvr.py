"""Fine-tuning for NLVR2 (paper section 5.4): whether a statement about two pictures is true."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blip.modules.blip import BLIPConfig
from blip.modules.checkpoint import Report, Weights, load
from blip.modules.names import MERGES, NLVR_HEAD, TWINS, part
from blip.modules.nlvr import NLVR
from blip.tasks.base import Task


class NLVRTask(Task):
    """Trains on `StatementBatch`es, one statement for each two pictures; starts from a pre-trained or an NLVR2 model.

    merge_from: the number of the first block that merges what both looks found by a linear layer, where the blocks before
    it average (paper: the upper half, 6 of 12). The other arguments are `Task`'s.
    """

    def __init__(self, merge_from: int, **kwargs: Any) -> None:
        self.merge_from = merge_from  # `make_model` needs it
        super().__init__(**kwargs)

    def make_model(self, config: BLIPConfig) -> NLVR:
        return NLVR(config, self.merge_from)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.model.nlvr_logits(batch.image, batch.input_ids, batch.layout)  # [B, 2]
        loss = F.cross_entropy(logits, batch.labels)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=batch.image.shape[0])
        return loss

    def take(self, weights: Weights) -> list[Report]:
        """An NLVR2 model as it is; of another the encoder, both halves of each twin from its one cross-attention."""
        if any(part(name) == TWINS for name in weights.tensors):
            return super().take(weights)
        tensors, copied = twins(weights.tensors)
        report = load(self.model, replace(weights, tensors=tensors), spare=(MERGES, NLVR_HEAD))
        report.copied = copied
        return [report]

    @torch.no_grad()
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """A row for each statement: the key of its pictures, its id, what was said, the probability that it is true."""
        logits = self.model.nlvr_logits(batch.image, batch.input_ids, batch.layout, batch.text_row)
        return [
            {
                "key": batch.keys[row],
                **{name: entry[name] for name in ("id", "sentence") if name in entry},
                "prediction": probability > 0.5,
                "probability": round(probability, 6),
            }
            for entry, row, probability in zip(
                batch.statements, batch.text_row.tolist(), logits.softmax(1)[:, 1].tolist(), strict=True
            )
        ]

    def gallery(self, batch: Any) -> list[dict[str, Any]]:
        """No cards: the contact sheet shows one picture with a caption."""
        return []


def twins(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors with those of each encoder block's cross-attention under the names of both halves, and what was copied."""
    out: dict[str, Tensor] = {}
    copied: dict[str, str] = {}
    for name, tensor in tensors.items():
        single = re.fullmatch(r"(model\.med\.encoder\.\d+\.cross_attention)\.((query|key_value|out)\..*)", name)
        if single is None:
            out[name] = tensor
        else:
            out |= {f"{single[1]}.halves.{half}.{single[2]}": tensor for half in (0, 1)}
            copied[name] = "to both halves of NLVR2's twin, one for each picture"
    return out, copied

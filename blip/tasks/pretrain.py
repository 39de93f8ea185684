"""Pre-training (paper section 3.2, figure 2): ITC, ITM and LM over one encoding of the picture.

The step reads in the order of the figure: encode the picture, encode the text, momentum features, contrast (ITC); pick hard
negatives and match (ITM); decode (LM). Keys and values of a picture are projected once and serve all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip.modules.blip import TEMPERATURE_RANGE
from blip.modules.flops import pretraining_flops
from blip.modules.losses import lm_loss
from blip.modules.med import CrossKV
from blip.tasks.contrastive import ContrastiveObjectives, ContrastiveTask
from blip.tasks.distributed import mean_over_ranks, rank, world_size


@dataclass(frozen=True)
class Objectives(ContrastiveObjectives):
    """ITC and ITM, which takes part from `itm_start` on, and LM."""

    lm_weight: float
    itm_start: float
    label_smoothing: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.negatives == "all" and self.keys != "all":
            raise ValueError("task.objectives.negatives=all draws by similarities with all ranks: set keys=all as well")


class PretrainTask(ContrastiveTask):
    """Pre-trains the whole model on image-text pairs of at most `max_tokens`; the other arguments are `Task`'s."""

    objectives: Objectives

    def __init__(self, objectives: dict[str, Any], max_tokens: int, **kwargs: Any) -> None:
        super().__init__(Objectives(**objectives), max_tokens, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        model, goals, progress = self.model, self.objectives, self.progress
        model.temperature.data.clamp_(*TEMPERATURE_RANGE)
        image_states = model.visual_encoder(batch.image)  # [B, N, D]
        image_features = model.image_features(image_states)  # [B, E]
        text_features = model.text_features(batch.input_ids, batch.layout)  # [B, E]

        momentum_image, momentum_text = self.momentum_features(batch)
        with torch.autocast(batch.image.device.type, enabled=False):
            itc, image_similarity, text_similarity = self.contrast(
                image_features, text_features, momentum_image, momentum_text, batch.image_ids
            )
        loss = goals.itc_weight * itc
        logs = {"itc": itc.detach(), "temperature": model.temperature.detach()}

        matching = progress >= goals.itm_start
        cross = model.med.look(image_states) if matching or model.med.looks_alike else []
        if matching:
            columns = self.candidates(batch.image.shape[0])
            itm = self.match(batch, image_states, cross, image_similarity[:, columns], text_similarity[:, columns])
            loss = loss + goals.itm_weight * itm
            logs["itm"] = itm.detach()
        else:  # every parameter takes part in every step, as DDP expects
            idle = [model.itm_head, *(block.cross_attention for block in model.med.blocks())]
            loss = loss + 0.0 * sum(p.sum() for module in idle for p in module.parameters())

        lm = self.describe(batch, cross if model.med.looks_alike else model.med.look(image_states, decoder=True))
        loss = loss + goals.lm_weight * lm
        logs["lm"] = lm.detach()
        self.log_dict({f"train/{k}": v for k, v in logs.items()}, prog_bar=True, batch_size=batch.image.shape[0])
        self.log("train/loss", loss.detach(), batch_size=batch.image.shape[0])
        return loss

    def candidates(self, size: int) -> slice:
        """The columns of ITC's similarities that ITM draws negatives from: they begin with the batch's keys."""
        if self.draws_everywhere:
            return slice(world_size() * size)
        first = rank() * size if self.objectives.keys == "all" else 0
        return slice(first, first + size)

    def describe(self, batch: Any, cross: list[CrossKV]) -> Tensor:
        """LM of each text given its picture; logits only where a next token is to be told."""
        states = self.model.lm_states(batch.input_ids, batch.layout, cross)
        followed = batch.layout.followed()
        targets = batch.input_ids[followed + 1]
        count = mean_over_ranks(torch.full((), float(targets.shape[0]), device=states.device))
        return lm_loss(self.model.med.lm_head(states[followed]), targets, self.objectives.label_smoothing, count)

    def flops_per_pair(self, batch: Any) -> float:
        """Forward and backward of a step over this batch on this rank, by its pairs; from shapes alone, so nothing waits."""
        goals, size, layout = self.objectives, batch.image.shape[0], batch.layout
        keys = size * world_size() if goals.keys == "all" else size
        parts = pretraining_flops(
            self.model.config,
            size,
            tokens=layout.index.shape[0],
            longest=layout.longest,
            keys=keys + (goals.queue_size if self.progress >= goals.queue_start else 0),
            itm=self.progress >= goals.itm_start,
            gathered_width=self.max_tokens if self.draws_everywhere else None,
        )
        return sum(part.total for part in parts.values()) / size

"""What pre-training and retrieval share: ITC against a momentum encoder with a queue, and ITM with hard negatives.

The tasks differ in what they compute beside it and in which similarities the hard negatives are drawn by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blip.layout import TextLayout
from blip.modules.checkpoint import Report, Weights, load
from blip.modules.losses import (
    draw,
    itc_loss,
    itm_loss,
    match_targets,
    negative_weights,
    soft_targets,
)
from blip.modules.med import CrossKV
from blip.modules.momentum import MomentumEncoder, Queue
from blip.tasks.base import Task, step_seed
from blip.tasks.distributed import gather, gather_with_gradient, mean_over_ranks, rank, world_size


@dataclass(frozen=True)
class ContrastiveObjectives:
    """What ITC and ITM optimise. Starts and ends are shares of the run, so that a recipe fits any length.

    keys: whose momentum features of this batch ITC compares with, `local` (released) or `all` ranks. negatives: whose pairs
    ITM draws from. positives: what ITC takes for a match, `pair` (released pre-training) or `image` (released retrieval).
    alpha rises linearly from 0 at `alpha_start` to its value at `alpha_end`. momentum_ramp: begin with a faster average,
    min(m, (1+k)/(10+k)). negative_floor: added to how likely each negative is (released: 1e-4, in retrieval 0).
    """

    keys: str
    negatives: str
    positives: str
    itc_weight: float
    itm_weight: float
    queue_size: int
    queue_start: float
    alpha: float
    alpha_start: float
    alpha_end: float
    momentum: float
    momentum_ramp: bool
    momentum_dropout: bool
    negative_floor: float

    def __post_init__(self) -> None:
        choices = {"keys": ("local", "all"), "negatives": ("local", "all"), "positives": ("pair", "image")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"task.objectives.{name} must be one of {allowed}, not {getattr(self, name)!r}")

    def alpha_at(self, progress: float) -> float:
        if self.alpha_end <= self.alpha_start:
            return self.alpha if progress >= self.alpha_start else 0.0
        return self.alpha * min(1.0, max(0.0, (progress - self.alpha_start) / (self.alpha_end - self.alpha_start)))

    def momentum_at(self, step: int) -> float:
        return min(self.momentum, (1 + step) / (10 + step)) if self.momentum_ramp else self.momentum


class ContrastiveTask(Task):
    """A task with a momentum encoder and a queue, on pairs of at most `max_tokens`; the other arguments are `Task`'s."""

    def __init__(self, objectives: ContrastiveObjectives, max_tokens: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if max_tokens > (positions := self.model.config.med.positions):
            raise ValueError(f"data.max_tokens={max_tokens} is more than the {positions} of model.med.positions")
        self.max_tokens = max_tokens
        self.objectives = objectives
        self.momentum = MomentumEncoder(self.model, objectives.momentum_dropout)
        self.queue = Queue(objectives.queue_size, self.model.config.embed_width)
        self.pending: list[tuple[Tensor, Tensor, Tensor]] = []  # momentum features since the last optimizer step

    def take(self, weights: Weights) -> list[Report]:
        """The model, and the momentum encoder where the file has one (else a copy of the model); the queue starts anew."""
        momentum = {name: t for name, t in weights.tensors.items() if name.startswith("momentum.")}
        queue = [name for name in weights.tensors if name.startswith("queue.")]
        rest = {name: t for name, t in weights.tensors.items() if name not in momentum and name not in queue}
        reports = super().take(replace(weights, tensors=rest))
        reports[0].dropped |= dict.fromkeys(queue, "the queue starts anew")
        if momentum:
            return [*reports, load(self.momentum, replace(weights, tensors=momentum, dropped={}), "momentum.")]
        self.momentum.copy_from(self.model)
        return reports

    def start_from(self, text: str | None, image: str | None, lm_head: bool) -> list[Report]:
        reports = super().start_from(text, image, lm_head)
        self.momentum.copy_from(self.model)
        return reports

    def momentum_features(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Of pictures and texts, [B, E] each; the momentum encoder moves first, once an optimizer step."""
        if self.micro_batch == 0:
            self.momentum.update(self.model, self.objectives.momentum_at(self.global_step))
        image, text = self.momentum(batch.image, batch.input_ids, batch.layout)
        self.pending.append((gather(image), gather(text), gather(batch.image_ids)))
        return image, text

    def contrast(
        self, image: Tensor, text: Tensor, momentum_image: Tensor, momentum_text: Tensor, image_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ITC of features [B, E] with the momentum features as keys, and both similarities [B, K] (batch first)."""
        goals, queue = self.objectives, self.queue
        key_image, key_text, key_ids = (
            self.pending[-1] if goals.keys == "all" else (momentum_image, momentum_text, image_ids)
        )
        own = torch.arange(image.shape[0], device=image.device) + (
            rank() * image.shape[0] if goals.keys == "all" else 0
        )
        if queue.size and self.progress >= goals.queue_start:
            key_image = torch.cat([key_image, queue.image.to(key_image.dtype)])
            key_text = torch.cat([key_text, queue.text.to(key_text.dtype)])
            key_ids = torch.cat([key_ids, queue.ids])
        temperature = self.model.temperature.to(image.dtype)
        image_similarity, text_similarity = image @ key_text.T / temperature, text @ key_image.T / temperature  # [B, K]
        targets = match_targets(image_ids, key_ids, own, goals.positives, image.dtype)
        alpha = goals.alpha_at(self.progress)
        fixed = temperature.detach()
        image_targets = soft_targets(targets, momentum_image @ key_text.T / fixed, alpha)
        text_targets = soft_targets(targets, momentum_text @ key_image.T / fixed, alpha)
        return (
            itc_loss(image_similarity, text_similarity, image_targets, text_targets),
            image_similarity,
            text_similarity,
        )

    @property
    def draws_everywhere(self) -> bool:
        """Whether ITM's negatives come from other ranks, too."""
        return self.objectives.negatives == "all" and world_size() > 1

    def match(
        self, batch: Any, image_states: Tensor, cross: list[CrossKV], image_similarity: Tensor, text_similarity: Tensor
    ) -> Tensor:
        """ITM of each pair, of each picture with a hard negative text, and of each text with a hard negative picture.

        Similarities [B, G] by which the negatives are drawn: of pictures with the texts, and of texts with the pictures, of
        this rank (G = B) or of all where negatives come from everywhere.
        """
        floor, everywhere = self.objectives.negative_floor, self.draws_everywhere
        size = batch.image.shape[0]
        all_ids = gather(batch.image_ids) if everywhere else batch.image_ids
        admissible = batch.image_ids[:, None] != all_ids[None]  # [B, G]
        uniform = self.uniform(size)
        pictures, has_picture = draw(negative_weights(text_similarity, admissible, floor), uniform[0])
        texts, has_text = draw(negative_weights(image_similarity, admissible, floor), uniform[1])

        ids = batch.layout.pad(batch.input_ids)  # [B, L]
        mask = batch.layout.mask
        if everywhere:
            widen = (0, self.max_tokens - ids.shape[1])  # one width for all ranks
            ids, mask = gather(torch.nn.functional.pad(ids, widen)), gather(torch.nn.functional.pad(mask, widen))
            foreign = self.model.med.look(gather_with_gradient(image_states)[pictures])
        else:
            foreign = [kv.select(pictures) for kv in cross]
        negative = TextLayout.from_mask(mask[texts])
        # The pair's text and the negative text look at the same picture: side by side they are one row of queries.
        both = batch.layout.beside(negative)
        own_picture = self.model.itm_logits(torch.cat([batch.input_ids, ids[texts].flatten()]), both, cross)
        other_picture = self.model.itm_logits(batch.input_ids, batch.layout, foreign)
        logits = torch.cat([own_picture[:size], other_picture, own_picture[size:]])  # [3B, 2]
        matched = torch.arange(3 * size, device=logits.device) < size
        valid = torch.cat([torch.ones_like(has_text), has_picture, has_text])
        return itm_loss(logits, matched, valid, mean_over_ranks(valid.sum().to(logits.dtype)))

    def uniform(self, size: int) -> Tensor:
        """Numbers in [0, 1) for the draws, [2, B]: a function of seed, step and the row's place among all ranks' rows."""
        generator = torch.Generator(device=self.device)
        generator.manual_seed(step_seed(self.seed, "negatives", self.global_step, self.micro_batch))
        everyone = torch.rand(2, world_size() * size, generator=generator, device=self.device)
        return everyone[:, rank() * size : (rank() + 1) * size]

    def after_step(self) -> None:
        for features in self.pending:
            self.queue.enqueue(*features)
        self.pending = []

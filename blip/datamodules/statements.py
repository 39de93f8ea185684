"""Statements about two pictures, true or false (NLVR2), as batches. Paper section 5.4."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blip.datamodules.batches import RecordBatch, Sample, Words, common, rows_of
from blip.datamodules.plan import generator
from blip.datamodules.records import STATEMENTS
from blip.datamodules.stream import StreamDataModule
from blip.layout import TextLayout
from blip.text import clean_caption

SIDES = re.compile(r"\b(left|right)(?=most\b|\b)", re.IGNORECASE)
OTHER = {"left": "right", "right": "left"}


@dataclass(kw_only=True)
class StatementBatch(RecordBatch):
    """B pairs of pictures, image [B, 2, 3, S, S], and R statements (training: R = B).

    input_ids [T] int64, the packed statements `[CLS] ... [SEP]` that `layout` places; text_row [R] int64, the row of the
    pictures a statement is about; labels [R] int64: 1 true, 0 false, -1 not told; statements [R]: the entries of the shards.
    """

    input_ids: Tensor
    layout: TextLayout
    text_row: Tensor
    labels: Tensor
    statements: list[dict[str, Any]]


def swap_sides(text: str) -> str:
    """The text with left (leftmost) for right (rightmost) and the other way round."""
    return SIDES.sub(lambda found: OTHER[found[1].lower()], text)


def collate(samples: Sequence[Sample], words: Words, training: bool, swap_seed: int | None = None) -> StatementBatch:
    """Samples -> StatementBatch.

    With a `swap_seed` (training alone) every second sample, drawn by (seed, epoch, position), changes its left for its right
    picture and these words in its statement. ValueError where training meets a statement without label.
    """
    if training and (silent := [s.key for s in samples if any(e["label"] is None for e in s.entries)]):
        raise ValueError(f"{silent[0]}: a statement without label, as in a test set: it cannot be trained on")
    swapped = [
        swap_seed is not None and training and generator(swap_seed, s.epoch, s.at, "swap").random() < 0.5
        for s in samples
    ]
    shown = [s._replace(image=s.image[::-1]) if turn else s for s, turn in zip(samples, swapped, strict=True)]
    statements = [entry for sample in samples for entry in sample.entries]
    rows = rows_of(samples)
    texts = [clean_caption(entry["sentence"], words.max_words) for entry in statements]
    texts = [swap_sides(text) if swapped[row] else text for text, row in zip(texts, rows.tolist(), strict=True)]
    input_ids, layout = words.encode(texts)
    return StatementBatch(
        **common(shown),
        input_ids=input_ids,
        layout=layout,
        text_row=rows,
        labels=torch.tensor([-1 if entry["label"] is None else int(entry["label"]) for entry in statements]),
        statements=statements,
    )


class StatementsDataModule(StreamDataModule):
    """Statements about two pictures.

    swap: in training, every second time, left and right change their places, pictures and words; all else is `StreamDataModule`'s
    """

    kind = STATEMENTS

    def __init__(self, *, swap: bool = False, **stream: Any) -> None:
        super().__init__(**stream)
        self.swap = swap

    def collator(self, training: bool) -> Callable[[Sequence[Sample]], StatementBatch]:
        return partial(collate, words=self.words, training=training, swap_seed=self.seed if self.swap else None)

"""Pairs of pictures and texts as batches: pre-training, captioning, retrieval; also clips and their texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from blip.datamodules.batches import RecordBatch, Sample, Words, common, rows_of
from blip.datamodules.records import PAIRS
from blip.datamodules.stream import StreamDataModule
from blip.layout import TextLayout
from blip.text import clean_caption


@dataclass(kw_only=True)
class Batch(RecordBatch):
    """B pictures and R texts (training: R = B).

    input_ids [T] int64, the packed texts `[CLS] ... [SEP]` that `layout` places; text_row [R] int64, the row of the picture a
    text belongs to; texts [R] as they stand in the shards; references [B], all texts of each picture (evaluation only).
    """

    input_ids: Tensor
    layout: TextLayout
    text_row: Tensor
    texts: list[str]
    references: list[list[str]]


def collate(samples: Sequence[Sample], words: Words) -> Batch:
    """Samples -> Batch. ValueError with text and id where an id is out of the model's range."""
    texts = [text for sample in samples for text in sample.entries]
    input_ids, layout = words.encode([clean_caption(text, words.max_words) for text in texts])
    return Batch(
        **common(samples),
        input_ids=input_ids,
        layout=layout,
        text_row=rows_of(samples),
        texts=texts,
        references=[sample.references for sample in samples],
    )


class PairsDataModule(StreamDataModule):
    """Pairs of one picture and one text; of a set with `frames`, of one clip.

    captions: `all` (each text is a pair of its own) or `one` (each picture once, its text drawn); a set of validation or test
        shows the `first` text of a picture (by default) or `all`;
    all else is `StreamDataModule`'s
    """

    kind = PAIRS

    def __init__(self, *, captions: str = "all", **stream: Any) -> None:
        super().__init__(**stream)
        if captions not in ("all", "one"):
            raise ValueError(
                f"captions={captions!r}: `all` (each text a pair) or `one` (each picture once, text drawn)"
            )
        self.captions = self.entries = captions

    def collator(self, training: bool) -> Callable[[Sequence[Sample]], Batch]:
        return partial(collate, words=self.words)

    def shown(self, spec: Mapping[str, Any]) -> str:
        return spec.get("captions", "first")

    @property
    def fingerprint(self) -> str:
        return f"{self.plan.fingerprint} captions={self.captions}"

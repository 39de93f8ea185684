"""What every batch has, of whatever kind its records are: pictures, who they are, and where in the stream they stood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from blip.layout import TextLayout
from blip.text import Tokenizer


class Sample(NamedTuple):
    """One record on its way to a batch.

    image [S, S, 3] uint8, or [2, S, S, 3] of two pictures, or [F, S, S, 3] of a clip; entries: those that the batch shows;
    references: all of the record (evaluation only); position: of the epoch once the global batch is done; at: its own
    """

    image: np.ndarray
    entries: list[Any]
    references: list[Any]
    key: str
    image_id: int
    source: int
    epoch: int
    position: int
    at: int
    replaced: tuple[str, ...] = ()


@dataclass(kw_only=True)
class RecordBatch:
    """B records.

    image [B, 3, S, S] uint8 ([B, 2, 3, S, S] of two pictures, [B, F, 3, S, S] of clips of F frames); image_ids [B] int64,
    which picture a row shows, unique over all sources; keys [B] as in the shards; source [B] int64; position: rows of the
    epoch consumed once this global batch is done; replaced: names of records that failed and gave their places to others.
    """

    image: Tensor
    image_ids: Tensor
    keys: list[str]
    source: Tensor
    epoch: int
    position: int
    replaced: list[str]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return replace(self, **{n: x.to(device, non_blocking=non_blocking) for n, x in self._on_device().items()})

    def pin_memory(self) -> Self:
        return replace(self, **{name: x.pin_memory() for name, x in self._on_device().items()})

    def _on_device(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor | TextLayout)}


def common(samples: Sequence[Sample]) -> dict[str, Any]:
    """The fields of `RecordBatch` for these samples."""
    shape = np.moveaxis(samples[0].image, -1, -3).shape
    image = torch.empty(len(samples), *shape, dtype=torch.uint8)
    np.stack([np.moveaxis(sample.image, -1, -3) for sample in samples], out=image.numpy())
    return {
        "image": image,
        "image_ids": torch.tensor([sample.image_id for sample in samples]),
        "keys": [sample.key for sample in samples],
        "source": torch.tensor([sample.source for sample in samples]),
        "epoch": samples[0].epoch,
        "position": samples[0].position,
        "replaced": [name for sample in samples for name in sample.replaced],
    }


def rows_of(samples: Sequence[Sample]) -> Tensor:
    """For each entry of the samples, one after the other, which sample it belongs to, [R] int64."""
    return torch.tensor([row for row, sample in enumerate(samples) for _ in sample.entries], dtype=torch.int64)


@dataclass(frozen=True)
class Words:
    """How texts become ids. max_words: kept of a text, max_tokens: with [CLS] and [SEP]; vocab_size: of the model."""

    tokenizer: Tokenizer
    max_words: int
    max_tokens: int
    vocab_size: int

    def pack(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, TextLayout]:
        """Texts -> packed [T] int64 and their layout. ValueError with text and id where one is out of the model's range."""
        self.tokenizer.check_ids(ids, self.vocab_size)
        return torch.tensor([i for text in ids for i in text]), TextLayout.from_lengths([len(text) for text in ids])

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, TextLayout]:
        """Cleaned texts -> packed ids, each `[CLS] ... [SEP]`, and their layout."""
        return self.pack(self.tokenizer.encode(texts, self.max_tokens))

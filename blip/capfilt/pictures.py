"""Pictures of shards for models that caption and score: read and decoded once, as large as each model wants them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blip.datamodules.images import decode, resize_square
from blip.datamodules.index import Index
from blip.datamodules.records import entries_of
from blip.datamodules.shards import Reader, Span


@dataclass
class Batch:
    """Records of one shard: those whose picture and texts could be had, and of the others why not.

    pixels: size -> [B, S, S, 3] uint8; texts: of each of the B pictures, as they stand in the shard
    """

    shard: int
    end: int  # the record behind its last
    records: list[int] = field(default_factory=list)
    pixels: dict[int, Tensor] = field(default_factory=dict)
    texts: list[list[str]] = field(default_factory=list)
    broken: list[tuple[int, str]] = field(default_factory=list)  # (record, reason)
    wrong: str = ""  # why the shard cannot be read


class Pictures(Dataset):
    """Records by their numbers, resized for each of `sizes`; a batch of numbers is of one shard."""

    def __init__(self, index: Index, sizes: Iterable[int], cache_bytes: int | None = None) -> None:
        self.index, self.sizes, self.reader = index, sorted(set(sizes)), Reader(cache_bytes)

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        places = [self.index.places(number) for number in numbers]
        batch = Batch(places[0][0], numbers[-1] + 1)
        try:
            read = self.reader.read([Span(self.index.shard(shard), *parts) for shard, parts, _ in places])
        except (OSError, ValueError) as error:
            batch.wrong = str(error)
            return batch
        views: list[list[Tensor]] = [[] for _ in self.sizes]
        for number, (data, text), (_, _, is_json) in zip(numbers, read, places, strict=True):
            try:
                texts, image = entries_of(text, is_json, self.index.kind)[0], decode(data)
            except ValueError as error:  # an ImageError is one with a reason
                batch.broken.append((number, getattr(error, "reason", str(error))))
                continue
            batch.records.append(number)
            batch.texts.append(texts)
            for of_size, size in zip(views, self.sizes, strict=True):
                of_size.append(torch.from_numpy(resize_square(image, size)))
        if batch.records:
            batch.pixels = dict(zip(self.sizes, map(torch.stack, views), strict=True))  # tensors: workers share them
        return batch


def loader(pictures: Pictures, batches: Iterable[Sequence[int]], workers: int, prefetch: int, size: int) -> DataLoader:
    """Batches of these numbers in their order; `batches`, each of at most `size` numbers, is asked only for what is read next."""
    options: dict[str, Any] = {}
    if workers:
        from blip.datamodules.stream import fitting_prefetch  # with it comes lightning

        ready = fitting_prefetch(prefetch, workers, size * sum(3 * side**2 for side in pictures.sizes))
        options = {"num_workers": workers, "prefetch_factor": ready}
    return DataLoader(pictures, batch_sampler=batches, collate_fn=_as_it_is, **options)  # type: ignore[arg-type]


def _as_it_is(batch: Any) -> Any:
    return batch

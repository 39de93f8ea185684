"""Reading by the plan: bytes of records from where their shards lie, and the datasets whose keys are positions."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from blip.datamodules.batches import Sample
from blip.datamodules.images import AugmentConfig, decode, resize_square, training_view
from blip.datamodules.index import Index
from blip.datamodules.locations import is_url
from blip.datamodules.plan import Key, Plan, draw, generator
from blip.datamodules.records import Kind, entries_of
from blip.datamodules.remote import Remote, Shard
from blip.datamodules.video import clip

OPEN_FILES = 256  # descriptors kept a process
NEAR = 65536  # the parts of a record closer than this (bytes) come with one read
TEXTS_AT_ONCE = 1024
GREY = 127  # of blank pictures


class Span:
    """Where one record lies: a shard, and (offset, length) of each of its parts in it, the text last."""

    def __init__(self, shard: Shard, *parts: tuple[int, int]) -> None:
        self.shard, self.parts = shard, parts
        self.start = min(at for at, _ in parts)
        whole = max(map(sum, parts)) - self.start
        near = whole <= sum(length for _, length in parts) + NEAR
        self.reads = [(self.start, whole)] if near else list(parts)  # one read where they are neighbours

    def split(self, read: Sequence[bytes]) -> tuple[bytes, ...]:
        """The parts out of what `reads` brought."""
        if len(read) == len(self.parts) > 1:
            return tuple(read)
        return tuple(read[0][at - self.start : at - self.start + length] for at, length in self.parts)


class Reader:
    """Reads records in the order in which they lie, gives them back in the order asked; safe to fork and to pickle."""

    def __init__(self, cache_bytes: int | None = None) -> None:
        self.remote = Remote(cache_bytes)
        self._files: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict:
        return {"remote": self.remote, "_files": OrderedDict()}  # descriptors belong to a process

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def read(self, spans: Sequence[Span]) -> list[tuple[bytes, ...]]:
        """The parts of each span. OSError where a shard cannot be read, ValueError where it is not the one indexed."""
        order = sorted(range(len(spans)), key=lambda i: (spans[i].shard.location, spans[i].parts))
        distant = [i for i in order if is_url(spans[i].shard.location)]
        brought = dict(zip(distant, self.remote.read([(spans[i].shard, spans[i].reads) for i in distant]), strict=True))
        found: dict[int, tuple[bytes, ...]] = {}
        for i in order:
            parts = brought.get(i, spans[i].shard.location)  # bytes that came, or the file that has them
            if not isinstance(parts, list):
                parts = [self._pread(str(parts), *read) for read in spans[i].reads]
            found[i] = spans[i].split(parts)
        return [found[i] for i in range(len(spans))]

    def _pread(self, location: str, offset: int, length: int) -> bytes:
        # pread has no file position, so a descriptor that a fork shares does no harm
        if location in self._files:
            self._files.move_to_end(location)
        else:
            while len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[location] = os.open(location, os.O_RDONLY)
        data = os.pread(self._files[location], length, offset)
        if len(data) != length:
            raise ValueError(f"{location}: ends before byte {offset + length}; it changed since its index was made")
        return data


def texts_in(index: Index) -> Iterator[str]:
    """What is written in every entry of an index in the order of its rows; the pictures are not read."""
    reader = Reader()
    for start in range(0, len(index.pictures), TEXTS_AT_ONCE):
        numbers = range(start, min(start + TEXTS_AT_ONCE, len(index.pictures)))
        places = [index.places(n) for n in numbers]
        held = [text for n in numbers if (text := index.text(n)) is not None]
        spans = [] if held else [Span(index.shard(shard), parts[-1]) for shard, parts, _ in places]
        texts = held or [text for (text,) in reader.read(spans)]
        for (_, _, is_json), text in zip(places, texts, strict=True):
            yield from map(index.kind.text, entries_of(text, is_json, index.kind)[0])


class _Records:
    """Reads records of several indexes by number."""

    def __init__(self, indexes: Sequence[Index], cache_bytes: int | None = None) -> None:
        self.indexes, self.reader = indexes, Reader(cache_bytes)
        self.remote = any(is_url(index.location(0)) for index in indexes)
        self.id_starts = np.concatenate([[0], np.cumsum([len(index.pictures) for index in indexes])])

    def read(self, where: Sequence[tuple[int, int]]) -> list[tuple[list[bytes], bytes, bool]]:
        """(index number, record) -> (bytes of its pictures, bytes that hold its entries, whether these are JSON)."""
        places = [self.indexes[source].places(record) for source, record in where]
        spans = [
            Span(self.indexes[source].shard(shard), *parts)
            for (source, _), (shard, parts, _) in zip(where, places, strict=True)
        ]
        records = []
        for (source, record), read, (_, _, is_json) in zip(where, self.reader.read(spans), places, strict=True):
            held = self.indexes[source].text(record)
            *images, text = read if held is None else (*read, held)
            records.append((images, text, is_json))
        return records

    def name(self, source: int, record: int) -> str:
        return self.indexes[source].full_name(record)


def grey(kind: Kind, size: int, frames: int | None = None) -> np.ndarray:
    """Grey in place of what a record shows: what is left to a model that does not see. Shaped as in `Sample`."""
    several = (frames,) if kind.clips else (kind.pictures,) if kind.pictures > 1 else ()
    return np.full((*several, size, size, 3), GREY, np.uint8)


class TrainRecords(Dataset):
    """The dataset whose keys are positions of the plan. Holds no state: what a key gives depends on the key alone.

    entries: `all` where a unit of the plan is an entry, `one` where it is a record, of which one entry is drawn; config: of the
    augmentation, None only resizes; blank: grey pictures
    """

    def __init__(
        self,
        indexes: Sequence[Index],
        plan: Plan,
        entries: str,
        size: int,
        config: AugmentConfig | None,
        cache_bytes: int | None = None,
        blank: bool = False,
    ) -> None:
        self.records, self.plan = _Records(indexes, cache_bytes), plan
        self.entries, self.size, self.config, self.blank = entries, size, config, blank
        self.kind = indexes[0].kind
        self._ahead: list = []

    def __getitem__(self, key: Key) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample]:
        places = self._places(keys[0].epoch, [key.position for key in keys])
        read = self.records.read([(source, record) for source, record, _ in places])
        if self.records.remote:
            self._fetch_ahead(keys[0])
        return [self._sample(key, place, found) for key, place, found in zip(keys, places, read, strict=True)]

    def _fetch_ahead(self, key: Key) -> None:
        """Once a window: begins to fetch the shards of the next, where servers give only whole ones."""
        ahead = self.plan.ahead(key.epoch, key.start)
        if ahead != self._ahead:
            self._ahead = ahead
            shards = [self.records.indexes[source].shard(n) for source, numbers in ahead for n in numbers]
            self.records.reader.remote.fetch_ahead(shards)

    def _places(self, epoch: int, positions: Sequence[int]) -> list[tuple[int, int, int]]:
        """Positions -> (source, record, number of its entry)."""
        sources, units = self.plan.resolve(epoch, np.array(positions))
        places = []
        for source, unit, position in zip(sources.tolist(), units, positions, strict=True):
            index = self.records.indexes[source]
            if self.entries == "all":
                record, entry = index.picture_of(unit)
            else:
                record = unit
                entry = draw(int(index.text_counts(record)), self.plan.seed, epoch, position, "text")
            places.append((source, int(record), int(entry)))
        return places

    def _sample(self, key: Key, place: tuple[int, int, int], found: tuple[list[bytes], bytes, bool]) -> Sample:
        """The row of this position or, where it does not decode, of the next position of the same global batch."""
        failed: list[str] = []
        for step in range(key.stop - key.start):
            if step:
                next_one = key.start + (key.position - key.start + step) % (key.stop - key.start)
                (place,) = self._places(key.epoch, [next_one])
                (found,) = self.records.read([place[:2]])
            source, record, number = place
            index = self.records.indexes[source]
            try:
                image, entry = self._view(found[0], key), entries_of(*found[1:], index.kind)[0][number]
            except (ValueError, IndexError) as error:  # an ImageError is a ValueError with a reason
                reason = getattr(error, "reason", "its text is not the one indexed")
                failed.append(f"{self.records.name(source, record)} ({reason})")
                continue
            image_id = int(self.records.id_starts[source]) + record
            return Sample(
                image,
                [entry],
                [],
                index.key(record),
                image_id,
                source,
                key.epoch,
                key.stop,
                key.position,
                tuple(failed),
            )
        raise ValueError(
            f"no {self.kind.one} of the global batch at position {key.start} of epoch {key.epoch} decodes: {failed[:5]} ..."
        )

    def _view(self, images: Sequence[bytes], key: Key) -> np.ndarray:
        if self.blank:
            return grey(self.kind, self.size)
        if self.config is None:
            views = [resize_square(decode(data), self.size) for data in images]
        else:
            rng = generator(self.plan.seed, key.epoch, key.position, "augment")
            views = [training_view(data, self.config, rng) for data in images]
        return views[0] if len(views) == 1 else np.stack(views)


class EvaluationRecords(Dataset):
    """Every record once, as it is (resized), with its entries; all of them as references.

    entries: `first` or `all` of a record, or `each`, where an item is one entry; frames: of a clip; blank: grey pictures
    """

    def __init__(
        self,
        index: Index,
        entries: str,
        size: int,
        cache_bytes: int | None = None,
        frames: int | None = None,
        blank: bool = False,
    ) -> None:
        self.records, self.index, self.entries = _Records([index], cache_bytes), index, entries
        self.size, self.frames, self.blank = size, frames, blank

    def __len__(self) -> int:
        return len(self.index) if self.entries == "each" else len(self.index.pictures)

    def __getitem__(self, item: int) -> Sample:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int]) -> list[Sample]:
        places = [self._place(item) for item in items]
        records = list(
            dict.fromkeys(record for record, _ in places)
        )  # read and decoded once, however many entries follow
        read = dict(zip(records, self.records.read([(0, record) for record in records]), strict=True))
        found = {record: self._record(record, *read[record]) for record in records}
        samples = []
        for item, (record, shown) in zip(items, places, strict=True):
            image, entries = found[record]
            key = self.index.key(record)
            samples.append(Sample(image, entries[shown], entries, key, record, 0, 0, items[-1] + 1, item))
        return samples

    def _place(self, item: int) -> tuple[int, slice]:
        """(record, which of its entries are shown)"""
        if self.entries != "each":
            return item, slice(1 if self.entries == "first" else None)
        record, entry = (int(n[0]) for n in self.index.picture_of(np.array([item])))
        return record, slice(entry, entry + 1)

    def _record(self, record: int, images: list[bytes], text: bytes, is_json: bool) -> tuple[np.ndarray, list[Any]]:
        try:
            return self._view(images), entries_of(text, is_json, self.index.kind)[0]
        except ValueError as error:  # to leave it out would change what is measured
            raise ValueError(
                f"{self.records.name(0, record)}: {error}; index its shard anew with `blip data index`"
            ) from error

    def _view(self, images: list[bytes]) -> np.ndarray:
        if self.blank:
            return grey(self.index.kind, self.size, self.frames)
        if self.frames is not None:
            return clip(images[0], self.frames, self.size)
        views = [resize_square(decode(data), self.size) for data in images]
        return views[0] if len(views) == 1 else np.stack(views)

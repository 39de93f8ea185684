"""Reading by the plan: bytes of pairs from where their shards lie, and the datasets whose keys are positions."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from blip.datamodules.images import AugmentConfig, decode, resize_square, training_view
from blip.datamodules.index import Index
from blip.datamodules.locations import is_url
from blip.datamodules.plan import Key, Plan, draw, generator
from blip.datamodules.remote import Remote, Shard
from blip.datamodules.scan import texts_of

OPEN_FILES = 256  # descriptors kept a process
NEAR = 65536  # an image and a text closer than this (bytes) come with one read
TEXTS_AT_ONCE = 1024


@dataclass(frozen=True)
class Span:
    """Where one pair lies: a shard, and (offset, length) of the picture and of the text in it."""

    shard: Shard
    image: tuple[int, int]
    text: tuple[int, int]

    @property
    def reads(self) -> list[tuple[int, int]]:
        """(offset, length) of the reads that bring both: one where they are neighbours."""
        start = min(self.image[0], self.text[0])
        end = max(sum(self.image), sum(self.text))
        if end - start <= self.image[1] + self.text[1] + NEAR:
            return [(start, end - start)]
        return [self.image, self.text]

    def split(self, read: Sequence[bytes]) -> tuple[bytes, bytes]:
        """(picture, text) out of what `reads` brought."""
        if len(read) == 2:
            return read[0], read[1]
        start = min(self.image[0], self.text[0])
        image, text = self.image[0] - start, self.text[0] - start
        return read[0][image : image + self.image[1]], read[0][text : text + self.text[1]]


class Reader:
    """Reads pairs in the order in which they lie, gives them back in the order asked; safe to fork and to pickle."""

    def __init__(self, cache_bytes: int | None = None) -> None:
        self.remote = Remote(cache_bytes)
        self._files: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict:
        return {"remote": self.remote, "_files": OrderedDict()}  # descriptors belong to a process

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def read(self, spans: Sequence[Span]) -> list[tuple[bytes, bytes]]:
        """(picture, text) of each span. OSError where a shard cannot be read, ValueError where it is not the one indexed."""
        order = sorted(range(len(spans)), key=lambda i: (spans[i].shard.location, spans[i].image))
        distant = [i for i in order if is_url(spans[i].shard.location)]
        brought = dict(zip(distant, self.remote.read([(spans[i].shard, spans[i].reads) for i in distant]), strict=True))
        found: dict[int, tuple[bytes, bytes]] = {}
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
    """Every text of an index in the order of its rows; the pictures are not read."""
    reader = Reader()
    for start in range(0, len(index.pictures), TEXTS_AT_ONCE):
        rows = index.pictures[start : start + TEXTS_AT_ONCE]
        numbers = index.shard_of(np.arange(start, start + len(rows))).tolist()
        places = [(int(row["text_at"]), int(row["text_size"])) for row in rows]
        spans = [Span(index.shard(number), place, place) for number, place in zip(numbers, places, strict=True)]
        for row, (_, text) in zip(rows, reader.read(spans), strict=True):
            yield from texts_of(text, bool(row["json"]))


class Sample(NamedTuple):
    """One picture on its way to a batch: image [S, S, 3] uint8, its text or texts."""

    image: np.ndarray
    texts: list[str]
    references: list[str]
    key: str
    image_id: int
    source: int
    epoch: int
    position: int
    replaced: tuple[str, ...] = ()


class _Pictures:
    """Reads pictures of several indexes by number."""

    def __init__(self, indexes: Sequence[Index], cache_bytes: int | None = None) -> None:
        self.indexes, self.reader = indexes, Reader(cache_bytes)
        self.remote = any(is_url(index.location(0)) for index in indexes)
        self.id_starts = np.concatenate([[0], np.cumsum([len(index.pictures) for index in indexes])])

    def read(self, where: Sequence[tuple[int, int]]) -> list[tuple[bytes, bytes, bool]]:
        """(index number, picture) -> (bytes of the picture, bytes that hold its texts, whether these are JSON)."""
        spans, is_json = [], []
        for source, picture in where:
            index = self.indexes[source]
            row = index.pictures[picture]
            shard = int(index.shard_of(picture))
            image, text = (int(row["image_at"]), int(row["image_size"])), (int(row["text_at"]), int(row["text_size"]))
            spans.append(Span(index.shard(shard), image, text))
            is_json.append(bool(row["json"]))
        read = self.reader.read(spans)
        return [(image, text, kind) for (image, text), kind in zip(read, is_json, strict=True)]

    def name(self, source: int, picture: int) -> str:
        return self.indexes[source].full_name(picture)


class TrainPairs(Dataset):
    """The dataset whose keys are positions of the plan. Holds no state: what a key gives depends on the key alone."""

    def __init__(
        self,
        indexes: Sequence[Index],
        plan: Plan,
        captions: str,
        size: int,
        config: AugmentConfig | None,
        cache_bytes: int | None = None,
    ) -> None:
        self.pictures, self.plan = _Pictures(indexes, cache_bytes), plan
        self.captions, self.size, self.config = captions, size, config
        self._ahead: list = []

    def __getitem__(self, key: Key) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample]:
        places = self._places(keys[0].epoch, [key.position for key in keys])
        read = self.pictures.read([(source, picture) for source, picture, _ in places])
        if self.pictures.remote:
            self._fetch_ahead(keys[0])
        return [self._sample(key, place, found) for key, place, found in zip(keys, places, read, strict=True)]

    def _fetch_ahead(self, key: Key) -> None:
        """Once a window: begins to fetch the shards of the next, where servers give only whole ones."""
        ahead = self.plan.ahead(key.epoch, key.start)
        if ahead != self._ahead:
            self._ahead = ahead
            shards = [self.pictures.indexes[source].shard(n) for source, numbers in ahead for n in numbers]
            self.pictures.reader.remote.fetch_ahead(shards)

    def _places(self, epoch: int, positions: Sequence[int]) -> list[tuple[int, int, int]]:
        """Positions -> (source, picture, number of its text)."""
        sources, units = self.plan.resolve(epoch, np.array(positions))
        places = []
        for source, unit, position in zip(sources.tolist(), units, positions, strict=True):
            index = self.pictures.indexes[source]
            if self.captions == "all":
                picture, text = index.picture_of(unit)
            else:
                picture = unit
                text = draw(int(index.text_counts(picture)), self.plan.seed, epoch, position, "text")
            places.append((source, int(picture), int(text)))
        return places

    def _sample(self, key: Key, place: tuple[int, int, int], found: tuple[bytes, bytes, bool]) -> Sample:
        """The pair of this position or, where it does not decode, of the next position of the same global batch."""
        failed: list[str] = []
        for step in range(key.stop - key.start):
            if step:
                next_one = key.start + (key.position - key.start + step) % (key.stop - key.start)
                (place,) = self._places(key.epoch, [next_one])
                (found,) = self.pictures.read([place[:2]])
            source, picture, number = place
            try:
                image, text = self._view(found[0], key), texts_of(*found[1:])[number]
            except (ValueError, IndexError) as error:  # an ImageError is a ValueError with a reason
                reason = getattr(error, "reason", "its text is not the one indexed")
                failed.append(f"{self.pictures.name(source, picture)} ({reason})")
                continue
            index = self.pictures.indexes[source]
            image_id = int(self.pictures.id_starts[source]) + picture
            return Sample(image, [text], [], index.key(picture), image_id, source, key.epoch, key.stop, tuple(failed))
        raise ValueError(
            f"no pair of the global batch at position {key.start} of epoch {key.epoch} decodes: {failed[:5]} ..."
        )

    def _view(self, data: bytes, key: Key) -> np.ndarray:
        if self.config is None:
            return resize_square(decode(data), self.size)
        return training_view(data, self.config, generator(self.plan.seed, key.epoch, key.position, "augment"))


class EvaluationPictures(Dataset):
    """Every picture once, as it is (resized), with its first text or all; all texts as references."""

    def __init__(self, index: Index, captions: str, size: int, cache_bytes: int | None = None) -> None:
        self.pictures, self.captions, self.size = _Pictures([index], cache_bytes), captions, size

    def __len__(self) -> int:
        return len(self.pictures.indexes[0].pictures)

    def __getitem__(self, picture: int) -> Sample:
        return self.__getitems__([picture])[0]

    def __getitems__(self, pictures: Sequence[int]) -> list[Sample]:
        samples = []
        for picture, (data, text, is_json) in zip(
            pictures, self.pictures.read([(0, p) for p in pictures]), strict=True
        ):
            try:
                image, texts = resize_square(decode(data), self.size), texts_of(text, is_json)
            except ValueError as error:  # to leave it out would change what is measured
                raise ValueError(
                    f"{self.pictures.name(0, picture)}: {error}; index its shard anew with `blip data index --verify`"
                ) from error
            shown = texts[:1] if self.captions == "first" else texts
            key = self.pictures.indexes[0].key(picture)
            samples.append(Sample(image, shown, texts, key, picture, 0, 0, pictures[-1] + 1))
        return samples

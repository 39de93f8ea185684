"""Examples for the report, chosen while records go by: pictures at random, texts beside the threshold, mistakes of the filter."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from blip.datamodules.images import decode
from blip.datamodules.index import Index
from blip.datamodules.shapes_truth import TRUE
from blip.datamodules.shards import Reader, Span

GALLERY, BESIDE, MISTAKES = 24, 4, 8  # examples: in all; of each label just kept and just dropped; of each kind
LINES = 6  # texts of one picture
SIDE, QUALITY = 256, 78  # pixels of the longer side, JPEG
TINY = 128  # pictures below are shown pixel by pixel


@dataclass(frozen=True)
class Line:
    """One text of an example; `kind` of its truth, None where that is unknown."""

    label: str
    text: str
    kept: bool
    scores: dict[str, float]
    kind: str | None


@dataclass(frozen=True)
class Example:
    """A picture with texts; among many those of the least rank are shown."""

    rank: float
    shard: str
    record: int
    key: str
    lines: list[Line]


@dataclass
class Rows:
    """The records of one shard, column by column [R]: `judged` are the texts that the threshold decided."""

    shard: str
    record: NDArray[np.int64]
    key: list[str]
    label: list[str]
    text: list[str]
    kept: NDArray[np.bool_]
    judged: NDArray[np.bool_]
    deciding: NDArray[np.float32]
    scores: dict[str, NDArray[np.float32]]
    kind: list[str | None]

    def line(self, row: int) -> Line:
        scores = {name: float(values[row]) for name, values in self.scores.items()}
        return Line(self.label[row], self.text[row], bool(self.kept[row]), scores, self.kind[row])

    def example(self, rank: float, rows: Iterable[int]) -> Example:
        first, *others = rows
        lines = [self.line(row) for row in (first, *others[: LINES - 1])]
        return Example(rank, self.shard, int(self.record[first]), self.key[first], lines)


@dataclass
class Examples:
    """gallery: pictures at random, those first that have both a text of their own and a synthetic one
    kept, dropped: label -> the texts of the lowest score that are kept, of the highest that are dropped
    noise: noise that is kept, highest score first; lost: true texts that are dropped, lowest score first
    """

    gallery: list[Example] = field(default_factory=list)
    kept: dict[str, list[Example]] = field(default_factory=dict)
    dropped: dict[str, list[Example]] = field(default_factory=dict)
    noise: list[Example] = field(default_factory=list)
    lost: list[Example] = field(default_factory=list)

    def add(self, rows: Rows, rng: random.Random) -> None:
        """Looks through the records of one shard; `rng` draws the gallery."""
        self._add_to_gallery(rows, rng)
        label = np.array(rows.label, object)
        for name in sorted(set(rows.label)):
            of_label = rows.judged & (label == name)
            _add(self.kept.setdefault(name, []), rows, of_label & rows.kept, rows.deciding, BESIDE)
            _add(self.dropped.setdefault(name, []), rows, of_label & ~rows.kept, -rows.deciding, BESIDE)
        true = np.array([kind == TRUE for kind in rows.kind], bool)
        noise = np.array([kind not in (TRUE, None) for kind in rows.kind], bool)
        _add(self.noise, rows, rows.judged & noise & rows.kept, -rows.deciding, MISTAKES)
        _add(self.lost, rows, rows.judged & true & ~rows.kept, rows.deciding, MISTAKES)

    def _add_to_gallery(self, rows: Rows, rng: random.Random) -> None:
        _, starts = np.unique(rows.record, return_index=True)
        bounds = [*starts.tolist(), len(rows.record)]
        for start, end in pairwise(bounds):
            one_kind = len({label.split()[0] for label in rows.label[start:end]}) == 1
            rank = rng.random() + one_kind
            if len(self.gallery) < GALLERY or rank < self.gallery[-1].rank:
                _keep(self.gallery, rows.example(rank, range(start, end)), GALLERY)

    def all(self) -> list[Example]:
        beside = [example for found in (*self.kept.values(), *self.dropped.values()) for example in found]
        return [*self.gallery, *beside, *self.noise, *self.lost]


def _add(found: list[Example], rows: Rows, mask: NDArray[np.bool_], rank: NDArray[np.float32], count: int) -> None:
    candidates = np.flatnonzero(mask)
    for row in candidates[np.argsort(rank[candidates], kind="stable")[:count]].tolist():
        _keep(found, rows.example(float(rank[row]), [row]), count)


def _keep(found: list[Example], example: Example, count: int) -> None:
    """Puts it in its place among the `count` of the least rank; of equal ones the earlier stays."""
    found.append(example)
    found.sort(key=lambda each: each.rank)
    del found[count:]


def pictures(index: Index, examples: Iterable[Example]) -> dict[tuple[str, int], tuple[str, bool]]:
    """(shard, record) -> (the picture as a small JPEG in a data URI, whether it is tiny), of those that can be read.

    A shard that cannot be read is not asked again. ValueError or OSError where none can.
    """
    numbers = {index.name(shard): shard for shard in range(len(index.names))}
    reader = Reader()
    found: dict[tuple[str, int], tuple[str, bool]] = {}
    failed: dict[str, Exception] = {}
    for example in examples:
        place = (example.shard, example.record)
        if place in found or example.shard in failed:
            continue
        try:
            if example.shard not in numbers:
                raise ValueError(f"{example.shard}: no shard of this name is among those given")
            shard, parts, _ = index.places(int(index.shard_starts[numbers[example.shard]]) + example.record)
            ((data,),) = reader.read([Span(index.shard(shard), parts[0])])
            found[place] = _small(decode(data))
        except (OSError, ValueError, IndexError) as error:
            failed[example.shard] = error
    if failed and not found:
        raise ValueError(str(next(iter(failed.values()))))
    return found


def _small(image: NDArray[Any]) -> tuple[str, bool]:
    longer = max(image.shape[:2])
    if longer > SIDE:
        height, width = (max(1, round(n * SIDE / longer)) for n in image.shape[:2])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=QUALITY, colorspace="RGB")
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}", longer < TINY

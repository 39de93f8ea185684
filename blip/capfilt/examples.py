"""Examples for the report, chosen while records go by: pictures at random, texts beside the threshold, mistakes of the filter."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
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
    """The records of one shard [R]: `table` has their keys and texts, `label` is a number among `labels`; `judged` are the texts that
    the threshold decided, by the score `deciding`; `kinds` of their truth, None where nothing is known of any."""

    shard: str
    table: pa.Table
    record: NDArray[np.int64]
    label: NDArray[np.int32]
    labels: list[str]
    kept: NDArray[np.bool_]
    judged: NDArray[np.bool_]
    deciding: NDArray[np.float32]
    scores: dict[str, NDArray[np.float32]]
    kinds: list[str | None] | None

    def line(self, row: int) -> Line:
        scores = {name: float(values[row]) for name, values in self.scores.items()}
        kind = None if self.kinds is None else self.kinds[row]
        return Line(self.labels[self.label[row]], self.table["text"][row].as_py(), bool(self.kept[row]), scores, kind)

    def example(self, rank: float, rows: Sequence[int]) -> Example:
        lines = [self.line(row) for row in rows[:LINES]]
        return Example(rank, self.shard, int(self.record[rows[0]]), self.table["key"][rows[0]].as_py(), lines)


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

    def add(self, rows: Rows, rng: np.random.Generator) -> None:
        """Looks through the records of one shard; `rng` draws the gallery."""
        self._add_to_gallery(rows, rng)
        for code, name in enumerate(rows.labels):
            of_label = rows.judged & (rows.label == code)
            _add(self.kept.setdefault(name, []), rows, of_label & rows.kept, rows.deciding, BESIDE)
            _add(self.dropped.setdefault(name, []), rows, of_label & ~rows.kept, -rows.deciding, BESIDE)
        if rows.kinds is not None:
            true = np.array([kind == TRUE for kind in rows.kinds], bool)
            noise = np.array([kind not in (TRUE, None) for kind in rows.kinds], bool)
            _add(self.noise, rows, rows.judged & noise & rows.kept, -rows.deciding, MISTAKES)
            _add(self.lost, rows, rows.judged & true & ~rows.kept, rows.deciding, MISTAKES)

    def _add_to_gallery(self, rows: Rows, rng: np.random.Generator) -> None:
        if not len(rows.record):
            return
        _, starts = np.unique(rows.record, return_index=True)
        written = np.array([label.startswith("synthetic") for label in rows.labels])[rows.label]
        both = np.logical_or.reduceat(written, starts) & np.logical_or.reduceat(~written, starts)
        rank = rng.random(len(starts)) + ~both
        ends = [*starts[1:].tolist(), len(rows.record)]
        for at in np.argsort(rank, kind="stable")[:GALLERY].tolist():
            if len(self.gallery) == GALLERY and rank[at] >= self.gallery[-1].rank:
                break
            _keep(self.gallery, rows.example(float(rank[at]), range(int(starts[at]), ends[at])), GALLERY)

    def all(self) -> list[Example]:
        beside = [example for found in (*self.kept.values(), *self.dropped.values()) for example in found]
        return [*self.gallery, *beside, *self.noise, *self.lost]


def _add(found: list[Example], rows: Rows, mask: NDArray[np.bool_], rank: NDArray[np.float32], count: int) -> None:
    candidates = np.flatnonzero(mask)
    for row in candidates[np.argsort(rank[candidates], kind="stable")[:count]].tolist():
        if len(found) == count and rank[row] >= found[-1].rank:
            break
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

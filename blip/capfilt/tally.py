"""What a view makes of records, counted shard by shard: how many texts it keeps and why not the others, how they score, what their
words are, and how that agrees with the truth where it is known.

Memory does not grow with the number of shards, but for the truth of the embedded world (some 150 bytes a text); words are counted
over a random sample of at most TEXTS texts.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blip.capfilt import records
from blip.capfilt.examples import Examples, Rows
from blip.capfilt.manifest import NAMED
from blip.capfilt.words import Texts
from blip.datamodules.index import Index
from blip.datamodules.records import NOTHING
from blip.datamodules.shapes_truth import Compared, compare, described, recorded
from blip.datamodules.shards import Reader, Span
from blip.datamodules.views import View, combined_scores, kept_rows, record_file

BINS = 100  # of a chart
FINE = 4  # digits of the thresholds that are counted, below the first digit of the scores' range
TEXTS = 500_000  # whose words are counted
COMBINED = "combined"  # the score of a view that goes by several
BELOW, EMPTY, UNSCORED, NOT_TAKEN = "below the threshold", "empty", "not scored", "source not taken"
REASONS = (BELOW, EMPTY, UNSCORED, NOT_TAKEN)


@dataclass
class Label:
    """Texts of one source, of synthetic ones those of one captioner.

    dropped: reason -> texts; scores: column -> [2, BINS], dropped (but empty ones) and kept
    reaching: [K], texts that each of `Tally.thresholds` would keep
    before, after: words of a sample of all, and of those kept
    deciding, decided, kinds, picture: of the texts whose truth is known the score that the view goes by (of an empty one -inf, as
    no threshold keeps it), whether it keeps them, their kind, a number for each picture;
    attributes: of those [dropped, kept][agreeing, slots], as `shapes_truth.Compared` counts them
    """

    texts: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    scores: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    reaching: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    before: Texts = field(default_factory=Texts)
    after: Texts = field(default_factory=Texts)
    deciding: list[float] = field(default_factory=list)
    decided: list[bool] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    picture: list[int] = field(default_factory=list)
    attributes: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, 2), np.int64))

    def __add__(self, other: Label) -> Label:
        """Both together."""
        columns = {**self.scores, **other.scores}
        none = np.zeros((2, BINS), np.int64)
        return Label(
            self.texts + other.texts,
            self.kept + other.kept,
            self.dropped + other.dropped,
            {name: self.scores.get(name, none) + other.scores.get(name, none) for name in columns},
            self.reaching + other.reaching,
            self.before | other.before,
            self.after | other.after,
            self.deciding + other.deciding,
            self.decided + other.decided,
            self.kinds + other.kinds,
            self.picture + other.picture,
            self.attributes + other.attributes,
        )


@dataclass
class Tally:
    """All that the report tells.

    labels: `web`, `human`, `synthetic CAPTIONER`; ranges: column of a score -> ends of its chart; decides: the score that the view
    goes by, a column or COMBINED, nothing where it keeps every text; thresholds: [K] of it that are counted, ascending; least_kept: the
    least of it that is kept; sampled: share of the texts whose words are counted; bare: pictures that keep no text; seconds: of all
    workers
    """

    ranges: dict[str, tuple[float, float]]
    decides: str
    thresholds: NDArray[np.float32]
    sampled: float
    labels: dict[str, Label] = field(default_factory=dict)
    examples: Examples = field(default_factory=Examples)
    shards: int = 0
    pictures: int = 0
    bare: int = 0
    seconds: float = 0.0
    least_kept: float = math.inf
    broken: Counter[str] = field(default_factory=Counter)
    broken_names: dict[str, list[str]] = field(default_factory=dict)


def tally(view: View, index: Index | None, seed: int) -> Tally:
    """Counts all records of a view. `index`: of their shards, for the truth; None where they cannot be read.

    ValueError where there are no records, or they lack a score of the view.
    """
    folder = view.folders[0]
    paths = records.files(folder)
    if not paths:
        raise ValueError(f"{folder}: no records there; give the folder of a filter pass (stage=filter)")
    names = records.names(folder)
    ranges, rows = _ranges(view, names)
    kept = kept_rows(view, names, {"key", "captioner", *ranges})
    decides = view.scores[0] if view.scores else ""
    if len(view.folders) * len(view.scores) > 1:
        decides = COMBINED
        ends = [ranges.get(name, (0.0, 1.0)) for name in view.scores]  # one that is missing is an error of `kept_rows`
        ranges[COMBINED] = min(least for least, _ in ends), max(greatest for _, greatest in ends)
    thresholds = _thresholds(ranges[decides], view.threshold) if decides in ranges else np.zeros(0, np.float32)
    found = Tally(ranges, decides, thresholds, min(1.0, TEXTS / max(rows, 1)))
    truths = Truths(index)
    if index is not None:
        found.broken.update(index.report.skipped)
        found.broken_names.update({reason: names[:NAMED] for reason, names in index.report.skipped_names.items()})
    for path, name, (table, times) in zip(paths, names, kept, strict=True):
        _add_shard(found, name, records.about(path))
        _add_texts(found, view, name, table, times > 0, truths.of(name, table), _draws(seed, name))
    if truths.found and truths.lost:
        reason = "texts whose truth is not known, for their shard can no longer be read"
        found.broken[reason] = sum(truths.lost.values())
        found.broken_names[reason] = [*truths.lost][:NAMED]
    return found


def _draws(seed: int, name: str) -> np.random.Generator:
    """Of one shard, whatever was before it."""
    return np.random.default_rng(random.Random(f"{seed}/{name}").getrandbits(64))


def _ranges(view: View, names: Sequence[str]) -> tuple[dict[str, tuple[float, float]], int]:
    """(column of a score -> (least, greatest) that its charts show, number of rows), from the ends of the files alone.

    Of all folders but the first those scores that the view goes by.
    """
    found: dict[str, tuple[float, float]] = {}
    rows = 0
    for place, folder in enumerate(view.folders):
        for about in (pq.read_metadata(record_file(folder, name)) for name in names):
            rows += about.num_rows if place == 0 else 0
            for group in map(about.row_group, range(about.num_row_groups)):
                for column in map(group.column, range(group.num_columns)):
                    score, told = column.path_in_schema, column.statistics
                    shown = score != "log_prob" if place == 0 else score in view.scores
                    if column.physical_type == "FLOAT" and shown:
                        ends = (told.min, told.max) if told is not None and told.has_min_max else (math.inf, -math.inf)
                        least, greatest = found.get(score, (math.inf, -math.inf))
                        found[score] = min(least, ends[0]), max(greatest, ends[1])
    return {score: _rounded(score, *ends) for score, ends in found.items()}, rows


def _rounded(name: str, least: float, greatest: float) -> tuple[float, float]:
    if name.startswith("itm") and least >= 0 and greatest <= 1:  # a probability
        return 0.0, 1.0
    if not math.isfinite(least) or not math.isfinite(greatest):
        return 0.0, 1.0
    return math.floor(20 * least) / 20, math.floor(20 * greatest) / 20 + 0.05


def _thresholds(ends: tuple[float, float], in_use: float | None) -> NDArray[np.float32]:
    """Round numbers between the ends, 10,000 to 100,000 evenly and finer ones beside the ends, where scores crowd; and the one in use.

    As a view compares them, so that what reaches each is counted exactly.
    """
    low, high = ends
    digits = FINE - math.floor(math.log10(high - low))
    even = np.arange(math.ceil(low * 10**digits), math.floor(high * 10**digits) + 1) / 10**digits
    beside = (np.arange(1, 1000)[:, None] / 10.0 ** np.arange(digits + 1, digits + 4)).ravel()
    used = [] if in_use is None else [in_use]
    return np.unique(np.concatenate([even, low + beside, high - beside, used]).astype(np.float32))


class Truths:
    """Looks up what is true of texts, shard by shard, as long as the shards hold scenes of the embedded world."""

    def __init__(self, index: Index | None) -> None:
        self.index, self.reader = index, Reader()
        self.found = False  # whether any shard held scenes
        self.lost: dict[str, int] = {}  # texts of the shards that could not be read
        self.numbers = {} if index is None else {index.name(shard): shard for shard in range(len(index.names))}

    def of(self, name: str, table: pa.Table) -> list[Compared | None] | None:
        """Each text of a shard beside its scene; None where there is no scene."""
        if self.index is None or name not in self.numbers or not len(table):
            return None
        shard = self.numbers[name]
        first = int(self.index.shard_starts[shard])
        wanted = np.unique(table["record"].to_numpy()).tolist()
        told: dict[int, Mapping[str, Any]] = {}
        for some in (wanted[:1], wanted[1:]):  # the first tells whether there is a scene at all
            places = [self.index.places(first + record) for record in some]
            try:
                read = self.reader.read([Span(self.index.shard(shard), parts[-1]) for _, parts, _ in places])
            except (OSError, ValueError):
                self.lost[name] = len(table)
                return None
            for record, (text,), (_, _, is_json) in zip(some, read, places, strict=True):
                told[record] = _object(text) if is_json else {}
            if described(told[wanted[0]]) is None:
                self.index = None  # of another world, and so are the other shards
                return None
        self.found = True
        rows = zip(*(table[column].to_pylist() for column in ("record", "source", "text")), strict=True)
        return [_compared(told[record], source, text) for record, source, text in rows]


def _object(text: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _compared(record: Mapping[str, Any], source: str, text: str) -> Compared | None:
    """A text beside its scene: the web's own are of the kind that is recorded, with what is wrong of a wrong attribute."""
    scene = described(record)
    if scene is None:
        return None
    compared, kind = compare(scene, text), recorded(record, source)
    return compared._replace(kind=f"attribute: {compared.kind}" if kind == "attribute" else kind or compared.kind)


def _add_shard(found: Tally, name: str, about: Mapping[str, Any]) -> None:
    found.shards += 1
    found.pictures += about["pictures"]
    found.seconds += about["seconds"]
    for key, reason in about["broken"]:
        found.broken[reason] += 1
        names = found.broken_names.setdefault(reason, [])
        if len(names) < NAMED:
            names.append(f"{name}: {key}")


def _add_texts(
    found: Tally,
    view: View,
    name: str,
    table: pa.Table,
    kept: NDArray[np.bool_],
    compared: list[Compared | None] | None,
    rng: np.random.Generator,
) -> None:
    """Adds the records of one shard. compared: each text beside its scene, None where nothing is known of any."""
    deciding = combined_scores(table, view)  # [R]
    dropped = _dropped(table, view, kept, deciding)
    label, names = _labels(table)
    columns = table.column_names  # where several folders have one of the same name, it is the first folder's
    scores = {
        column: deciding if column == COMBINED else table.column(columns.index(column)).to_numpy(zero_copy_only=False)
        for column in found.ranges
    }
    sampled = rng.random(len(table)) < found.sampled
    numbers = table["record"].to_numpy()
    found.bare += len(np.unique(numbers)) - len(np.unique(numbers[kept]))
    found.least_kept = min(found.least_kept, float(deciding[kept].min(initial=math.inf)))
    for code, who in enumerate(names):
        rows = label == code
        entry = found.labels.setdefault(who, Label())
        entry.texts += int(rows.sum())
        entry.kept += int((rows & kept).sum())
        entry.dropped += Counter({reason: int((rows & mask).sum()) for reason, mask in dropped.items()})
        for column, ends in found.ranges.items():
            counted = entry.scores.setdefault(column, np.zeros((2, BINS), np.int64))
            for part, mask in enumerate((rows & ~kept & ~dropped[EMPTY], rows & kept)):
                values = scores[column][mask]
                counted[part] += np.histogram(values[np.isfinite(values)], BINS, ends)[0]
        reaching = np.sort(deciding[rows & ~dropped[NOT_TAKEN] & ~dropped[EMPTY]])
        entry.reaching = entry.reaching + (len(reaching) - np.searchsorted(reaching, found.thresholds))
        for texts, mask in ((entry.before, rows & sampled), (entry.after, rows & sampled & kept)):
            texts.add(table["text"].filter(pa.array(mask)).to_pylist())
        if compared is not None:
            for row in np.flatnonzero(rows & ~dropped[NOT_TAKEN]).tolist():
                if (beside := compared[row]) is not None:
                    entry.deciding.append(-math.inf if dropped[EMPTY][row] else float(deciding[row]))
                    entry.decided.append(bool(kept[row]))
                    entry.kinds.append(beside.kind)
                    entry.picture.append(found.shards << 40 | int(numbers[row]))
                    entry.attributes[int(kept[row])] += beside.agreeing, beside.slots
    kinds = None if compared is None else [None if each is None else each.kind for each in compared]
    rows_of_shard = Rows(name, table, numbers, label, names, kept, kept | dropped[BELOW], deciding, scores, kinds)
    found.examples.add(rows_of_shard, rng)


def _labels(table: pa.Table) -> tuple[NDArray[np.int32], list[str]]:
    """(number of the label of each text [R], the labels)."""
    source, captioner = table["source"], table["captioner"]
    joined = pc.binary_join_element_wise(source, pc.fill_null(captioner, ""), " ")
    coded = pc.if_else(pc.is_null(captioner), source, joined).combine_chunks().dictionary_encode()
    return coded.indices.to_numpy(zero_copy_only=False), coded.dictionary.to_pylist()


def _dropped(
    table: pa.Table, view: View, kept: NDArray[np.bool_], deciding: NDArray[np.float32]
) -> dict[str, NDArray[np.bool_]]:
    """Reason -> the texts that are dropped for it, [R] each."""
    said = pc.binary_length(pc.utf8_trim(table["text"], characters=NOTHING)).to_numpy(zero_copy_only=False)
    taken = pc.is_in(table["source"], pa.array(view.sources)).to_numpy(zero_copy_only=False).astype(bool)
    left, found = ~kept, {}
    for reason, mask in ((NOT_TAKEN, ~taken), (EMPTY, said == 0), (UNSCORED, deciding == -math.inf), (BELOW, left)):
        found[reason] = left & mask
        left = left & ~mask
    return found

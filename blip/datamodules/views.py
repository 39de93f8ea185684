"""Which texts of a set of shards are kept: a decision over scores that are stored.

CapFilt's passes leave one Parquet file of records a shard: one row a text, the web's own and synthetic ones, with their scores
(`FOLDER/records/SHARD.parquet`, beside them `description.json`, which says of what input). A view is a rule over these: another
threshold needs no model, and nothing is deleted.

    decide(table, view) -> mask             which rows of records are kept
    kept_rows(view, names) -> (rows, times) shard by shard, also where the rule needs the rank of a score among all

Records are read by the names of their columns, shard by shard: memory holds one shard's rows, and where a share is kept one float32
a row. `view_index.py` joins what is kept into the stream's index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip.datamodules.records import NOTHING

SOURCES = WEB, SYNTHETIC, HUMAN = "web", "synthetic", "human"  # of a text
COMBINE: dict[str, Callable[..., np.ndarray]] = {
    "mean": np.mean,
    "unanimous": np.min,
}  # all scores reach a threshold where the least does
IDENTITY = ("record", "captioner", "number", "text")  # columns that say which text a row is


@dataclass(frozen=True)
class View:
    """A rule over stored scores.

    records: the folder of a filter pass, or several, of other filters over the same texts
    scores: columns of scores; one that several folders have counts once for each. None at all keeps every text
    combine: of several scores the `mean`, or `unanimous` (each must reach the threshold)
    threshold: kept is what has at least this score. 0.5 (default) of `itm` is the paper's argmax; LAION kept `itc` from 0.3 on
    share: in place of a threshold, the share of the texts to keep, those of the highest scores among all shards
    sources: whose texts: web, synthetic, human
    control: the control of Table 12: as many texts as the view keeps, but the shards' own, unfiltered, repeated evenly (as many pairs
        of the stream where each text is one, `captions: all`)
    """

    records: str | Path | Sequence[str | Path]
    scores: Sequence[str] = ("itm",)
    combine: str = "mean"
    threshold: float | None = None
    share: float | None = None
    sources: Sequence[str] = (WEB, SYNTHETIC)
    control: bool = False

    def __post_init__(self) -> None:
        for name in ("scores", "sources"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        if not self.folders or not self.sources or set(self.sources) - set(SOURCES):
            raise ValueError(f"a view needs the folder of its records and sources out of {SOURCES}, not {self.sources}")
        if self.combine not in COMBINE:
            raise ValueError(f"combine={self.combine!r}: of several scores the {' or '.join(COMBINE)}")
        if self.threshold is not None and self.share is not None:
            raise ValueError(
                f"threshold={self.threshold} and share={self.share}: a view has one of them, not both; set the other to null"
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: of the texts, above 0 and at most 1")
        if not self.scores and (self.threshold, self.share) != (None, None):
            raise ValueError("a view without scores keeps every text: it has neither threshold nor share")
        if self.scores and self.share is None and self.threshold is None:
            object.__setattr__(self, "threshold", 0.5)
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"threshold={self.threshold}: a number")

    @classmethod
    def of(cls, options: View | Mapping[str, Any]) -> View:
        """The view that a config describes. ValueError where it says what no view knows."""
        if isinstance(options, View):
            return options
        known = {field.name for field in fields(cls)}
        if unknown := set(options) - known:
            raise ValueError(f"view: unknown {sorted(unknown)}; it may say {sorted(known)}")
        if "records" not in options:
            raise ValueError("view: `records` is missing, the folder of a filter pass")
        return cls(**options)

    @property
    def folders(self) -> list[Path]:
        """The folders of its records."""
        return [Path(each) for each in ([self.records] if isinstance(self.records, str | Path) else self.records)]

    @property
    def rule(self) -> dict[str, Any]:
        """All that it says but where its records lie, as JSON has it."""
        told = {name: value for name, value in asdict(self).items() if name != "records"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}


# Deciding


def decide(table: pa.Table, view: View) -> np.ndarray:
    """Which rows are kept, [R] bool. table: columns source, text and the scores; a share is one of this table's texts.

    What the control of Table 12 takes in place of these rows is `kept_rows`' matter.
    """
    mask = _asked(table, view)
    mask[mask] = _highest(combined_scores(table, view)[mask], view)
    return mask


def _asked(table: pa.Table, view: View) -> np.ndarray:
    """Rows of the view's sources that say something, [R] bool: a text of marks alone is no caption of an index either."""
    says = pc.greater(pc.binary_length(pc.utf8_trim(table["text"], characters=NOTHING)), 0)
    return _bools(pc.and_(says, pc.is_in(table["source"], pa.array(view.sources))))


def _own(table: pa.Table) -> np.ndarray:
    """Rows that are texts of the shards themselves, [R] bool."""
    return _bools(pc.not_equal(table["source"], SYNTHETIC))


def _bools(found: pa.ChunkedArray) -> np.ndarray:
    return found.to_numpy(zero_copy_only=False).astype(bool) if len(found) else np.zeros(0, bool)


def combined_scores(table: pa.Table, view: View) -> np.ndarray:
    """The score of each row, [R] float32; what has none comes last."""
    if missing := set(view.scores) - set(table.column_names):
        raise ValueError(f"no score {sorted(missing)} in the records; their columns are {table.column_names}")
    if not view.scores:
        return np.zeros(len(table), np.float32)
    columns = [column for name, column in zip(table.column_names, table.columns, strict=True) if name in view.scores]
    values = np.stack([column.to_numpy(zero_copy_only=False).astype(np.float32) for column in columns])
    return np.nan_to_num(COMBINE[view.combine](values, axis=0), nan=-np.inf, posinf=np.inf, neginf=-np.inf)


def _highest(scores: np.ndarray, view: View) -> np.ndarray:
    """Those that the rule keeps, [N] bool. Of equal scores at the edge of a share as many as fit are kept, evenly."""
    if view.share is None:
        return scores >= (-np.inf if view.threshold is None else view.threshold)
    wanted = min(round(view.share * len(scores)), int((scores > -np.inf).sum()))  # what has no score is never kept
    if wanted == 0:
        return np.zeros(len(scores), bool)
    edge = np.partition(scores, len(scores) - wanted)[len(scores) - wanted]
    kept = scores > edge
    equal = np.flatnonzero(scores == edge)
    kept[equal] = evenly(wanted - int(kept.sum()), len(equal))
    return kept


def evenly(number: int, places: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    """How many of `number` each of so many places gets, as evenly as whole numbers allow; those of places start to stop."""
    edges = np.arange(start, (places if stop is None else stop) + 1) * number // max(places, 1)
    return np.diff(edges)


# Reading


def kept_rows(view: View, names: Sequence[str], columns: Iterable[str] = ()) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """For each of these shards its records and how often the view has each of them, [R] int64: once or never.

    A table has the columns record, source, text, those of the view's scores and the `columns` asked for. In the control of Table
    12 a row may come several times.
    """
    if view.share is None and not view.control:
        for name in names:
            table = read_records(view, name, columns)
            yield table, decide(table, view).astype(np.int64)
        return
    # the rank of a score among all, and what all keep, are known once all were seen
    scores, own = [], 0
    for name in names:
        table = read_records(view, name)
        scores.append(combined_scores(table, view)[_asked(table, view)])
        own += int(_own(table).sum())
    kept = _highest(np.concatenate(scores), view)
    del scores
    wanted, at = int(kept.sum()), 0
    for name in names:
        table = read_records(view, name, columns)
        rows = _own(table) if view.control else _asked(table, view)
        stop, times = at + int(rows.sum()), np.zeros(len(table), np.int64)
        times[rows] = evenly(wanted, own, at, stop) if view.control else kept[at:stop]
        at = stop
        yield table, times


def record_file(folder: Path, name: str) -> Path:
    """The Parquet file of a shard in the folder of a pass."""
    return folder / "records" / f"{name}.parquet"


def read_records(view: View, name: str, columns: Iterable[str] = ()) -> pa.Table:
    """The records of one shard: record, source, text, the view's scores, and `columns`. Folders are joined row by row.

    Raises ValueError where a file is damaged, lacks a score, or has other rows than the first folder's.
    """
    first: pa.Table | None = None
    found: set[str] = set()
    several = len(view.folders) > 1
    for folder in view.folders:
        path = record_file(folder, name)
        needed = {"record", "source", "text", *(IDENTITY if several else ())}
        wanted = {*needed, *columns, *view.scores}
        try:
            with pq.ParquetFile(path) as file:
                there = file.schema_arrow.names
                table = file.read([column for column in there if column in wanted])
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: not a whole Parquet file ({error}); delete it and run its pass again") from error
        if missing := needed.difference(there):
            raise ValueError(
                f"{path}: no records of a pass, which have a column {sorted(missing)}; name the folder of one"
            )
        found.update(there)
        if first is None:
            first = table
            continue
        if any(not first[column].equals(table[column]) for column in IDENTITY):
            raise ValueError(
                f"{path}: other texts than those of {record_file(view.folders[0], name)}; filters are "
                "combined over the same texts"
            )
        for score in set(view.scores) & set(table.column_names):
            first = first.append_column(score, table[score])
    assert first is not None
    if missing := set(view.scores) - found:
        raise ValueError(
            f"{record_file(view.folders[0], name)}: no score {sorted(missing)}; its columns are {sorted(found)}. Scores are "
            "written by a filter pass (stage=filter)"
        )
    return first

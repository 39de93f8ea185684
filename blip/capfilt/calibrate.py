"""A threshold for a filter from texts that somebody labelled: what each threshold keeps, how well the score tells, a picture of both.

    sample(view, count, seed) -> rows       texts to label, from all regions of the score; `write_sample` makes a file of them
    labelled(view, labels) -> Cases         the labels of a file, put to the rows of the records
    known(view, index) -> Cases             the same of the embedded world, where truth is recorded
    calibrate(cases, ...) -> {name: value}  AUC, the threshold of the best F1, those for a wanted precision or recall
    draw(cases, path, points)               precision and recall over the threshold

A positive is a text that fits its picture and is kept: precision is the share of the kept texts that fit, recall the share of the
fitting texts that are kept. (The report of a pass tells of noise that is dropped; both stand in a point of `calibrate`.) What is best
for these labels is a little too good for others: hold other labels against it where they are few.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blip.capfilt import records
from blip.datamodules.index import Index
from blip.datamodules.shapes_truth import TRUE
from blip.datamodules.views import View, combined_scores, decide, read_records, record_file
from blip.files import whole, write_text
from blip.metrics.rates import Rate, auc, f1, share

COLUMNS = ("shard", "key", "label")
TO_LABEL = ("shard", "key", "captioner", "number", "source", "score", "text", "label")
SHOWN = 1000  # characters of a text to label
WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
BLUE, RED = "#1b6ca8", "#c8553d"

# (key, captioner or nothing, number of the text) -> whether it fits, None where nobody has said so yet; for each shard
Labels = Mapping[str, Mapping[tuple[str, str, int], bool | None]]


class Cases(NamedTuple):
    """Labelled texts: score [N] float32, fits [N] bool, picture [N] int64 (which one a text is of).

    unmatched: labels that met no text; unlabelled: texts whose label is still empty.
    """

    score: np.ndarray
    fits: np.ndarray
    picture: np.ndarray
    unmatched: int = 0
    unlabelled: int = 0


class Curve(NamedTuple):
    """What every threshold keeps, the highest first: threshold, kept texts and fitting ones among them, each [K]."""

    threshold: np.ndarray
    kept: np.ndarray
    right: np.ndarray


def read_labels(path: Path) -> Labels:
    """Labels out of a CSV file (.csv) or JSON lines: shard, key, label, and number (default 0) and captioner of a synthetic text.

    Columns are those of the records, others are passed over: a query over the records with one column more is such a file, or what
    `write_sample` writes. A label may still be empty. ValueError with the line where one cannot be read or says something else of a
    text than a line before, or where no label is given at all.
    """
    found: dict[str, dict[tuple[str, str, int], bool | None]] = {}
    done = 0
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows: Iterable[Any] = csv.DictReader(file) if path.suffix.lower() == ".csv" else map(json.loads, file)
        try:
            for row in rows:
                shard, text, label = _label(row)
                before = found.setdefault(shard, {}).get(text)
                if None not in (before, label) and before != label:
                    raise ValueError(f"the text {text} of {shard} is labelled otherwise before")
                found[shard][text] = before if label is None else label
                done += 1
        except (ValueError, AttributeError, TypeError, csv.Error) as error:
            raise ValueError(f"{path}: row {done + 1}: {error}") from error
    empty = _unlabelled(found)
    if empty == sum(map(len, found.values())):
        raise ValueError(f"{path}: no labels there{f': {empty} texts, whose label is empty' if empty else ''}")
    return found


def _unlabelled(labels: Labels) -> int:
    return sum(label is None for of_shard in labels.values() for label in of_shard.values())


def _label(row: Mapping[str, Any]) -> tuple[str, tuple[str, str, int], bool | None]:
    """(shard, text, whether it fits) of a row."""
    if missing := [name for name in COLUMNS if row.get(name) is None or (name != "label" and row[name] == "")]:
        needed = f"needed are the columns {', '.join(COLUMNS)}, and number and captioner of texts that have them"
        raise ValueError(f"no {', '.join(missing)}; {needed}")
    said = str(row["label"]).strip().lower()
    label = WORDS.get(said)
    if said and label is None:
        raise ValueError(f"label {row['label']!r} is none of {', '.join(WORDS)}")
    return str(row["shard"]), (str(row["key"]), str(row.get("captioner") or ""), int(row.get("number") or 0)), label


def labelled(view: View, labels: Labels) -> Cases:
    """The scores of the labelled texts of a view's sources. ValueError where a shard has no records, or no label meets a text."""
    parts, met = [], 0
    for number, (shard, wanted) in enumerate(labels.items()):
        if not record_file(view.folders[0], shard).is_file():
            there = len(records.files(view.folders[0]))
            raise ValueError(
                f"{view.folders[0]}: no records of the shard {shard!r} that labels name ({there} other shards there)"
            )
        table = read_records(view, shard, ["key", "captioner", "number"])
        texts = zip(*(table[name].to_pylist() for name in ("key", "captioner", "number")), strict=True)
        found = [wanted.get((key, captioner or "", of)) for key, captioner, of in texts]
        met += sum(label is not None for label in found)
        parts.append(_cases(view, table, number, found))
    if not met:
        raise ValueError(
            f"{view.folders[0]}: no label names a text of the records (by shard, key, captioner and number)"
        )
    empty = _unlabelled(labels)
    return _joined(parts)._replace(unmatched=sum(map(len, labels.values())) - empty - met, unlabelled=empty)


def known(view: View, index: Index) -> Cases:
    """All texts of a view's sources with the embedded world's own truth. ValueError where the shards tell of none."""
    from blip.capfilt.tally import Truths

    truths, parts = Truths(index), []
    for number, name in enumerate(records.names(view.folders[0])):
        table = read_records(view, name)
        found = truths.of(name, table) or [None] * len(table)
        told = [None if each is None else each.kind == TRUE for each in found]
        parts.append(_cases(view, table, number, told))
    cases = _joined(parts)
    if not len(cases.score):
        raise ValueError(
            f"{view.folders[0]}: its shards are none of the embedded world, whose truth is recorded; give labels"
        )
    return cases


def scored_texts(view: View, shard: str, columns: Iterable[str] = ()) -> tuple[Any, np.ndarray, np.ndarray]:
    """(records of a shard [R], their scores [R] float32, the rows that some threshold keeps [N]): they say something and have a score."""
    table = read_records(view, shard, columns)
    lowest = replace(view, threshold=float(np.finfo(np.float32).min), share=None)
    return table, combined_scores(table, view), np.flatnonzero(decide(table, lowest))


def _cases(view: View, table: Any, shard: int, labels: Sequence[bool | None]) -> Cases:
    """The rows of a shard that have a label and a score and are of the view's sources."""
    asked = np.array([source in view.sources for source in table["source"].to_pylist()], bool)
    score = combined_scores(table, view)
    rows = asked & np.isfinite(score) & np.array([label is not None for label in labels], bool)
    fits = np.array([bool(label) for label in labels], bool)
    return Cases(score[rows], fits[rows], (shard << 40) + table["record"].to_numpy()[rows])


def _joined(parts: Sequence[Cases]) -> Cases:
    if not parts:
        return Cases(np.zeros(0, np.float32), np.zeros(0, bool), np.zeros(0, np.int64))
    score, fits, picture = (np.concatenate([getattr(part, name) for part in parts]) for name in Cases._fields[:3])
    return Cases(score, fits, picture)


# Texts to label


def sample(view: View, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """So many texts of a view's sources, shuffled, one at random of each of `count` parts of equal size by rank of the score.

    So every region of the score is judged alike. All texts where they are fewer. Rows have the columns of TO_LABEL, a text is cut
    after SHOWN characters. Memory holds the scores and their order, 16 bytes a text, and the records of one shard.
    ValueError where no text has a score.
    """
    if count < 1:
        raise ValueError(f"a sample of {count} texts: at least one")
    shards, rng = records.names(view.folders[0]), np.random.default_rng(seed)
    scores = [score[rows] for _, score, rows in (scored_texts(view, shard) for shard in shards)]
    starts = np.cumsum([0, *map(len, scores)])
    order = np.argsort(np.concatenate(scores), kind="stable") if scores else np.zeros(0, np.int64)
    if not len(order):
        raise ValueError(f"{view.folders[0]}: no text of {' or '.join(view.sources)} with a score there")
    edges = np.arange(count + 1) * len(order) // count if count < len(order) else np.arange(len(order) + 1)
    places = np.sort(order[rng.integers(edges[:-1], edges[1:])])  # among all texts, shard after shard
    found: list[dict[str, Any]] = []
    for shard, first, end in zip(shards, starts[:-1], starts[1:], strict=True):
        wanted = places[(first <= places) & (places < end)] - first
        if len(wanted):
            table, score, rows = scored_texts(view, shard, ("key", "captioner", "number"))
            found += [_to_label(shard, row, score[place]) for place, row in _rows(table, rows[wanted])]
    return [found[place] for place in rng.permutation(len(found))]


def _rows(table: Any, places: np.ndarray) -> Iterable[tuple[int, Mapping[str, Any]]]:
    return zip(places.tolist(), table.take(places).to_pylist(), strict=True)


def _to_label(shard: str, row: Mapping[str, Any], score: np.float32) -> dict[str, Any]:
    text = row["text"] if len(row["text"]) <= SHOWN else f"{row['text'][:SHOWN]}…"
    text = f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text  # else a spreadsheet computes it
    told = {"shard": shard, "key": row["key"], "captioner": row["captioner"] or "", "number": row["number"]}
    return told | {"source": row["source"], "score": str(score), "text": text, "label": ""}


def write_sample(view: View, count: int, path: Path, seed: int = 0) -> int:
    """Writes a `sample` as CSV, whole or not at all; returns how many texts. ValueError where the file is there: it may hold labels."""
    if path.suffix.lower() != ".csv":
        raise ValueError(f"{path}: texts to label are a .csv file")
    if path.exists():
        raise ValueError(f"{path} is there already and may hold labels; name another file")
    rows, out = sample(view, count, seed), io.StringIO(newline="")
    writer = csv.DictWriter(out, TO_LABEL, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, out.getvalue())
    return len(rows)


# Thresholds


def curve(cases: Cases) -> Curve:
    """What a threshold at each of the scores that occur keeps: texts of at least that score."""
    order = np.argsort(-cases.score, kind="stable")
    score, right = cases.score[order], np.cumsum(cases.fits[order])
    last = np.flatnonzero(np.append(score[1:] != score[:-1], True))  # of each run of equal scores
    return Curve(score[last], last + 1, right[last])


def calibrate(
    cases: Cases,
    precision: Sequence[float] = (),
    recall: Sequence[float] = (),
    thresholds: Sequence[float] = (),
) -> dict[str, Any]:
    """AUC with its interval, and points by name: `best_f1`, `precision_0.95` (the one of that precision that keeps most, None where no
    threshold has it), `recall_0.9` (the one of that recall that is most precise), `threshold_0.5` (what that one gives).

    Rates are {value, low, high}, fractions with 95 % intervals. ValueError where all labels are alike.
    """
    positive = int(cases.fits.sum())
    if not 0 < positive < len(cases.fits):
        kind = "fits" if positive else "is noise"
        raise ValueError(f"all {len(cases.fits)} labelled texts are alike (each {kind}): nothing can be told apart")
    if wrong := [each for each in (*precision, *recall) if not 0 < each <= 1]:
        raise ValueError(f"precision and recall are fractions above 0 and at most 1, not {wrong}")
    found = curve(cases)
    precisions, recalls = found.right / found.kept, found.right / positive
    points: dict[str, Any] = {
        "best_f1": _point(cases, found.threshold[np.argmax(2 * found.right / (found.kept + positive))])
    }
    for wanted in precision:
        enough = np.flatnonzero(precisions >= wanted)
        points[f"precision_{wanted:g}"] = _point(cases, found.threshold[enough[-1]]) if len(enough) else None
    for wanted in recall:
        enough = np.flatnonzero(recalls >= wanted)
        points[f"recall_{wanted:g}"] = _point(cases, found.threshold[enough[np.argmax(precisions[enough])]])
    for threshold in thresholds:
        points[f"threshold_{threshold:g}"] = _point(cases, threshold)
    return {
        "texts": len(cases.fits),
        "fitting": positive,
        "pictures": len(np.unique(cases.picture)),
        "unmatched": cases.unmatched,
        "unlabelled": cases.unlabelled,
        "auc": _told(auc(cases.score, cases.fits, cases.picture)),
        **points,
    }


def _point(cases: Cases, threshold: float) -> dict[str, Any]:
    kept = cases.score >= np.float32(threshold)
    right, wrong = int((kept & cases.fits).sum()), int((kept & ~cases.fits).sum())
    lost, dropped = int((~kept & cases.fits).sum()), int((~kept & ~cases.fits).sum())
    return {
        "threshold": float(str(np.float32(threshold))),  # its shortest digits: as a view of this threshold reads it
        "kept": (right + wrong) / len(kept),
        "precision": _told(share(right, right + wrong)),
        "recall": _told(share(right, right + lost)),
        "f1": _told(f1(right, wrong, lost)),
        "noise_precision": _told(share(dropped, dropped + lost)),
        "noise_recall": _told(share(dropped, dropped + wrong)),
    }


def _told(rate: Rate) -> dict[str, float] | None:
    """A rate as JSON; None where nothing was counted."""
    return None if math.isnan(rate.value) else {name: round(value, 6) for name, value in rate._asdict().items()}


# The picture


def draw(cases: Cases, path: Path, score: str, points: Mapping[str, Any]) -> None:
    """Precision, recall and F1 over the threshold with the points of `calibrate` marked, above the scores of fitting texts and noise."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found, positive = Curve(*(each[::-1] for each in curve(cases))), int(cases.fits.sum())
    figure = Figure((7, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for name, values, colour, style in (
        ("precision", found.right / found.kept, BLUE, "-"),
        ("recall", found.right / positive, RED, "-"),
        ("F1", 2 * found.right / (found.kept + positive), "#777777", ":"),
    ):
        # a threshold between two scores keeps what the one above it keeps
        above.step(found.threshold, values, where="pre", label=name, color=colour, linestyle=style, linewidth=1.5)
    for name, point in points.items():
        if isinstance(point, Mapping) and "threshold" in point:
            label = f"{name.replace('_', ' ')}: {point['threshold']:.3g}"
            above.axvline(point["threshold"], color="black", linewidth=0.8, alpha=0.6)
            above.text(point["threshold"], 0.02, label, rotation=90, fontsize=7, ha="right", va="bottom")
    if told := points.get("auc"):
        interval = f"{told['low']:.3f} to {told['high']:.3f}"
        above.set_title(f"{score}: AUC {told['value']:.3f} ({interval}), {len(cases.fits):,} texts", fontsize=10)
    above.set(ylim=(0, 1.02), ylabel="of the kept, of the fitting texts")
    above.grid(alpha=0.3)
    low, high = float(cases.score.min()), float(cases.score.max())
    edges = np.linspace(low, high if high > low else low + 1, 51)
    for mask, name, colour in ((cases.fits, "fitting texts", BLUE), (~cases.fits, "noise", RED)):
        below.hist(cases.score[mask], edges, label=name, color=colour, alpha=0.5)
    below.set_yscale("symlog", linthresh=10)
    below.set(xlabel=f"a text is kept that has at least this {score}", ylabel="texts")
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    with whole(path) as partial:
        figure.savefig(partial, dpi=120, format="png")

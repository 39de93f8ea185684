"""The report of a filter pass under a view: what is kept, what is dropped and why, to look at and as numbers.

    write_report(out, view, shards=None, title=..., costs=(), seed=0) -> {name: number}

`out` is one HTML file that needs nothing else and opens anywhere. Beside it, with the ending .json, stands the same in numbers: flat
keys, `LABEL/...` for the texts of a source, `all/...` for all; rates, precision, recall, F1 and AUC in percent, with `_low` and
`_high` the ends of their 95 % intervals. In the detection of noise a positive is a text that is noise and dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from blip import files
from blip.capfilt import records
from blip.capfilt.examples import pictures
from blip.capfilt.manifest import complete, description
from blip.capfilt.sections import Told, whole_page
from blip.capfilt.tally import NOT_TAKEN, Label, Tally, tally
from blip.capfilt.words import shifts
from blip.datamodules.index import Index, open_index
from blip.datamodules.shapes_truth import TRUE
from blip.datamodules.views import SYNTHETIC, WEB, View
from blip.metrics.rates import Rate, Z, auc, f1, share

WORDS = 20  # that each side of a shift prefers


def write_report(
    out: str | Path,
    view: View,
    shards: str | Sequence[str] | None = None,
    title: str = "Captions kept and dropped",
    costs: Iterable[Mapping[str, Any]] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Writes the report of a view as `out` (.html) and its numbers beside it (.json), each whole or not at all; returns the numbers.

    shards: where pictures and truth are read, by default where the pass read them; where they cannot be read, the report has
    neither and says so. costs: {stage, seconds, pictures, ...} of each stage, as far as known. seed: of the examples shown.
    ValueError where there are no records, or they lack a score of the view.
    """
    out, view = Path(out), replace(view, control=False)  # the control of Table 12 decides nothing
    if out.suffix != ".html":
        raise ValueError(f"{out}: a report is an .html file")
    (folder, *_) = view.folders
    described = description(folder) if (folder / "description.json").is_file() else {}
    index, missing = _index(described, shards)
    found = tally(view, index, seed)
    shown: dict[tuple[str, int], tuple[str, bool]] = {}
    if index is not None:
        try:
            shown = pictures(index, found.examples.all())
        except (OSError, ValueError) as error:
            missing = str(error)
    labels = together(found.labels)
    numbers = {"view": view.rule, **_numbers(found, labels)}
    told = Told(title, view, described, complete(folder), found, labels, numbers, shown, missing, list(costs))
    _write(out.with_suffix(".json"), json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    _write(out, whole_page(told))
    return numbers


def _index(described: Mapping[str, Any], shards: str | Sequence[str] | None) -> tuple[Index | None, str]:
    """(index of the shards, nothing) or (None, why they cannot be read): those given, or those of the pass."""
    given = described.get("shards") if shards is None else shards
    if not given:
        return None, "the records do not say where their shards lie; name them (--shards)"
    try:
        index = open_index(given, described.get("index") if shards is None else None)
    except (OSError, ValueError) as error:
        return None, str(error)
    if index.fingerprint != described.get("input", index.fingerprint):
        return None, "they are others than the records are of, or in another order"
    return index, ""


def together(labels: Mapping[str, Label]) -> dict[str, Label]:
    """In the order of the report: web, human, synthetic; of several captioners first all together, then each as `synthetic NAME`."""
    found = {name: label for name, label in sorted(labels.items(), reverse=True) if not name.startswith(SYNTHETIC)}
    written = {name: label for name, label in sorted(labels.items()) if name.startswith(SYNTHETIC)}
    if written:
        found[SYNTHETIC] = sum(written.values(), Label())
    return found | (written if len(written) > 1 else {})


def _numbers(found: Tally, labels: Mapping[str, Label]) -> dict[str, Any]:
    """What is said in the docstring of this file."""
    own = [label for name, label in labels.items() if not name.startswith(f"{SYNTHETIC} ")]
    numbers: dict[str, Any] = {
        "shards": found.shards,
        "pictures": found.pictures,
        "pictures_without_kept_text": found.bare,
        "broken": found.broken.total(),
        **{f"broken/{_name(reason)}": count for reason, count in sorted(found.broken.items())},
        "seconds": found.seconds,
        "pictures_per_s": found.pictures / found.seconds if found.seconds else None,
        "texts_sampled_for_words": 100 * found.sampled,
    }
    for name, label in {**labels, "all": sum(own, Label())}.items():
        told: dict[str, Any] = {"texts": label.texts, "kept": label.kept, "dropped": label.texts - label.kept}
        told |= {f"dropped/{_name(reason)}": count for reason, count in sorted(label.dropped.items())}
        judged = label.texts - label.dropped[NOT_TAKEN]
        told |= {"noise_ratio": 100 * (1 - label.kept / judged) if judged else None}
        told |= {f"before/{what}": value for what, value in label.before.numbers().items()}
        told |= {f"after/{what}": value for what, value in label.after.numbers().items()}
        told |= {f"truth/{what}": value for what, value in truth_numbers(label).items()}
        numbers |= {f"{_name(name)}/{what}": value for what, value in told.items()}
    if WEB in labels and SYNTHETIC in labels:
        web, written = labels[WEB], labels[SYNTHETIC]
        for when, first, second in (("all", written.before, web.before), ("kept", written.after, web.after)):
            found_shifts = shifts(first.words, second.words)
            ends = {SYNTHETIC: found_shifts[:WORDS], WEB: found_shifts[: -WORDS - 1 : -1]}
            for side, sign in ((SYNTHETIC, 1), (WEB, -1)):
                preferred = [shift._asdict() for shift in ends[side] if sign * shift.z > Z]
                numbers[f"words/{when}/preferred_by_{side}"] = preferred
    return {name: _finite(value) for name, value in numbers.items()}


def truth_numbers(label: Label) -> dict[str, float | int]:
    """Noise that is dropped, against the truth: counts, rates in percent with their intervals, recall of each kind; empty if unknown."""
    if not label.kinds:
        return {}
    kinds, kept = np.array(label.kinds, object), np.array(label.decided)
    noise = kinds != TRUE
    counts = {
        "noise_dropped": int((noise & ~kept).sum()),
        "true_dropped": int((~noise & ~kept).sum()),
        "noise_kept": int((noise & kept).sum()),
        "true_kept": int((~noise & kept).sum()),
    }
    hit, false, missed, right = counts.values()
    rates: dict[str, Rate] = {
        "precision": share(hit, hit + false),
        "recall": share(hit, hit + missed),
        "f1": f1(hit, false, missed),
        "auc": auc(-np.array(label.deciding), noise, label.picture),
        "noise_before": share(hit + missed, len(kinds)),
        "noise_after": share(missed, missed + right),
    }
    wrong = sorted({kind for kind in kinds if kind != TRUE})
    for kind in sorted({*wrong, *(kind.split(":")[0] for kind in wrong)}):
        of_kind = np.array([each == kind or each.startswith(f"{kind}:") for each in label.kinds])
        rates[f"recall/{_name(kind)}"] = share(int((of_kind & ~kept).sum()), int(of_kind.sum()))
        counts[f"texts/{_name(kind)}"] = int(of_kind.sum())
    numbers: dict[str, float | int] = dict(counts)
    for name, rate in rates.items():
        numbers |= {name: 100 * rate.value, f"{name}_low": 100 * rate.low, f"{name}_high": 100 * rate.high}
    for when, (agreeing, slots) in (("before", label.attributes.sum(0)), ("after", label.attributes[1])):
        numbers[f"attributes_{when}"] = 200 * float(agreeing) / float(slots) if slots else math.nan
    return numbers


def _name(words: str) -> str:
    """Words as part of a key."""
    return words.replace(": ", "/").replace(" ", "_")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    records.replace(path, text.encode("utf-8", "replace"), files.own(path))

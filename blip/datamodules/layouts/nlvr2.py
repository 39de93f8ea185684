"""NLVR2: statements about two pictures, JSON lines as published (train.json, dev.json, test1.json).

    {"identifier": "dev-850-0-0", "sentence": "...", "label": "True", "left_url", "right_url", ...}

The pictures of `dev-850-0-0` are dev-850-0-img0.png (left) and dev-850-0-img1.png, in whatever folders they lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blip.datamodules.layouts.packing import Entry
from blip.datamodules.layouts.reading import Record, lines

LABELS = {"True": True, "False": False, "true": True, "false": False, True: True, False: False}


def nlvr2(files: Sequence[Path]) -> Iterator[Entry]:
    """Each pair of pictures with its statements; without labels where the file has none (a hidden test set)."""
    pairs: dict[str, list[dict[str, Any]]] = {}
    for path in files:
        for _, where, value in lines(path):
            record = Record(value, where)
            identifier = record.text("identifier")
            pair, dash, _ = identifier.rpartition("-")
            if not dash:
                raise ValueError(f"{where}: identifier is to be like dev-850-0-0, not {identifier[:60]!r}")
            pairs.setdefault(pair, []).append({"id": identifier, "sentence": record.text("sentence")} | label(record))
    for pair, statements in pairs.items():
        yield Entry(pair, ((f"{pair}-img0.png",), (f"{pair}-img1.png",)), {"statements": statements})


def label(record: Record) -> dict[str, bool]:
    """`label` of a statement, where there is one."""
    if "label" not in record:
        return {}
    found = record.value["label"]
    if not isinstance(found, str | bool) or found not in LABELS:
        raise ValueError(f'{record.where}: label is to be "True" or "False", not {str(found)[:60]!r}')
    return {"label": LABELS[found]}

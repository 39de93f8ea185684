"""A view written out as shards of its own: for readers that know nothing of views, and to take a cleaned set elsewhere.

    OUT/SHARD           for each input shard that keeps a text a tar of the same name: the pictures, byte for byte, as KEY.jpg, png or
                        webp, and KEY.json {"captions": [...], "sources": ["web" | "synthetic" | "human", ...]}
    OUT/view.json       of what input and by which rule

A tar is there whole or not at all, so that a stopped run goes on where it was; a folder of anything else is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from blip.datamodules.index import Index
from blip.datamodules.shards import Reader, Span
from blip.datamodules.tars import as_json, picture_suffix, write_tar
from blip.datamodules.view_index import by_record, names_of, stamp
from blip.datamodules.views import View, kept_rows
from blip.files import write_text

LONGEST_KEY = 90  # bytes, so that any reader of tars takes KEY.json
AT_ONCE = 64  # pictures read together
ABOUT = "view.json"


@dataclass
class Written:
    """What a run wrote: texts by source; `there` are the tars of earlier runs, `empty` the shards that keep no text."""

    shards: int = 0
    pictures: int = 0
    texts: Counter[str] = field(default_factory=Counter)
    there: int = 0
    empty: int = 0


def materialize(
    index: Index, view: View, out: Path, progress: Callable[[int, int, str], None] | None = None
) -> Written:
    """Writes the tars of a view that `out` lacks. `progress(done, of, name)` is told after each shard.

    ValueError where the records are not those of the index, or `out` holds something else than this view of them.
    """
    about = {"view": view.rule, "input": index.fingerprint, "records": [str(f.resolve()) for f in view.folders]}
    about["stamp"] = stamp(index, view)
    names, written, reader = names_of(index), Written(), Reader()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / f".{ABOUT}.lock", timeout=0):
            _begin(out, about)
            for shard, (table, times) in enumerate(kept_rows(view, names, ["key"])):
                path = out / names[shard]
                if path.is_file():
                    written.there += 1
                elif times.any():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    written.pictures += write_tar(path, _samples(index, shard, table, times, reader))
                    written.texts.update(np.repeat(table["source"].to_pylist(), times).tolist())
                    written.shards += 1
                else:
                    written.empty += 1
                if progress is not None:
                    progress(shard + 1, len(names), names[shard])
    except Timeout:
        raise ValueError(f"{out}: another process writes there; wait for it, or give another folder") from None
    return written


def _begin(out: Path, about: dict[str, Any]) -> None:
    """Says in `out` what it holds. ValueError where it holds something else already."""
    path = out / ABOUT
    if not path.is_file():
        if any(not each.name.startswith(f".{ABOUT}.") for each in out.iterdir()):
            raise ValueError(f"{out}: already there; remove it or give another folder")
        write_text(path, json.dumps(about, indent=1) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if before.get("stamp") != about["stamp"]:
        other = [name for name in ("view", "input", "records") if before.get(name) != about[name]]
        raise ValueError(
            f"{out} was begun with another view ({', '.join(other) or 'its records changed'}): give another folder, or remove it"
        )


def _samples(
    index: Index, shard: int, table: pa.Table, times: np.ndarray, reader: Reader
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The members of each record that keeps a text, as `write_tar` takes them."""
    first, end = index.shard_starts[shard : shard + 2].tolist()
    records, rows, slices = by_record(table, times, end - first)
    keys, texts, sources = (table[name].take(pa.array(rows)).to_pylist() for name in ("key", "text", "source"))
    where = index.shard(shard)
    for start in range(0, len(records), AT_ONCE):
        some = range(start, min(start + AT_ONCE, len(records)))
        spans = [Span(where, *index.places(first + int(records[i]))[1][:1]) for i in some]
        for i, (picture,) in zip(some, reader.read(spans), strict=True):
            told = {"captions": texts[slices[i]], "sources": sources[slices[i]]}
            # a picture of another kind, which its own shard called one of these, was called so by most
            key = _fitting(keys[slices[i].start], first + int(records[i]))
            yield key, {picture_suffix(picture) or "jpg": picture, "json": as_json(told)}


def _fitting(key: str, record: int) -> str:
    """The key of a record, or its number where the key would lead out of the folder that a tar is unpacked in, or is too long."""
    leads_out = key.startswith("/") or ".." in key.split("/") or "\\" in key
    return f"record-{record:09d}" if leads_out or "\ufffd" in key or len(key.encode()) > LONGEST_KEY else key

"""The index of a view: the shards' pictures with the texts that a rule over stored scores keeps; it streams like any other index.

All texts of a view lie in its index, the web's too. They are those that were scored, in the order of the records; a record's texts
come with one look into mapped memory, where the shard would give web texts that are dropped as well, and of URLs at the price of
a request. The index is a file, made once for an input, a rule and the records as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock

from blip.datamodules.index import Index, Report
from blip.datamodules.index_file import write
from blip.datamodules.locations import cache_folder, writable
from blip.datamodules.records import PAIRS
from blip.datamodules.views import View, kept_rows, record_file

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def view_index(index: Index, view: View) -> Index:
    """The index of the same shards with the texts that the view keeps; a picture that keeps none has no record.

    Made once, beside the records or in the cache where these are read-only, under a lock. Its fingerprint is that of the rows and
    texts it holds. ValueError where the records are of another input, where shards have none yet, or nothing is kept.
    """
    if index.kind is not PAIRS:
        raise ValueError(f"{index.path}: a view is of pairs of pictures and texts, not of {index.kind.name}")
    name, folder = f"{stamp(index, view)}.index", view.folders[0]
    beside, cached = folder / "views" / name, cache_folder() / "indexes" / f"view-{name}"
    places = [beside, cached] if writable(folder) else [cached, beside]
    found = next((place for place in places if place.is_file()), places[0])
    if not found.is_file():
        found.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{found}.lock"):
            if not found.is_file():
                try:
                    _make(index, view, found)
                except OSError as error:  # of files without a name
                    error.filename = error.filename or str(found)
                    raise
    return Index(found, [index.location(shard) for shard in range(len(index.names))])


def stamp(index: Index, view: View) -> str:
    """Names a view of this index: digest of input, rule, and the files of records as they are now.

    ValueError where the records are not of this index, or not of all its shards.
    """
    digest = hashlib.blake2b(json.dumps([index.fingerprint, view.rule]).encode(), digest_size=16)
    names = names_of(index)
    for folder in view.folders:
        described = folder / "description.json"
        if not described.is_file():
            raise ValueError(
                f"{folder}: no records there (description.json is missing); name the folder of a filter pass"
            )
        of = json.loads(described.read_text(encoding="utf-8")).get("input")
        if of != index.fingerprint:
            raise ValueError(
                f"{folder}: records of another input (index {of}) than these shards (index {index.fingerprint}, {index.path}); give "
                "the shards that the pass was given, in its order, or run the pass over these"
            )
        if missing := [name for name in names if not record_file(folder, name).is_file()]:
            raise ValueError(
                f"{folder}: {len(missing)} of {len(names)} shards have no records yet, first {missing[0]}; run the pass to its end"
            )
        for about in (os.stat(record_file(folder, name)) for name in names):
            digest.update(f"{about.st_size} {about.st_mtime_ns} ".encode())
    return digest.hexdigest()


def names_of(index: Index) -> list[str]:
    """The names of its shards, by which records are found.

    ValueError where they are no names of files in a folder, or two are the same: of URLs that differ in their query alone.
    """
    names = [index.name(shard) for shard in range(len(index.names))]
    if wrong := [name for name in names if not name or ".." in name.split("/")]:
        raise ValueError(f"{index.path}: a shard called {wrong[0]!r}, which cannot be the name of its records")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(
            f"{index.path}: several shards are called {twice[0]}, and records are found by the name (without what follows "
            "a question mark); give each a name of its own"
        )
    return names


def by_record(table: pa.Table, times: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, list[slice]]:
    """What is kept of a shard of `count` records: (records that keep a text [n], rows of the table [R], slice of these for each)."""
    numbers = table["record"].to_numpy()
    if len(numbers) and (numbers[0] < 0 or numbers[-1] >= count or (np.diff(numbers) < 0).any()):
        raise ValueError(
            f"records {numbers[0]} to {numbers[-1]} do not follow the {count} of the shard's index one by one"
        )
    rows = np.repeat(np.arange(len(numbers)), times)
    records, starts = np.unique(numbers[rows], return_index=True)
    return records, rows, [slice(*ends) for ends in pairwise([*starts.tolist(), len(rows)])]


def _make(index: Index, view: View, target: Path) -> None:
    """Writes the index of a view. At 100M texts its arrays are larger than memory: they grow in files and are mapped from there."""
    number, byte = np.dtype("<i8"), np.dtype("u1")
    kinds = {"pictures": index.pictures.dtype, "text_starts": number, "keys": byte, "key_starts": number, "texts": byte}
    pictures, entries, key_bytes, text_bytes = 0, 0, 0, 0  # written so far
    shard_starts, dropped = [0], Counter[str]()
    with ExitStack() as stack:
        grown = {name: stack.enter_context(tempfile.TemporaryFile(dir=target.parent)) for name in kinds}
        for starts in ("text_starts", "key_starts"):
            grown[starts].write(bytes(8))
        for shard, (table, times) in enumerate(kept_rows(view, names_of(index))):
            first, end = index.shard_starts[shard : shard + 2].tolist()
            records, kept, slices = by_record(table, times, end - first)
            texts = table["text"].take(pa.array(kept)).to_pylist()
            blobs = [_encode({"captions": texts[of_record]}).encode() for of_record in slices]
            of_shard = index.keys(first, end)
            keys = [of_shard[record] for record in records.tolist()]
            text_ends, key_ends = (
                np.cumsum([*map(len, blobs)], dtype=number),
                np.cumsum([*map(len, keys)], dtype=number),
            )
            rows = index.pictures[first + records]
            rows["text_size"] = np.diff(text_ends, prepend=0)
            rows["text_at"], rows["json"] = text_bytes + text_ends - rows["text_size"], 1
            grown["pictures"].write(rows.tobytes())
            grown["texts"].write(b"".join(blobs))
            grown["text_starts"].write((entries + np.array([each.stop for each in slices], number)).tobytes())
            grown["keys"].write(b"".join(keys))
            grown["key_starts"].write((key_bytes + key_ends).tobytes())
            pictures, entries = pictures + len(rows), entries + len(kept)
            key_bytes, text_bytes = key_bytes + sum(map(len, keys)), text_bytes + sum(map(len, blobs))
            shard_starts.append(pictures)
            dropped["pictures without a kept text"] += end - first - len(rows)
            for source in table["source"].filter(pa.array(times == 0)).value_counts().to_pylist():
                dropped[f"{source['values']} texts not kept"] += source["counts"]
        if not pictures:
            raise ValueError(f"{view.folders[0]}: the view {view.rule} keeps no text of its {len(index.names)} shards")
        arrays: dict[str, np.ndarray] = {}
        for name, kind in kinds.items():
            grown[name].flush()
            arrays[name] = np.memmap(grown[name], kind, "r")
        arrays |= {"shard_starts": np.array(shard_starts, number), "names": index.names, "digests": index.digests}
        arrays |= {"sizes": index.sizes, "times": index.times}
        reasons = {reason: count for reason, count in dropped.most_common() if count}
        report = Report(
            shards=len(index.names),
            pictures=pictures,
            texts=entries,
            bytes=index.report.bytes,
            verified=index.report.verified,
            skipped=reasons,
            skipped_names={reason: [] for reason in reasons},
            notes=[f"a view of {index.path.name}: {json.dumps(view.rule)}"],
        )
        write(target, arrays, asdict(report))

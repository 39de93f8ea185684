"""Records as a filter pass leaves them, made by its own writer from scores that a test names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blip.capfilt import records
from blip.datamodules.index import Index
from blip.datamodules.shards import texts_in
from blip.datamodules.views import record_file

# (record number through all shards, source, number of the text) -> its scores by column
Score = Callable[[int, str, int], Mapping[str, float]]


def write_pass(
    folder: Path,
    index: Index,
    score: Score,
    columns: Sequence[str] = ("itm",),
    written: Callable[[int], Sequence[str]] = lambda picture: [f"a picture of number {picture} text 9"],
    leave: Sequence[int] = (),
) -> Path:
    """The folder of a pass over an index: its own texts and those `written` of each picture; without the shards `leave`."""
    own = texts_in(index)
    for shard in range(len(index.names)):
        first, end = index.shard_starts[shard : shard + 2].tolist()
        rows: list[dict[str, Any]] = []
        for picture in range(first, end):
            texts = [("web", number, next(own)) for number in range(int(index.text_counts(picture)))]
            texts += [("synthetic", number, text) for number, text in enumerate(written(picture))]
            for source, number, text in texts:
                by = {
                    "captioner": "tiny",
                    "log_prob": -1.5,
                    "tokens": 4,
                    "decoding": "{}",
                    "seed": 7,
                    "captioner_model": "f",
                }
                rows.append(
                    {"shard": index.name(shard), "record": picture - first, "key": index.key(picture), "source": source}
                    | {"number": number, "text": text, "scorers": json.dumps({"filter": "f"})}
                    | (by if source == "synthetic" else {})
                    | score(picture, source, number)
                )
        if shard not in leave:
            table = {name: [row.get(name) for row in rows] for name in records.schema(columns).names}
            about = {"shard": index.name(shard), "pictures": end - first, "broken": []}
            path = record_file(folder, index.name(shard))
            records.write(path, table, columns, about, folder / "partial")
    locations = [index.location(shard) for shard in range(len(index.names))]
    described = {"hash": "", "input": index.fingerprint, "captioners": {}, "shards": locations}
    (folder / "description.json").write_text(json.dumps(described))
    return folder

"""Records of CapFilt: every text of a set of shards with what models say of it, one row a text, one Parquet file a shard.

A file stands under `FOLDER/records/SHARD.parquet` and is there whole or not at all. What it holds is never changed: which texts are
kept is a view over the scores (`blip.datamodules.views`). Any reader of Parquet reads the files as they are:

    SELECT source, avg(itm) FROM 'FOLDER/records/**/*.parquet' GROUP BY source
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blip.files import whole

WORK = "work"  # files in the making, below the folder; gone when all is done
KEY = b"blip"  # in the metadata of a file: JSON of what was done to its shard

TEXT = [  # of a text
    ("shard", pa.string()),  # its name below the folder that holds all shards
    ("record", pa.int64()),  # number in its shard, as the index counts them
    ("key", pa.string()),  # of the record, as the shard's members are called
    ("source", pa.string()),  # web, synthetic or human
    ("captioner", pa.string()),  # who wrote it, by its name in the config; null of a text that the shard holds
    ("number", pa.int32()),  # which text of the record, or which sample of the captioner
    ("text", pa.string()),
    ("log_prob", pa.float32()),  # sum over the written tokens, natural logarithm; null of a text that the shard holds
    ("tokens", pa.int32()),  # how many were written, the end included
    ("decoding", pa.string()),  # JSON: how it was written
    ("seed", pa.int64()),  # what its sampling was drawn from
    ("captioner_model", pa.string()),  # fingerprint of the weights
]


def schema(scores: Sequence[str]) -> pa.Schema:
    """Columns of a text and of these scores, each float32; with scores also `scorers`, JSON {name: fingerprint}."""
    last = [("scorers", pa.string())] if scores else []
    return pa.schema([*TEXT, *((score, pa.float32()) for score in scores), *last])


def column(scorer: str, score: str) -> str:
    """The column of a score: plain for the scorer that is called `filter`, `SCORE_NAME` for any other."""
    return score if scorer == "filter" else f"{score}_{scorer}"


def write(path: Path, rows: dict[str, list[Any]], scores: Sequence[str], about: dict[str, Any], partial: Path) -> None:
    """Writes the records of a shard, first as `partial` (of the same file system), so that `path` appears whole or not at all."""
    told = {KEY: json.dumps(about, ensure_ascii=False).encode("utf-8", "replace")}
    table = pa.table(rows, schema=schema(scores).with_metadata(told))
    out = pa.BufferOutputStream()
    pq.write_table(table, out, compression="zstd")
    replace(path, out.getvalue(), partial)


def replace(path: Path, data: Any, partial: Path) -> None:
    """Puts a file of these bytes in the place of `path`, whole (`blip.files`), or leaves all as it was. OSError that says what to do.

    Where another process did the same and then took the partial file away, its file stays.
    """
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with whole(path, partial) as target:
            target.write_bytes(data)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and path.is_file():
            return
        raise OSError(
            error.errno,
            f"{path} cannot be written ({error.strerror}); what was finished before stays, start again when that is mended",
        ) from error


def partial(folder: Path, stem: str) -> Path:
    """Where a file of this folder is written before it is put in its place: a name that no other process anywhere has."""
    return folder / WORK / f"{stem}.{socket.gethostname()}.{os.getpid()}.partial"


def text_of(name: str) -> str:
    """A file's name as a text: bytes that are not UTF-8 are replaced."""
    return os.fsencode(name).decode(errors="replace")


def files(folder: Path) -> list[Path]:
    """The records in a folder, in the order of their shards' names."""
    return sorted((folder / "records").rglob("*.parquet"))


def names(folder: Path) -> list[str]:
    """The shards that have records in a folder, in the order of `files`."""
    return [path.relative_to(folder / "records").as_posix().removesuffix(".parquet") for path in files(folder)]


def read(paths: Iterable[Path], columns: Sequence[str] | None = None) -> pa.Table:
    """The records of these files one after the other, without their metadata."""
    return pa.concat_tables([_table(path, columns).replace_schema_metadata() for path in paths])


def about(path: Path) -> dict[str, Any]:
    """What was done to the shard of a file: its metadata, of which only the end of the file is read."""
    try:
        return json.loads(pq.read_metadata(path).metadata[KEY])
    except (pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ValueError(f"{path}: these are no records of CapFilt ({error})") from None


def _table(path: Path, columns: Sequence[str] | None) -> pa.Table:
    try:
        return pq.ParquetFile(path).read(columns=None if columns is None else list(columns))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: these are no records of CapFilt ({error})") from None

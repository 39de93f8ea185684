"""Records: one row a text, files that any reader of Parquet reads, there whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pytest

from blip.capfilt import records
from blip.datamodules.views import record_file


def rows(number: int, scores: tuple[str, ...] = ("itm", "itc")) -> dict[str, list[Any]]:
    """So many pictures with a web text and a synthetic one each."""
    table: dict[str, list[Any]] = {name: [] for name in records.schema(scores).names}
    for record in range(number):
        web = {"source": "web", "number": 0, "text": f"web «{record}»"}
        synthetic = {"source": "synthetic", "captioner": "captioner", "number": 0, "text": f"synthetic {record}"}
        synthetic |= {
            "log_prob": -record / 2,
            "tokens": 3,
            "decoding": "{}",
            "seed": 2**62 + record,
            "captioner_model": "m",
        }
        for row in (web, synthetic):
            row |= {"shard": "a/0.tar", "record": record, "key": f"{record:05d}", "itm": record / 8, "itc": -0.5}
            row["scorers"] = '{"filter": "f"}'
            for name, values in table.items():
                values.append(row.get(name))
    return table


def write(folder: Path, shard: str, number: int, scores: tuple[str, ...] = ("itm", "itc")) -> Path:
    path = record_file(folder, shard)
    records.write(
        path, rows(number, scores), scores, {"shard": shard, "pictures": number}, folder / "work" / "1.partial"
    )
    return path


def test_every_reader_of_parquet_reads_the_same_rows_as_they_are(tmp_path: Path) -> None:
    for shard, number in (("a/0.tar", 3), ("b/1.tar", 2)):
        write(tmp_path, shard, number)
    pattern = f"{tmp_path}/records/**/*.parquet"
    ours = records.read(records.files(tmp_path))
    assert ours.num_rows == 10
    assert ours.column("seed").to_pylist()[:2] == [None, 2**62]
    by_duckdb = duckdb.sql(f"SELECT * FROM '{pattern}' ORDER BY filename, record, source DESC").fetchall()
    assert by_duckdb == [tuple(row.values()) for row in ours.to_pylist()]
    assert pl.read_parquet(pattern).sort("shard", maintain_order=True).rows(named=True) == ours.to_pylist()
    by_pandas = pd.concat([pd.read_parquet(path) for path in records.files(tmp_path)])
    assert by_pandas["text"].tolist() == ours.column("text").to_pylist()
    kinds = duckdb.sql(f"SELECT source, count(*), avg(itm) FROM '{pattern}' GROUP BY source ORDER BY source").fetchall()
    assert kinds == [("synthetic", 5, pytest.approx(0.1)), ("web", 5, pytest.approx(0.1))]


def test_columns_of_scores_stand_behind_the_texts_and_only_where_there_are_scores() -> None:
    assert records.schema(()).names[-1] == "captioner_model"
    assert records.schema(("itm", "itc_other")).names[-3:] == ["itm", "itc_other", "scorers"]
    assert records.column("filter", "itm") == "itm"
    assert records.column("clip", "cosine") == "cosine_clip"


def test_what_was_done_to_a_shard_is_read_from_the_end_of_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, "0.tar", 3)
    assert records.about(path) == {"shard": "0.tar", "pictures": 3}
    assert not list((tmp_path / "work").iterdir())


def test_a_shard_without_records_has_a_file_without_rows(tmp_path: Path) -> None:
    assert records.read([write(tmp_path, "0.tar", 0)]).num_rows == 0


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_file_is_whole_or_not_there_whatever_fails(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = write(tmp_path, "0.tar", 2).read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((Path, "write_bytes") if fails == "write" else (os, fails)), fail)
    with pytest.raises(OSError, match=r"1\.tar\.parquet cannot be written \(No space left on device\).*start again"):
        write(tmp_path, "1.tar", 3)
    with pytest.raises(OSError, match="cannot be written"):
        write(tmp_path, "0.tar", 3)
    monkeypatch.undo()
    assert [path.name for path in records.files(tmp_path)] == ["0.tar.parquet"]
    assert records.files(tmp_path)[0].read_bytes() == before
    assert not list((tmp_path / "work").iterdir())


def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 and no more")
    for read in (records.about, lambda p: records.read([p])):
        with pytest.raises(ValueError, match=r"x\.parquet: these are no records of CapFilt"):
            read(path)
    pd.DataFrame({"a": [1]}).to_parquet(path)
    with pytest.raises(ValueError, match=r"x\.parquet: these are no records of CapFilt"):
        records.about(path)

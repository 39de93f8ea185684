"""Shards as we write them: any reader takes them, equal samples give equal bytes, none is half written."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import webdataset

from blip.datamodules.tars import write_tar

SAMPLES = [("a", {"jpg": b"picture", "json": b"{}"}), ("b-1", {"0.jpg": b"left", "1.jpg": b"right", "json": b"[]"})]


def test_a_shard_reads_back_as_its_samples(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    assert write_tar(path, iter(SAMPLES)) == 2
    read = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in read] == SAMPLES


def test_a_dot_in_a_folder_is_no_end_of_a_key(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("v1.2/a", {"jpg": b"picture"})])
    (sample,) = webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False)
    assert (sample["__key__"], sample["jpg"]) == ("v1.2/a", b"picture")


def test_bytes_depend_on_nothing_but_the_samples(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for path in (tmp_path / "0.tar", tmp_path / "elsewhere" / "another.tar"):
        write_tar(path, SAMPLES)
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] == "0bad5b1c48f191da"
        with tarfile.open(path) as tar:
            assert {(member.mtime, member.uid, member.uname, member.mode) for member in tar} == {(0, 0, "", 0o644)}


def test_a_shard_appears_when_it_is_whole_or_not_at_all(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, dict[str, bytes]]]:
        yield "a", {"jpg": b"x"}
        raise RuntimeError("no more")

    for before in (None, b"as it was"):
        path = tmp_path / "0.tar"
        if before:
            path.write_bytes(before)
        with pytest.raises(RuntimeError, match="no more"):
            write_tar(path, failing())
        assert (path.read_bytes() if path.exists() else None) == before
        assert {file.name for file in tmp_path.iterdir()} == ({"0.tar"} if before else set())


@pytest.mark.parametrize(
    "samples",
    [
        [("", {"jpg": b""})],
        [("a.b", {"jpg": b""})],
        [("a/", {"jpg": b""})],
        [("a", {"jpg": b""}), ("b", {"jpg": b""}), ("a", {"jpg": b""})],
        [("a", {})],
        [("a" * 200, {"jpg": b""})],
    ],
    ids=["empty", "dot", "no name", "twice", "no members", "long"],
)
def test_what_readers_would_misread_is_refused(samples: list[tuple[str, dict[str, bytes]]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"key of its own|too long"):
        write_tar(tmp_path / "0.tar", samples)
    assert not list(tmp_path.iterdir())

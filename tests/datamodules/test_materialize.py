"""A view written as shards: whole tars that any reader takes, pictures byte for byte, begun again where it stopped."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import webdataset

from blip.datamodules import materialize as module
from blip.datamodules.index import Index, open_index
from blip.datamodules.materialize import materialize
from blip.datamodules.shards import EvaluationRecords
from blip.datamodules.view_index import view_index
from blip.datamodules.views import View
from tests.datamodules.making import picture, tar_of, write_shards
from tests.datamodules.scoring import write_pass
from tests.datamodules.serving import serving


def score(n: int, source: str, number: int) -> dict[str, float]:
    return {"itm": 0.9 if n % 2 == 0 or (source == "synthetic" and n < 18) else 0.1}


@pytest.fixture
def index(tmp_path) -> Index:
    return open_index(write_shards(tmp_path / "data", [13, 5, 22], texts=2))


@pytest.fixture
def view(index, tmp_path) -> View:
    return View(write_pass(tmp_path / "pass", index, score))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def test_the_tars_hold_the_texts_kept_and_the_bytes_of_their_pictures(index, view, tmp_path):
    written = materialize(index, view, tmp_path / "out")
    assert (written.shards, written.pictures, written.texts) == (3, 29, {"web": 40, "synthetic": 29})
    read = webdataset.WebDataset([str(path) for path in sorted((tmp_path / "out").glob("*.tar"))], shardshuffle=False)
    samples = {sample["__key__"]: sample for sample in read}
    assert list(samples) == [f"{n:05d}" for n in range(40) if n % 2 == 0 or n < 18]
    for n in (4, 5):
        sample = samples[f"{n:05d}"]
        assert sample["png"] == picture(n)
        numbers = [0, 1, 9] if n == 4 else [9]
        assert json.loads(sample["json"]) == {
            "captions": [f"a picture of number {n} text {i}" for i in numbers],
            "sources": ["web", "web", "synthetic"] if n == 4 else ["synthetic"],
        }


def test_what_is_written_streams_as_the_view_does(index, view, tmp_path):
    materialize(index, view, tmp_path / "out")
    seen, expected = open_index(tmp_path / "out" / "*.tar"), view_index(index, view)
    assert len(seen) == len(expected) == 69
    ours, others = (EvaluationRecords(each, "all", 8) for each in (seen, expected))
    for n in range(len(ours)):
        assert (ours[n].key, ours[n].entries) == (others[n].key, others[n].entries)
        assert (ours[n].image == others[n].image).all()


def test_a_run_that_stopped_goes_on_and_ends_in_the_same_bytes(index, view, tmp_path, monkeypatch):
    materialize(index, view, tmp_path / "undisturbed")
    write_tar, done = module.write_tar, []

    def failing(path, samples):
        if len(done) == 2:
            (path.parent / f".{path.name}.partial").write_bytes(b"killed while it was written")
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(path)
        return write_tar(path, samples)

    monkeypatch.setattr(module, "write_tar", failing)
    with pytest.raises(OSError, match="No space left"):
        materialize(index, view, tmp_path / "out")
    assert list(contents(tmp_path / "out")) == ["00000.tar", "00001.tar"]
    first = (tmp_path / "out" / "00000.tar").stat()
    monkeypatch.setattr(module, "write_tar", write_tar)
    written = materialize(index, view, tmp_path / "out")
    assert (written.there, written.shards) == (2, 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert (tmp_path / "out" / "00000.tar").stat().st_mtime_ns == first.st_mtime_ns
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_full_disk_is_one_error_that_names_the_tar(index, view, tmp_path, monkeypatch):
    fsync = os.fsync

    def full(descriptor):
        if ".tar." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*/out/00000\.tar'"):
            materialize(index, view, tmp_path / "out")
    assert contents(tmp_path / "out") == {}
    assert materialize(index, view, tmp_path / "out").shards == 3


def test_a_folder_of_anything_else_is_left_alone(index, view, tmp_path):
    materialize(index, view, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"begun with another view \(view\)"):
        materialize(index, View(view.records, threshold=0.05), tmp_path / "out")
    with pytest.raises(ValueError, match="already there; remove it"):
        materialize(index, view, tmp_path / "data")
    assert contents(tmp_path / "out") == before
    write_pass(tmp_path / "pass", index, lambda *_: {"itm": 0.9})
    with pytest.raises(ValueError, match="its records changed"):
        materialize(index, view, tmp_path / "out")


def test_of_two_at_once_the_second_is_told(index, view, tmp_path):
    def meanwhile(done: int, of: int, name: str) -> None:
        with pytest.raises(ValueError, match="another process writes there"):
            materialize(index, view, tmp_path / "out")

    assert materialize(index, view, tmp_path / "out", meanwhile).shards == 3


def test_a_shard_that_keeps_nothing_makes_no_tar(index, tmp_path):
    pass_ = write_pass(tmp_path / "pass", index, lambda n, *_: {"itm": 0.9 if n >= 18 else 0.1})
    written = materialize(index, View(pass_), tmp_path / "out")
    assert (written.shards, written.empty) == (1, 2)
    assert list(contents(tmp_path / "out")) == ["00002.tar"]
    assert materialize(index, View(pass_), tmp_path / "out").there == 1


def test_the_control_repeats_the_texts_in_their_pictures(index, tmp_path):
    pass_ = write_pass(tmp_path / "pass", index, lambda *_: {"itm": 0.9})
    written = materialize(index, View(pass_, control=True), tmp_path / "out")
    assert written.texts == {"web": 120}
    assert len(open_index(tmp_path / "out" / "*.tar")) == 120


@pytest.mark.parametrize("ranges", [True, False])
def test_shards_in_folders_and_behind_urls_are_written_alike(tmp_path, monkeypatch, ranges):
    for part in ("v1.0", "v1.1"):
        members = {f"{part}/{n}.png": picture(n) for n in range(3)}
        members = {
            k: v for name, data in members.items() for k, v in ((name, data), (f"{name[:-4]}.txt", b"a picture"))
        }
        (tmp_path / "data" / part).mkdir(parents=True)
        (tmp_path / "data" / part / "0.tar").write_bytes(tar_of(members))
    index = open_index(tmp_path / "data" / "*" / "0.tar")
    view = View(write_pass(tmp_path / "pass", index, lambda *_: {"itm": 1.0}))
    materialize(index, view, tmp_path / "out")
    assert list(contents(tmp_path / "out")) == ["v1.0/0.tar", "v1.1/0.tar"]
    assert [open_index(tmp_path / "out" / "*" / "0.tar").key(n) for n in (0, 5)] == ["v1.0/0", "v1.1/2"]
    monkeypatch.setenv("BLIP_CACHE", str(tmp_path / "cache"))
    with serving(tmp_path / "data", ranges) as server:
        distant = open_index([f"{server.url}/v1.{n}/0.tar" for n in range(2)], index.path)
        materialize(distant, view, tmp_path / "fetched")
    assert contents(tmp_path / "fetched") == contents(tmp_path / "out")


def test_a_picture_that_is_called_what_it_is_not_keeps_its_bytes(tmp_path):
    import cv2
    import numpy as np

    bitmap = cv2.imencode(".bmp", np.zeros((4, 4, 3), np.uint8))[1].tobytes()
    (tmp_path / "0.tar").write_bytes(tar_of({"a.jpg": bitmap, "a.txt": b"black"}))
    index = open_index(tmp_path / "0.tar", verify=False)
    materialize(index, View(write_pass(tmp_path / "pass", index, lambda *_: {"itm": 1.0})), tmp_path / "out")
    (sample,) = webdataset.WebDataset(str(tmp_path / "out" / "0.tar"), shardshuffle=False)
    assert sample["jpg"] == bitmap
    assert sorted(os.listdir(tmp_path / "out")) == [".view.json.lock", "0.tar", "view.json"]


def test_a_key_that_leads_out_of_the_folder_or_is_too_long_gives_way_to_a_number(tmp_path):
    keys = ["../../out", "/etc/out", "a" * 95, "inside/fine"]
    members = {
        f"{key}.{suffix}": data
        for n, key in enumerate(keys)
        for suffix, data in (("png", picture(n)), ("txt", b"a text"))
    }
    (tmp_path / "0.tar").write_bytes(tar_of(members))
    index = open_index(tmp_path / "0.tar")
    materialize(index, View(write_pass(tmp_path / "pass", index, lambda *_: {"itm": 1.0})), tmp_path / "out")
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "0.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [*(f"record-{n:09d}" for n in range(3)), "inside/fine"]
    assert [sample["png"] for sample in samples] == [picture(n) for n in range(4)]

"""Shards behind URLs give the bytes that local ones give, whatever the server does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blip.datamodules import remote
from blip.datamodules.index import build_index, open_index
from blip.datamodules.remote import Shard, cached
from blip.datamodules.shards import Reader, Span
from tests.datamodules.making import write_shards
from tests.datamodules.serving import serving

SERVERS = [
    pytest.param(True, [], id="ranges"),
    pytest.param(False, [], id="no ranges"),
    pytest.param(True, ["500"], id="ranges, 500s"),
    pytest.param(True, ["cut", "500"], id="ranges, cuts and 500s"),
    pytest.param(False, ["cut", "500"], id="no ranges, cuts and 500s"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    return tmp_path / "cache"


def spans(index) -> list[Span]:
    found = []
    for number, row in enumerate(index.pictures):
        image, text = (int(row["image_at"]), int(row["image_size"])), (int(row["text_at"]), int(row["text_size"]))
        found.append(Span(index.shard(int(index.shard_of(number))), image, text))
    return found[::-1]


@pytest.mark.parametrize(("ranges", "faults"), SERVERS)
def test_the_same_index_gives_the_same_bytes_from_a_url(tmp_path, ranges, faults):
    write_shards(tmp_path / "data", [5, 3, 7])
    local = open_index(tmp_path / "data" / "*.tar")
    with serving(tmp_path / "data", ranges, faults) as server:
        distant = open_index(f"{server.url}/{{00000..00002}}.tar")  # the index lies beside the shards
        assert distant.fingerprint == local.fingerprint
        assert Reader().read(spans(distant)) == Reader().read(spans(local))


def test_one_request_brings_a_picture_and_its_text_over_kept_connections(tmp_path):
    write_shards(tmp_path / "data", [20])
    open_index(tmp_path / "data" / "*.tar")
    with serving(tmp_path / "data") as server:
        index = open_index(f"{server.url}/00000.tar")
        server.requests.clear()
        server.connections = 0
        Reader().read(spans(index))
        assert len(server.requests) == 20
        assert server.connections <= remote.THREADS
        assert all(" bytes=" in request for request in server.requests)


def test_whole_shards_are_fetched_once_by_all_readers(tmp_path, cache):
    write_shards(tmp_path / "data", [5, 3])
    open_index(tmp_path / "data" / "*.tar")
    with serving(tmp_path / "data", ranges=False) as server:
        index = open_index([f"{server.url}/00000.tar", f"{server.url}/00001.tar"])
        Reader().read(spans(index))
        assert len(list((cache / "shards").glob("*.tar"))) == 2
        server.requests.clear()
        reader = Reader()
        reader.remote._whole.add(server.url)
        reader.read(spans(index))
        assert server.requests == []
    assert not list(cache.rglob("*.part"))


def test_what_a_killed_fetch_left_is_written_over(tmp_path, cache):
    paths = write_shards(tmp_path / "data", [5])
    index = open_index(paths)
    with serving(tmp_path / "data", ranges=False) as server:
        shard = Shard(f"{server.url}/00000.tar", paths[0].stat().st_size, index.shard(0).digest)
        whole = cached(shard)
        whole.rename(whole.with_suffix(".part"))
        whole.with_suffix(".part").write_bytes(b"cut" * 10**6)
        assert cached(shard).read_bytes() == paths[0].read_bytes()
    assert not list(cache.rglob("*.part"))


def test_shards_of_one_name_do_not_meet_in_the_cache(tmp_path):
    read = []
    for name, first in (("a", 0), ("b", 50)):
        write_shards(tmp_path / name, [4], first=first)
        open_index(tmp_path / name / "*.tar")
    with serving(tmp_path, ranges=False) as server:
        for name in ("a", "b"):
            read.append(Reader().read(spans(open_index(f"{server.url}/{name}/00000.tar"))))
    assert read[0] != read[1]


def test_the_cache_makes_room_by_last_use(tmp_path, cache):
    paths = write_shards(tmp_path / "data", [4, 4, 4])
    index = open_index(paths)
    with serving(tmp_path / "data", ranges=False) as server:
        shards = [Shard(f"{server.url}/{p.name}", p.stat().st_size, index.shard(i).digest) for i, p in enumerate(paths)]
        first = cached(shards[0])
        second = cached(shards[1])
        os.utime(second, (1, 1))
        third = cached(shards[2], cache_bytes=2 * paths[0].stat().st_size)
    assert (first.is_file(), second.is_file(), third.is_file()) == (True, False, True)


def test_an_index_is_made_from_urls(tmp_path):
    local = build_index(write_shards(tmp_path / "data", [5, 3]), tmp_path / "local.index")
    with serving(tmp_path / "data", ranges=False, faults=["cut", "500"]) as server:
        made = build_index(f"{server.url}/{{00000..00001}}.tar", tmp_path / "made.index")
        assert made.fingerprint == local.fingerprint
        opened = open_index(f"{server.url}/{{00000..00001}}.tar", tmp_path / "made.index")
        assert Reader().read(spans(opened)) == Reader().read(spans(local))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_shard_that_changed_at_the_server_is_refused(tmp_path, ranges):
    write_shards(tmp_path / "data", [5])
    made = open_index(tmp_path / "data" / "*.tar").path
    write_shards(tmp_path / "data", [50])
    with serving(tmp_path / "data", ranges) as server:
        index = open_index(f"{server.url}/00000.tar", made)
        with pytest.raises(ValueError, match="index it anew"):
            Reader().read(spans(index))


def test_a_server_that_stays_broken_is_an_error_that_hides_the_signature(tmp_path):
    write_shards(tmp_path / "data", [5])
    made = open_index(tmp_path / "data" / "*.tar").path
    with serving(tmp_path / "data") as server:
        index = open_index(f"{server.url}/00000.tar?sig=SECRET", made)
        server.fault = lambda _: "500"  # type: ignore[method-assign]
        server.faults = ["500"]
        with pytest.raises(OSError, match=r"00000\.tar: failed 6 times, at last: status 500") as caught:
            Reader().read(spans(index))
    assert "SECRET" not in str(caught.value)
    with pytest.raises(OSError, match="failed 6 times") as caught:  # nobody listens any more
        Reader().read(spans(index))
    assert "SECRET" not in str(caught.value)


def test_missing_shards_and_indexes_are_said_at_once(tmp_path):
    write_shards(tmp_path / "data", [5])
    with serving(tmp_path / "data") as server:
        with pytest.raises(ValueError, match=r"no index there .*blip data index"):
            open_index(f"{server.url}/00000.tar")
        with pytest.raises(FileNotFoundError, match="status 404"):
            Reader().read([Span(Shard(f"{server.url}/no.tar", 10, ""), (0, 5), (5, 5))])
        assert len(server.requests) == 2, "what is not there is not asked for again"


@pytest.mark.parametrize("name", ["pipe:cat x.tar", "s3://bucket/x.tar", "http://host/x.tar.gz", "gs://b/{0..1}.tar"])
def test_nothing_is_run_or_guessed_to_reach_shards(name):
    with pytest.raises(ValueError, match=r"local files or http|compressed"):
        open_index(name)


def test_the_next_window_is_fetched_beside_the_reading(tmp_path, cache):
    paths = write_shards(tmp_path / "data", [4, 4])
    index = open_index(paths)
    with serving(tmp_path / "data", ranges=False) as server:
        shards = [Shard(f"{server.url}/{p.name}", p.stat().st_size, index.shard(i).digest) for i, p in enumerate(paths)]
        reader = Reader()
        reader.remote.fetch_ahead(shards)
        assert reader.remote.ahead is None, "with ranges nothing is fetched ahead"
        reader.read([Span(shards[0], (0, 5), (5, 5))])
        reader.remote.fetch_ahead(shards)
        reader.remote.ahead.join()
    assert len(list((cache / "shards").glob("*.tar"))) == 2

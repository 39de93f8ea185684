"""A pass over shards: each text once, the same however the work was split, broken off or disturbed."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blip import files
from blip.capfilt import claims, manifest, records
from blip.capfilt.passes import Pass
from blip.datamodules.views import record_file
from tests.capfilt.speaking import Hasher, Namer, content, made, told
from tests.datamodules.making import pair, picture, tar_of, write_shards
from tests.datamodules.serving import serving

Both = Callable[[], dict[str, Any]]


def both() -> dict[str, Any]:
    """Options of a pass that writes and scores."""
    return {"captioners": {"captioner": Namer()}, "scorers": {"filter": Hasher()}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three shards of 9, 1 and 6 pictures with two texts each."""
    return [str(path) for path in write_shards(tmp_path_factory.mktemp("web"), (9, 1, 6), texts=2)]


def apart(work: Callable[[], None]) -> int:
    """Starts a process that does this work alone; its number. It ends with status 1 where the work fails."""
    if child := os.fork():
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        work()
        status = 0
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """How a process ended: its status, of one that was killed minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# what is written


def test_every_text_has_one_row_by_record_the_web_s_before_the_captioners(shards: list[str], tmp_path: Path) -> None:
    captioners = {"b": Namer(2, word="b"), "a": Namer(word="a")}
    made(shards, tmp_path, captioners=captioners, scorers={"filter": Hasher(), "other": Hasher(16, ("cosine",))})
    table = records.read(records.files(tmp_path))
    assert table.column_names == [*records.schema(()).names, "itm", "itc", "cosine_other", "scorers"]
    rows = table.to_pylist()
    assert [(row["shard"], row["record"]) for row in rows[::5]] == [
        (f"0000{shard}.tar", record) for shard, size in enumerate((9, 1, 6)) for record in range(size)
    ]
    for first in range(0, len(rows), 5):
        of_picture = rows[first : first + 5]
        assert [(row["captioner"], row["number"]) for row in of_picture] == [
            (None, 0),
            (None, 1),
            ("a", 0),
            ("b", 0),
            ("b", 1),
        ]
        number = int(of_picture[0]["key"])
        assert of_picture[1]["text"] == f"a picture of number {number} text 1"
        assert of_picture[2]["text"].startswith(f"a [{number}, 0, 128]")  # the picture that the record shows
        assert {row["seed"] for row in of_picture} == {None, of_picture[2]["seed"]}
        assert all(
            (row["source"] == "web") == (row["log_prob"] is None) == (row["tokens"] is None) for row in of_picture
        )
        assert json.loads(of_picture[3]["decoding"]) == {"strategy": "nucleus", "samples": 2}
        assert all(json.loads(row["scorers"]) == {"filter": "hasher", "other": "hasher"} for row in of_picture)
        assert None not in [row[score] for row in of_picture for score in ("itm", "itc", "cosine_other")]
    assert len({row["seed"] for row in rows}) == 17


def test_seeds_come_from_the_stage_s_seed_the_shard_and_the_key(shards: list[str], tmp_path: Path) -> None:
    def seeds(name: str, of: list[str], seed: int) -> dict[tuple[str, str], int]:
        folder = made(of, tmp_path / name, captioners={"captioner": Namer()}, seed=seed)
        return {(row["shard"], row["key"]): row["seed"] for row in records.read(records.files(folder)).to_pylist()}

    all_of_them, fewer, other = seeds("all", shards, 1), seeds("fewer", shards[:2], 1), seeds("other", shards, 2)
    assert fewer == {which: seed for which, seed in all_of_them.items() if which[0] != "00002.tar"}
    assert not {*all_of_them.values()} & {*other.values()}


def test_one_pass_is_generate_and_then_filter(shards: list[str], tmp_path: Path) -> None:
    generate = made(shards, tmp_path / "generate", captioners={"captioner": Namer(2)})
    assert {row["source"] for row in records.read(records.files(generate)).to_pylist()} == {"synthetic"}
    then = made(shards, tmp_path / "filter", synthetic=[str(generate)], scorers={"filter": Hasher()})
    fused = made(shards, tmp_path / "fused", captioners={"captioner": Namer(2)}, scorers={"filter": Hasher()})
    assert records.read(records.files(then)).equals(records.read(records.files(fused)))
    assert told(then)["in"] == {"synthetic": 32, "web": 32}
    assert told(then)["rows"] == told(fused)["rows"] == {"synthetic": 32, "web": 32}
    assert told(generate)["in"] == {}


def test_of_a_pass_that_wrote_and_scored_another_filter_takes_the_written_texts(
    shards: list[str], tmp_path: Path
) -> None:
    generate = made(shards, tmp_path / "generate", captioners={"captioner": Namer(2)})
    fused = made(shards, tmp_path / "fused", captioners={"captioner": Namer(2)}, scorers={"filter": Hasher()})
    once, again = (
        made(shards, tmp_path / f"of {folder.name}", synthetic=[str(folder)], scorers={"other": Hasher()})
        for folder in (generate, fused)
    )
    assert records.read(records.files(again)).equals(records.read(records.files(once)))


def test_a_filter_takes_texts_of_several_passes_and_scores_web_texts_alone(shards: list[str], tmp_path: Path) -> None:
    one = made(shards, tmp_path / "one", captioners={"one": Namer()})
    two = made(shards, tmp_path / "two", captioners={"two": Namer(2)}, seed=5)
    folder = made(shards, tmp_path / "both", synthetic=[str(two), str(one)], scorers={"filter": Hasher()})
    rows = records.read(records.files(folder)).to_pylist()
    assert [row["captioner"] for row in rows[:5]] == [None, None, "one", "two", "two"]
    alone = made(shards, tmp_path / "alone", scorers={"filter": Hasher()}, source="human")
    scored = records.read(records.files(alone)).to_pylist()
    assert [row["itm"] for row in scored] == [row["itm"] for row in rows if row["source"] == "web"]
    assert {row["source"] for row in scored} == {"human"}


# however the work is split


@pytest.mark.parametrize("split", [{"worker": 1}, {"worker": 2}, {"num_workers": 2, "prefetch": 1}], ids=str)
def test_records_do_not_depend_on_how_the_work_is_split(split: dict, shards: list[str], tmp_path: Path) -> None:
    plain, other = made(shards, tmp_path / "plain", **both()), made(shards, tmp_path / "other", **both(), **split)
    assert content(plain) == content(other)
    assert told(plain) == told(other)
    assert not (other / "work").exists()


def test_a_restart_redoes_nothing(shards: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made(shards, tmp_path, **both())
    assert "pictures/s a process" in caplog.messages[-1]
    made(shards, tmp_path, **both())
    assert caplog.messages[-1].endswith("nothing was left to do")
    record_file(tmp_path, "00001.tar").unlink()
    times = {path: path.stat().st_mtime_ns for path in records.files(tmp_path)}
    seen: list[int] = []

    class Watched(Namer):
        def write(self, pixels: Any, seeds: Any) -> Any:
            seen.append(len(pixels))
            return super().write(pixels, seeds)

    made(shards, tmp_path, captioners={"captioner": Watched()}, scorers={"filter": Hasher()})
    assert seen == [1]
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_four_workers_killed_at_random_moments_end_in_the_records_of_an_undisturbed_run(tmp_path: Path) -> None:
    shards = [str(path) for path in write_shards(tmp_path / "web", [7] * 20)]
    options = {"captioners": {"captioner": Namer(2)}, "scorers": {"filter": Hasher()}}
    plain, folder = made(shards, tmp_path / "plain", **options), tmp_path / "killed"
    rng = random.Random(0)
    at_the_files = {claims.__file__, files.__file__, manifest.__file__, records.__file__}  # where a moment matters most

    def work(worker: int, until: int, anywhere: bool) -> None:
        happened = 0

        def count(frame: Any, *_: Any) -> None:  # at every call and return, also of what is written in C
            nonlocal happened
            happened += anywhere or frame.f_code.co_filename in at_the_files
            if happened == until:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        made(shards, folder, **options, worker=worker)

    def start(worker: int) -> None:
        anywhere = rng.random() < 0.5
        until = rng.randrange(
            1, (5000 if anywhere else 80) * (1 + killed[worker])
        )  # later each time, so that there is an end
        running[apart(lambda: work(worker, until, anywhere))] = worker

    killed, running = {worker: 0 for worker in range(4)}, dict[int, int]()
    for worker in killed:
        start(worker)
    while running:
        child, status = os.wait()
        worker, code = running.pop(child), os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL)
        if code:
            killed[worker] += 1
            start(worker)
    assert min(killed.values()) >= 1
    assert sum(killed.values()) >= 10
    assert content(folder) == content(plain)
    assert told(folder) == told(plain)
    texts = [
        (r["shard"], r["key"], r["captioner"], r["number"]) for r in records.read(records.files(folder)).to_pylist()
    ]
    assert len(texts) == len({*texts}) == 20 * 7 * 3
    times = {path: path.stat().st_mtime_ns for path in records.files(folder)}
    made(shards, folder, **options)
    assert {path: path.stat().st_mtime_ns for path in records.files(folder)} == times
    assert sorted(path.name for path in folder.iterdir()) == ["description.json", "manifest.json", "records"]


def test_killed_at_any_moment_of_its_writing_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    shards = [str(path) for path in write_shards(tmp_path / "web", [3])]
    (whole,) = records.files(made(shards, tmp_path / "plain", **both()))
    data = whole.read_bytes()

    def write(path: Path, until: int) -> None:
        happened = 0

        def count(frame: Any, *_: Any) -> None:
            nonlocal happened
            happened += frame.f_code.co_filename in (files.__file__, records.__file__)
            if happened == until:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        records.replace(path, data, path.parents[1] / "work" / "0.partial")
        sys.setprofile(None)

    found = []
    for until in range(1, 200):
        path = tmp_path / str(until) / "records" / "0.parquet"
        code = ended(apart(lambda path=path, until=until: write(path, until)))  # type: ignore[misc]
        assert code in (0, -signal.SIGKILL)
        found.append(path.exists())
        assert not path.exists() or path.read_bytes() == data, f"killed at event {until}"
        if code == 0:
            break
    assert len(found) > 10
    assert found == sorted(found)
    assert {*found[:-1]} == {False, True}


def test_a_shard_that_another_process_works_on_is_left_to_it(shards: list[str], tmp_path: Path) -> None:
    told_in, told_out = os.pipe(), os.pipe()

    class Waiting(Namer):
        def write(self, pixels: Any, seeds: Any) -> Any:
            os.write(told_out[1], b"x")
            os.read(told_in[0], 1)
            return super().write(pixels, seeds)

    other = apart(lambda: made(shards[:2], tmp_path, captioners={"captioner": Waiting()}) and None)
    os.close(told_out[1])  # so that its end is seen
    os.read(told_out[0], 1)  # it has the first shard
    made(shards[:2], tmp_path, captioners={"captioner": Namer()})
    assert [path.name for path in records.files(tmp_path)] == ["00001.tar.parquet"]
    assert not (tmp_path / "manifest.json").exists()
    os.write(told_in[1], b"xxx")  # a batch each
    assert ended(other) == 0
    assert told(tmp_path)["rows"] == {"synthetic": 10}


def test_where_there_are_no_locks_two_workers_on_a_shard_end_in_one_correct_file(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(claims.fcntl, "lockf", no_locks)
    plain, folder = made(shards, tmp_path / "plain", **both()), tmp_path / "twice"

    class Interrupted(Namer):
        def write(self, pixels: Any, seeds: Any) -> Any:
            if not (folder / "manifest.json").exists():  # in the middle of the first shard another does all
                made(shards, folder, **both())
                assert not (folder / "work").exists()
            return super().write(pixels, seeds)

    made(shards, folder, captioners={"captioner": Interrupted()}, scorers={"filter": Hasher()})
    assert content(folder) == content(plain)


# faults


def damage(shard: str, number: int) -> None:
    """Makes the picture of this number one that does not decode, with size and time of the shard as they were."""
    path, before = Path(shard), os.stat(shard)
    data, image = path.read_bytes(), picture(number)
    assert data.count(image) == 1
    path.write_bytes(data.replace(image, image[:30] + bytes(len(image) - 30)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def own(tmp_path: Path) -> list[str]:
    """Shards of five pictures that a test may damage, indexed."""
    shards = [str(path) for path in write_shards(tmp_path / "web", (5, 5, 5, 5))]
    made(shards, tmp_path / "undisturbed", **both())
    return shards


def test_broken_pictures_are_counted_and_named_and_the_rest_goes_on(own: list[str], tmp_path: Path) -> None:
    for number in (2, 15, 16, 17, 18, 19):
        damage(own[number // 5], number)
    folder = made(own, tmp_path / "out", **both())
    manifest = told(folder)
    (reason,) = manifest["broken"]
    names = ["00000.tar: 00002", *(f"00003.tar: {number:05d}" for number in range(15, 20))]
    assert manifest["broken"] == {reason: 6}
    assert manifest["broken_names"] == {reason: names}
    assert manifest["pictures"] == 14
    assert manifest["in"] == {"web": 20}
    assert manifest["rows"] == {"synthetic": 14, "web": 14}
    whole, rows = content(tmp_path / "undisturbed"), content(folder)
    assert rows["records/00001.tar.parquet"][0] == whole["records/00001.tar.parquet"][0]
    assert [r["record"] for r in rows["records/00000.tar.parquet"][0]] == [0, 0, 1, 1, 3, 3, 4, 4]
    assert rows["records/00003.tar.parquet"][0] == []


def test_what_the_index_leaves_out_is_in_the_manifest(tmp_path: Path) -> None:
    members = pair(0) | pair(1) | {"00001.png": b"no picture"} | pair(2)
    (tmp_path / "0.tar").write_bytes(tar_of(members))
    manifest = told(made(str(tmp_path / "0.tar"), tmp_path / "out", **both()))
    assert manifest["pictures"] == 2
    assert sum(manifest["left_out_by_the_index"].values()) == 1


def test_shards_that_cannot_be_read_are_named_when_all_others_are_done(own: list[str], tmp_path: Path) -> None:
    whole = {shard: Path(shard).read_bytes() for shard in own}
    time = os.stat(own[1]).st_mtime_ns
    Path(own[1]).write_bytes(whole[own[1]][:-2000])
    damage(own[2], 12)
    os.utime(own[2])  # now it is another shard
    folder, options = tmp_path / "out", both()
    for _ in range(2):  # also when it is started again
        with pytest.raises(
            ValueError, match=r"(?s)2 shard\(s\).*00001\.tar: .*bytes.*00002\.tar: .*its bytes changed"
        ) as error:
            made(own, folder, **options)
        assert "00000.tar" not in str(error.value)
        assert [path.name for path in records.files(folder)] == ["00000.tar.parquet", "00003.tar.parquet"]
        assert not (folder / "manifest.json").exists()
    for shard, data in whole.items():
        Path(shard).write_bytes(data)
    os.utime(own[1], ns=(time, time))
    made(own, folder, **options)
    assert content(folder) == content(tmp_path / "undisturbed")


def test_a_shard_that_ends_while_it_is_read_is_given_up(own: list[str], tmp_path: Path) -> None:
    class Cutting(Namer):
        def write(self, pixels: Any, seeds: Any) -> Any:
            os.truncate(own[1], 2048)
            return super().write(pixels, seeds)

    for workers in (0, 1):
        Path(own[1]).write_bytes(Path(own[0]).read_bytes())
        folder = tmp_path / f"out{workers}"
        options = {"captioners": {"captioner": Cutting()}, "num_workers": workers}
        with pytest.raises(ValueError, match=r"1 shard\(s\) cannot be read.*\n  00001.tar"):
            made(own, folder, **options)
        assert len(records.files(folder)) == 3


def test_a_full_disk_is_one_error_and_what_is_finished_stays(own: list[str], tmp_path: Path) -> None:
    """The system itself refuses to write more than so many bytes to a file, as it refuses to write to a full disk."""
    folder = tmp_path / "out"
    sizes = [path.stat().st_size for path in records.files(tmp_path / "undisturbed")]
    read, write = os.pipe()

    def work() -> None:
        class Filling(Namer):
            def write(self, pixels: Any, seeds: Any) -> Any:
                if len(records.files(folder)) == 2:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (min(sizes) // 2, resource.RLIM_INFINITY))
                return super().write(pixels, seeds)

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            made(own, folder, captioners={"captioner": Filling()}, scorers={"filter": Hasher()})
        except OSError as error:
            os.write(write, str(error).encode())
            raise

    child = apart(work)
    os.close(write)
    assert ended(child) == 1
    assert b"00002.tar.parquet cannot be written (File too large); what was finished before stays" in os.read(
        read, 10_000
    )
    assert [path.name for path in records.files(folder)] == ["00000.tar.parquet", "00001.tar.parquet"]
    assert not list(folder.rglob("*.partial"))
    made(own, folder, **both())
    assert content(folder) == content(tmp_path / "undisturbed")


def test_input_that_cannot_be_written_is_read_and_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLIP_CACHE", str(tmp_path / "cache"))
    shards = write_shards(tmp_path / "web", (3, 2))
    (tmp_path / "web").chmod(0o555)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "web").iterdir()}
    made([str(path) for path in shards], tmp_path / "out", **both())
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "web").iterdir()}
    assert before == after
    assert told(tmp_path / "out")["pictures"] == 5


def test_shards_behind_urls_are_read_like_local_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP_CACHE", str(tmp_path / "cache"))
    local = [str(path) for path in write_shards(tmp_path / "web", (5, 3))]
    made(local, tmp_path / "local", **both())
    with serving(tmp_path / "web") as server:
        made(f"{server.url}/{{00000..00001}}.tar", tmp_path / "distant", **both())
        (tmp_path / "web" / "00000.tar").unlink()
        with pytest.raises(ValueError, match=r"1 shard\(s\) cannot be read.*\n  00000.tar: .*404"):
            made(f"{server.url}/{{00000..00001}}.tar", tmp_path / "other", **both())
    assert {name: rows for name, (rows, _) in content(tmp_path / "distant").items()} == {
        name: rows for name, (rows, _) in content(tmp_path / "local").items()
    }
    assert len(records.files(tmp_path / "other")) == 1


# what is refused


def test_a_folder_with_records_of_another_pass_is_refused_and_left_as_it_is(own: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "undisturbed"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for changed, said in (
        ({"batch_size": 5}, "batch_size: 4 there, 5 now"),
        ({"seed": 7}, "seed: 42 there, 7 now"),
        ({"captioners": {"captioner": Namer(word="other")}}, "captioners: .*namer colour.* there, .*namer other.* now"),
        ({"scorers": {}}, "columns: "),
    ):
        with pytest.raises(ValueError, match=rf"(?s)records of another pass; name another folder.*{said}"):
            made(own, folder, **(both() | changed))
    with pytest.raises(ValueError, match=r"(?s)another pass.*input: "):
        made(own[:2], folder, **both())
    made(own, folder, **both(), worker=3, num_workers=1, prefetch=2, device="cpu")  # which decide nothing
    assert {path: path.read_bytes() for path in before} == before


def test_synthetic_texts_must_be_complete_and_of_the_same_shards(own: list[str], tmp_path: Path) -> None:
    generate = made(own, tmp_path / "generate", captioners={"captioner": Namer()})
    filtering = {"scorers": {"filter": Hasher()}, "synthetic": [str(generate)]}
    with pytest.raises(ValueError, match="texts for other shards"):
        made(own[:2], tmp_path / "other", **filtering)
    with pytest.raises(ValueError, match="two captioners are called captioner"):
        made(own, tmp_path / "other", **filtering, captioners={"captioner": Namer()})
    alone = made(own, tmp_path / "alone", scorers={"filter": Hasher()})
    with pytest.raises(ValueError, match="no captioner wrote texts there"):
        made(own, tmp_path / "other", **(filtering | {"synthetic": [str(alone)]}))
    (generate / "manifest.json").unlink()
    with pytest.raises(ValueError, match="its records are not complete"):
        made(own, tmp_path / "other", **filtering)
    with pytest.raises(ValueError, match="not the description of a pass"):
        made(own, tmp_path / "other", **(filtering | {"synthetic": [str(tmp_path)]}))
    (generate / "description.json").write_text('{"captioners": {}}')  # of another program
    with pytest.raises(ValueError, match=r"not the description of a pass; it says nothing of .*hash"):
        made(own, tmp_path / "other", **filtering)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nothing to do"),
        ({"captioners": {"captioner": None}}, "nothing to do"),
        ({"captioners": {"captioner": Namer()}, "synthetic": ["x"]}, "there is no scorer"),
        ({"scorers": {"filter": Hasher()}, "source": "synthetic"}, "web or human"),
        ({"scorers": {"filter": Hasher()}, "batch_size": 0}, "at least 1"),
    ],
    ids=str,
)
def test_options_that_make_no_pass_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Pass("nowhere/*.tar", **options)

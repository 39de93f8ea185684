"""A file is written whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from blip.files import own, whole, write_text


def test_a_file_is_put_in_its_place_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "it.txt"
    write_text(path, "one")
    (path.parent / ".it.txt.partial").write_bytes(b"half, of a killed process, and longer")
    write_text(path, "twö")
    assert path.read_bytes() == "twö".encode()
    assert os.listdir(path.parent) == ["it.txt"]


def test_what_is_written_is_not_seen_before_its_end(tmp_path: Path) -> None:
    path = tmp_path / "it.txt"
    path.write_text("old")
    with whole(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, events = tmp_path / "it.txt", []
    fsync, replace = os.fsync, os.replace

    def flushed(handle: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renamed(source: Path, target: Path) -> None:
        events.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    write_text(path, "it")
    assert events == [".it.txt.partial", "renamed", tmp_path.name]


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
@pytest.mark.parametrize("before", [True, False])
def test_a_full_disk_leaves_what_was_there_and_says_where(
    tmp_path: Path, monkeypatch, fails: str, before: bool
) -> None:
    path = tmp_path / "it.txt"
    if before:
        path.write_text("old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(*((Path, "write_text") if fails == "write" else (os, fails)), full)
        with pytest.raises(OSError, match=r"No space left on device: .*it\.txt"):
            write_text(path, "new")
    assert os.listdir(tmp_path) == (["it.txt"] if before else [])
    assert not before or path.read_text() == "old"


def test_any_other_error_passes_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "it.txt"
    path.write_text("old")

    def write() -> None:
        with whole(path) as partial:
            partial.write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert [path.read_text(), *os.listdir(tmp_path)] == ["old", "it.txt"]


def test_processes_that_write_the_same_file_do_not_share_the_partial_one(tmp_path: Path) -> None:
    path = tmp_path / "it.txt"
    pid = os.fork()
    if pid == 0:
        os._exit(0 if own(path).name != f".it.txt.{os.getppid()}.partial" and str(os.getpid()) in own(path).name else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert own(path).parent == path.parent
    assert str(os.getpid()) in own(path).name

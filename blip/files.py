"""Files that appear whole or not at all: written beside their place, brought to the disk, put in their place by a rename."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """Gives the path to write to in place of `path`, which has that file when the block has ended well, else what it had before.

    partial: that path, of the same file system. By default one beside `path` of a name that does not change, so that what a killed
    process left is written over; where several processes may write the same file at once, each needs its own (`own`).
    Raises what the block raises; an OSError bears a file's name.
    """
    partial = partial or path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _to_disk(partial)
        os.replace(partial, path)
        _to_disk(path.parent)  # the rename itself
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which
        raise
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def own(path: Path) -> Path:
    """A path beside `path` that no other process anywhere has."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.partial")


def write_text(path: Path, text: str, partial: Path | None = None) -> None:
    """Writes a file of this text, as UTF-8. See `whole`."""
    with whole(path, partial) as target:
        target.write_text(text, encoding="utf-8")


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

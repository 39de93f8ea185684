"""A user's own pictures: files, folders, patterns and tar shards as one list of places that bytes are read from."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blip.datamodules.images import MAX_BYTES, ImageError
from blip.datamodules.scan import members

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class Place:
    """Where a picture lies: a file, or `size` bytes at `offset` of a shard. `name` is the path, in a shard `SHARD/MEMBER`."""

    name: str
    path: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Its bytes; ImageError where it cannot be read or is larger than a picture may be."""
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size if self.size is None else self.size
                if size > MAX_BYTES:
                    raise ImageError("too large", f"{size} bytes, at most {MAX_BYTES} are read")
                file.seek(self.offset)
                return file.read(size)
        except OSError as error:
            raise ImageError("unreadable", error.strerror or str(error)) from error


def find(inputs: Sequence[str | Path]) -> list[Place]:
    """The pictures of files, folders (with all below), glob patterns and `.tar` shards, each once, in the order given.

    In folders and shards a picture is told by its ending; a file that is named is taken as it is. ValueError where an input
    names nothing, or a shard is damaged.
    """
    found: dict[str, Place] = {}
    for given in [os.fspath(each) for each in inputs]:
        paths = [given] if os.path.exists(given) else sorted(glob.glob(os.path.expanduser(given), recursive=True))
        places = [place for path in paths for place in _places(path)]
        if not places:
            raise ValueError(f"{given}: " + ("no picture there" if paths else "no such file, folder or pattern"))
        found.update((place.name, place) for place in places)
    return list(found.values())


def _places(path: str) -> Iterator[Place]:
    if os.path.isdir(path):
        for folder, folders, names in os.walk(path):
            folders.sort()
            for name in sorted(names):
                inside = os.path.join(folder, name)
                if name.lower().endswith((*PICTURES, ".tar")):
                    yield from _places(inside)
    elif path.lower().endswith(".tar"):
        yield from _members(path)
    else:
        yield Place(path, path)


def _members(shard: str) -> Iterator[Place]:
    try:
        with open(shard, "rb") as file:
            for member in members(file, os.fstat(file.fileno()).st_size):
                if member.isreg() and not member.issparse() and member.name.lower().endswith(PICTURES):
                    yield Place(f"{shard}/{member.name}", shard, member.offset_data, member.size)
    except ValueError as error:
        raise ValueError(f"{shard}: {error}") from error

"""Bytes of pairs from where their shards lie: files on this machine, or URLs (`remote.py`)."""

from __future__ import annotations

import glob
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from blip.datamodules.remote import Remote, is_url

OPEN_FILES = 256  # descriptors kept a process
NEAR = 65536  # an image and a text closer than this (bytes) come with one read


@dataclass(frozen=True)
class Span:
    """Where one pair lies: a shard's location and its size, and (offset, length) of the picture and of the text."""

    location: str
    shard_size: int
    image: tuple[int, int]
    text: tuple[int, int]

    @property
    def reads(self) -> list[tuple[int, int]]:
        """(offset, length) of the reads that bring both: one where they are neighbours."""
        start = min(self.image[0], self.text[0])
        end = max(sum(self.image), sum(self.text))
        if end - start <= self.image[1] + self.text[1] + NEAR:
            return [(start, end - start)]
        return [self.image, self.text]

    def split(self, read: Sequence[bytes]) -> tuple[bytes, bytes]:
        """(picture, text) out of what `reads` brought."""
        if len(read) == 2:
            return read[0], read[1]
        start = min(self.image[0], self.text[0])
        image, text = self.image[0] - start, self.text[0] - start
        return read[0][image : image + self.image[1]], read[0][text : text + self.text[1]]


class Reader:
    """Reads pairs in the order in which they lie, gives them back in the order asked; safe to fork and to pickle."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, int] = OrderedDict()
        self._remote = Remote()

    def __getstate__(self) -> dict:
        return {}  # descriptors and connections belong to a process

    def __setstate__(self, _: dict) -> None:
        self.__init__()  # type: ignore[misc]

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def read(self, spans: Sequence[Span]) -> list[tuple[bytes, bytes]]:
        """(picture, text) of each span. OSError where a shard cannot be read, ValueError where it is not the one indexed."""
        order = sorted(range(len(spans)), key=lambda i: (spans[i].location, spans[i].image))
        distant = [i for i in order if is_url(spans[i].location)]
        found = dict(zip(distant, self._remote.read([spans[i] for i in distant]), strict=True)) if distant else {}
        for i in order:
            if i not in found:
                found[i] = spans[i].split([self._pread(spans[i].location, *read) for read in spans[i].reads])
        return [found[i] for i in range(len(spans))]

    def _pread(self, location: str, offset: int, length: int) -> bytes:
        # pread has no file position, so a descriptor that a fork shares does no harm
        if location in self._files:
            self._files.move_to_end(location)
        else:
            while len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[location] = os.open(location, os.O_RDONLY)
        data = os.pread(self._files[location], length, offset)
        if len(data) != length:
            raise ValueError(f"{location}: ends before byte {offset + length}; it changed since its index was made")
        return data


def expand(shards: str | Path | Sequence[str | Path]) -> list[str]:
    """Locations of shards, from paths, brace and glob patterns and URLs, in the order given (globs sorted)."""
    locations: list[str] = []
    for pattern in [shards] if isinstance(shards, str | Path) else shards:
        for name in braceexpand(os.path.expanduser(os.fspath(pattern)), escape=False):
            if name.startswith("pipe:") or ("://" in name and not is_url(name)):
                raise ValueError(
                    f"{name}: shards are local files or http(s) URLs; nothing is run or guessed to reach them"
                )
            found = [name] if is_url(name) else sorted(glob.glob(name))
            if not found:
                raise ValueError(f"no shard matches {name} (pattern {pattern}, working folder {os.getcwd()})")
            locations.extend(found if is_url(name) else map(os.path.abspath, found))
    for location in locations:
        if location.split("?")[0].endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
            raise ValueError(f"{location}: compressed, so no pair can be read by its place; unpack it to a plain .tar")
    if len(set(locations)) != len(locations):
        twice = next(name for name in locations if locations.count(name) > 1)
        raise ValueError(f"{twice}: named twice in {shards}")
    return locations


def common_root(locations: Sequence[str]) -> tuple[str, list[str]]:
    """(folder or URL that holds all, names relative to it without what follows a question mark)."""
    plain = [name.split("?")[0] if is_url(name) else name for name in locations]
    root = os.path.commonpath([os.path.dirname(name) for name in plain]) if not is_url(plain[0]) else _url_root(plain)
    return root, [name[len(root) :].lstrip("/") for name in plain]


def _url_root(urls: Sequence[str]) -> str:
    parts = [url.split("/")[:-1] for url in urls]
    shared = next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), min(map(len, parts)))
    if shared < 3:
        raise ValueError(f"{urls[0]} ... {urls[-1]}: shards of one source must come from one server; make two sources")
    return "/".join(parts[0][:shared])

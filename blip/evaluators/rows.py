"""Tensors of one shape in a temporary file: what a large evaluation set needs lies on disk, what is asked for in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from blip.evaluators.collect import from_all_ranks


class Rows:
    """Rows [n, ...] of one dtype in a file without a name in `folder` (None: the system's), gone with the last reference.

    OSError: the folder has no room.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = folder
        self.count = 0
        self.like: Tensor | None = None  # a row's shape and dtype, without memory

    def __len__(self) -> int:
        return self.count

    def append(self, rows: Tensor) -> None:
        self.put(range(self.count, self.count + len(rows)), rows)

    def put(self, places: range | list[int], rows: Tensor) -> None:
        """Writes rows [n, ...] at n places; what lies between those ever written is zero."""
        if not len(rows):
            return
        rows = rows.detach().cpu().contiguous()
        if self.like is None:
            self._open(rows)
        assert self.like is not None
        if rows[0].shape != self.like.shape or rows.dtype != self.like.dtype:
            raise ValueError(f"rows of {list(rows[0].shape)} {rows.dtype} among {self.like.shape} {self.like.dtype}")
        content = rows.flatten().view(torch.uint8).numpy().data
        try:
            for at, start, stop in runs(places):
                self._write(content[at * self.size :][: (stop - start) * self.size], start * self.size)
        except OSError as error:
            where = self.folder or tempfile.gettempdir()
            raise OSError(f"{where}: {error.strerror or error}: name a folder with more room") from error
        self.count = max(self.count, max(places) + 1)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1."""
        return self.take(range(start, stop))

    def take(self, places: range | list[int]) -> Tensor:
        """The rows at these places, in this order, [n, ...]."""
        if self.like is None:
            raise ValueError("no row was ever written, so that their shape is not known")
        content = bytearray(len(places) * self.size)
        for at, start, stop in runs(places):
            part = memoryview(content)[at * self.size :][: (stop - start) * self.size]
            if os.preadv(self.file.fileno(), [part], start * self.size) != len(part):
                raise OSError(f"rows {start} to {stop} of {self.count} could not be read")
        if not content:
            return torch.empty(0, *self.like.shape, dtype=self.like.dtype)
        return torch.frombuffer(content, dtype=self.like.dtype).view(-1, *self.like.shape)

    def blocks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """(number of its first row, rows) of all rows, so many at a time."""
        for start in range(0, self.count, size):
            yield start, self.read(start, min(start + size, self.count))

    def _open(self, rows: Tensor) -> None:
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
        self.file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  closed with the last reference
        self.like = rows[0].to("meta")
        self.size = rows[0].numel() * rows.element_size()

    def _write(self, content: memoryview, offset: int) -> None:
        while content:
            written = os.pwrite(self.file.fileno(), content, offset)
            content, offset = content[written:], offset + written


def runs(places: range | list[int]) -> Iterator[tuple[int, int, int]]:
    """(at, start, stop): where `places` goes on one by one from start to stop - 1, beginning with its own entry `at`."""
    at = 0
    while at < len(places):
        end = at + 1
        while end < len(places) and places[end] == places[end - 1] + 1:
            end += 1
        yield at, places[at], places[end - 1] + 1
        at = end


def of_all_ranks(own: Rows, places: list[int], at_once: int) -> Rows:
    """The rows of all ranks in a file of this rank, each at its place among all; so many of each rank travel at once."""
    everyone = Rows(own.folder)
    for start in range(0, max(from_all_ranks([len(own)])), at_once):
        stop = min(start + at_once, len(own))
        part = (places[start:stop], own.read(start, stop)) if start < stop else ([], torch.empty(0))
        for where, rows in from_all_ranks([part]):
            everyone.put(where, rows)
    return everyone

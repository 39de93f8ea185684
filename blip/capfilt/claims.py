"""Shards taken by any number of processes on any number of machines, with no coordination but a folder.

A shard that has its file in `FOLDER/records` is done. One that is being worked on is locked by its process; the kernel frees the lock
when that process ends, however it ends. Where a file system has no locks, or has them for one machine alone, two may do the same
shard, which costs time and nothing else: what they write is the same, and each file appears whole.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from blip.capfilt.records import WORK, partial
from blip.datamodules.views import record_file

SPREAD = 0.6180339887  # of the golden ratio: k multiples of it, less their whole part, are spread evenly for every k
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class Claims:
    """Takes shards one by one. `names` are those of all shards; `worker`, any number, says with which of them to begin."""

    def __init__(self, folder: Path, names: Sequence[str], worker: int = 0) -> None:
        self.folder, self.names = folder, names
        self.work = folder / WORK  # locks and files in the making
        start = int(worker * SPREAD % 1 * len(names))
        self.order = [*range(start, len(names)), *range(start)]
        self.held: dict[int, int] = {}  # shard -> descriptor of its lock
        self.given_up: set[int] = set()
        self.left: dict[int, list[Path]] = {}  # files in the making when it was last looked, by shard

    def done(self) -> set[int]:
        """The shards that have their records, whoever wrote them."""
        there = {str(path) for path in (self.folder / "records").rglob("*.parquet")}
        return {n for n, name in enumerate(self.names) if str(record_file(self.folder, name)) in there}

    def __iter__(self) -> Iterator[int]:
        """Shards that are neither done nor worked on, locked for this process, until there are none."""
        taken = True
        while taken:  # again, for a process that held one may have ended
            taken = False
            done = self._look()
            for shard in self.order:
                if shard not in done and shard not in self.held and shard not in self.given_up and self._lock(shard):
                    taken = True
                    yield shard

    def partial(self, shard: int) -> Path:
        """Where the records of a shard are written before they are put in their place."""
        return partial(self.folder, f"{shard:06d}")

    def release(self, shard: int, give_up: bool = False) -> None:
        """Frees a shard that is done, or whose records cannot be had (`give_up`)."""
        if give_up:
            self.given_up.add(shard)
        os.close(self.held.pop(shard))

    def close(self) -> None:
        """Frees what is held."""
        for shard in [*self.held]:
            self.release(shard)

    def clear(self) -> None:
        """Takes away locks and files in the making, when all is done."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _lock(self, shard: int) -> bool:
        """Whether the shard is this process's now: locked, and still not done."""
        descriptor = -1
        while descriptor < 0:
            if record_file(self.folder, self.names[shard]).is_file():
                return False
            self.work.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # who finished the last shard has just taken the folder away
                descriptor = os.open(self.work / f"{shard:06d}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # a lock of this process: the loader's workers, which outlive a kill by seconds, do not have it too
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return False  # another process has it
                raise
        else:
            for left in self.left.pop(shard, []):  # by a process that was killed, else it had the lock
                left.unlink(missing_ok=True)
        if record_file(self.folder, self.names[shard]).is_file():
            os.close(descriptor)
            return False
        self.held[shard] = descriptor
        return True

    def _look(self) -> set[int]:
        """The shards that are done; notes what files in the making there are."""
        self.left = {}
        with suppress(FileNotFoundError):  # the first to come, or who finished the last shard has taken it away
            for name in os.listdir(self.work):
                if name[:1].isdigit() and name.endswith(".partial"):
                    self.left.setdefault(int(name.partition(".")[0]), []).append(self.work / name)
        return self.done()

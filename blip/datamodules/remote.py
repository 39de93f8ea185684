"""Shards behind URLs: ranges of bytes over kept connections, or whole shards through a cache where a server has no ranges.

What arrives is checked against the index (size of the shard with every answer, digest of a whole shard), and tried again when
a server fails or a connection is cut; what query a URL carries, it may be a signature, is not shown in messages.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import urllib3
from filelock import FileLock

from blip.datamodules.locations import cache_folder, is_url, shown

THREADS = 8  # with 20 ms to the server: 38 pairs/s on one thread, 260 on eight
ATTEMPTS = 6
FIRST_WAIT = 0.2  # seconds before the second attempt, doubled for each further one
CHUNK = 1 << 20

T = TypeVar("T")


class Shard(NamedTuple):
    """A shard as its index knows it: location, size in bytes, blake2b digest."""

    location: str
    size: int
    digest: str


class NoRangesError(Exception):
    """The server answers with the whole file when asked for a part."""


class _TryAgainError(Exception):
    """A failure that may pass."""


class Remote:
    """Brings parts of shards, several at a time. Each process makes its own threads and connections."""

    def __init__(self, cache_bytes: int | None = None) -> None:
        self.cache_bytes = cache_bytes
        self._process = 0
        self.ahead: threading.Thread | None = None
        self._whole: set[str] = set()  # servers that are known to have no ranges

    def __getstate__(self) -> dict:
        return {"cache_bytes": self.cache_bytes, "_process": 0, "_whole": self._whole, "ahead": None}

    def read(self, asked: Sequence[tuple[Shard, Sequence[tuple[int, int]]]]) -> list[list[bytes] | Path]:
        """For each (shard, its (offset, length) reads): the bytes, or the file in the cache to read them from."""
        return list(self._threads().map(self._bring, asked))

    def fetch_ahead(self, shards: Sequence[Shard]) -> None:
        """Begins to bring whole shards of servers without ranges into the cache, beside the reading, and does not wait."""
        wanted = [shard for shard in shards if is_url(shard.location) and _server(shard.location) in self._whole]
        if wanted:
            self._threads()
            self.ahead = threading.Thread(target=self._fetch_all, args=(wanted,), daemon=True)
            self.ahead.start()

    def _fetch_all(self, shards: Sequence[Shard]) -> None:
        # a failure is not lost: who reads the shard meets it again
        with suppress(OSError, ValueError):
            for shard in shards:
                self._cached(shard)

    def _threads(self) -> ThreadPoolExecutor:
        if self._process != os.getpid():  # threads and connections do not survive a fork
            self._process = os.getpid()
            self._pool = _connections()
            self._executor = ThreadPoolExecutor(THREADS)
        return self._executor

    def _bring(self, asked: tuple[Shard, Sequence[tuple[int, int]]]) -> list[bytes] | Path:
        shard, reads = asked
        if _server(shard.location) not in self._whole:
            try:
                return [_patiently(partial(self._range, shard, *read), shard.location) for read in reads]
            except NoRangesError:
                self._whole.add(_server(shard.location))
        return self._cached(shard)

    def _cached(self, shard: Shard) -> Path:
        return cached(shard, self._pool, self.cache_bytes)

    def _range(self, shard: Shard, offset: int, length: int) -> bytes:
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        with _answer(self._pool, shard.location, headers) as answer:
            if answer.status == 200:
                raise NoRangesError
            bounds, _, total = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            if answer.status == 416 or total not in ("", "*", str(shard.size)):
                raise ValueError(
                    f"{shown(shard.location)}: {total or 'fewer'} bytes at the server, {shard.size} when its index was made; "
                    "index it anew"
                )
            data = answer.read()
        if bounds != f"{offset}-{offset + length - 1}" or len(data) != length:
            raise _TryAgainError(
                f"{len(data)} bytes ({bounds or 'no Content-Range'}) in place of {length} from {offset}"
            )
        return data


def _server(url: str) -> str:
    return "/".join(url.split("/")[:3])


def _connections() -> urllib3.PoolManager:
    patience = urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5)
    timeout = urllib3.Timeout(connect=10, read=60)
    return urllib3.PoolManager(maxsize=THREADS, retries=patience, timeout=timeout)


@contextmanager
def _answer(
    pool: urllib3.PoolManager, url: str, headers: dict[str, str] | None = None
) -> Iterator[urllib3.BaseHTTPResponse]:
    """An answer of status 200, 206 or 416. Its connection is kept if all of it was read, else closed: a shard would follow."""
    headers = {"Accept-Encoding": "identity", **(headers or {})}
    answer = pool.request("GET", url, headers=headers, preload_content=False)
    try:
        if answer.status >= 500 or answer.status in (408, 425, 429):
            raise _TryAgainError(f"status {answer.status}")
        if answer.status not in (200, 206, 416):
            gone = answer.status in (404, 410)
            raise (FileNotFoundError if gone else PermissionError)(f"status {answer.status}")
        yield answer
    finally:
        answer.close()


def _patiently(bring: Callable[[], T], url: str) -> T:
    """What `bring` gives, tried again after failures that may pass; OSError that names the URL when it does not."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return bring()
        except (_TryAgainError, urllib3.exceptions.HTTPError) as error:
            if attempt == ATTEMPTS:
                query = url.partition("?")[2]
                why = str(error).replace(query, "...") if query else str(error)
                raise OSError(f"{shown(url)}: failed {ATTEMPTS} times, at last: {why}") from None
        except (FileNotFoundError, PermissionError) as error:
            raise type(error)(f"{shown(url)}: {error}") from None
        time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
    raise AssertionError("not reached")


def fetch_file(url: str, path: Path | None = None, pool: urllib3.PoolManager | None = None) -> Path:
    """Fetches a whole file to `path`, over what a killed fetch left there. OSError where it cannot be had.

    Without `path` it goes to a new temporary file in the cache.
    """
    pool = pool or _connections()
    target = path or _temporary()

    def bring() -> Path:
        try:
            with open(target, "wb") as file, _answer(pool, url) as answer:
                for chunk in answer.stream(CHUNK):  # a cut body raises: it is compared with Content-Length
                    file.write(chunk)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        return target

    return _patiently(bring, url)


def _temporary() -> Path:
    cache_folder().mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(suffix=".part", dir=cache_folder())
    os.close(descriptor)
    return Path(name)


def digest_of(path: str | Path) -> str:
    """blake2b of a file, 32 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def cached(shard: Shard, pool: urllib3.PoolManager | None = None, cache_bytes: int | None = None) -> Path:
    """The whole shard as a file in the cache, fetched under a lock if it is not there; the least used make room."""
    folder = cache_folder() / "shards"
    # named by the whole URL: the last part of it is the same in every data set that img2dataset wrote
    path = folder / f"{hashlib.blake2b(shard.location.encode(), digest_size=16).hexdigest()}-{shard.digest}.tar"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                fetched = fetch_file(shard.location, path.with_suffix(".part"), pool)
                if (size := fetched.stat().st_size) != shard.size or digest_of(fetched) != shard.digest:
                    os.unlink(fetched)
                    raise ValueError(
                        f"{shown(shard.location)}: not the shard that was indexed ({size} bytes there, {shard.size} indexed); "
                        "index it anew"
                    )
                os.replace(fetched, path)
        if cache_bytes is not None:
            _make_room(folder, cache_bytes, path)
    os.utime(path)
    return path


def _make_room(folder: Path, limit: int, keep: Path) -> None:
    """Removes the shards used longest ago until `limit` bytes are left; who has one open can still read it."""
    files = []
    for path in folder.glob("*.tar"):
        try:
            files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        except FileNotFoundError:
            continue  # another process made room
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total > limit and path != keep:
            path.unlink(missing_ok=True)
            total -= size

"""What is in a set of tar shards: made once, checked strictly, fingerprinted.

Shards stay where they are and as they are (WebDataset's layout as img2dataset writes it: `KEY.jpg|jpeg|png|webp` with `KEY.txt`
and/or `KEY.json`; `records.py` says what else a record can be). An index enumerates the entries of one kind of records. It is one
file beside the shards, or in the cache where they are read-only, and is opened by `memmap`:

    pictures     [P]    where a record's picture (pictures, clip) and text lie in their shard (25 bytes each, 12 more for two)
    shard_starts [S+1]  running sum of records, one a shard
    text_starts  [P+1]  running sum of entries, one a record: row r of the data is (record, entry number)
    keys                the keys as one blob with offsets
    texts               only in the index of a view (`view_index.py`): the texts themselves, which then are not read from the shards
    names, sizes, times, digests [S]   of the shards, names relative to the folder that holds them all

A shard that is damaged stops the making (`BrokenShardsError` names every one); a record that lacks a member, has no text or does
not decode, and an entry that is not as it should be, gets no row and is counted by reason in `Index.report`. Only pictures, clips
and texts are ever read: no member is unpickled.

    build_index(shards, out=None, verify=True, progress=None, workers=0, records="pairs") -> Index      make and write
    open_index(shards, index=None, records="pairs") -> Index                    open; made first where missing and local
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from blip.datamodules.index_file import note_time, read, write
from blip.datamodules.locations import cache_folder, common_root, expand, is_url, shown, writable
from blip.datamodules.records import PAIRS, Kind, kind_of
from blip.datamodules.remote import Shard, digest_of, fetch_file
from blip.datamodules.scan import Scan, scan

NAMED = 100  # names kept for each reason of leaving out


class BrokenShardsError(ValueError):
    """Shards that cannot be indexed; `shards` has name -> what is wrong."""

    def __init__(self, shards: dict[str, str]) -> None:
        self.shards = shards
        listed = "\n".join(f"  {name}: {wrong}" for name, wrong in shards.items())
        super().__init__(f"{len(shards)} shard(s) are damaged; fetch them anew or leave them out:\n{listed}")


@dataclass
class Spread:
    """Least, median and greatest of a quantity; all None when nothing was measured."""

    min: float | None = None
    median: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        return cls(int(values.min()), float(np.median(values)), int(values.max())) if len(values) else cls()


@dataclass
class Report:
    """What the making of an index found.

    records: their kind; texts: entries, which are the rows; skipped: reason -> count; skipped_names: reason -> first "shard: key"
    """

    records: str = PAIRS.name
    shards: int = 0
    pictures: int = 0
    texts: int = 0
    bytes: int = 0
    verified: bool = False
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_names: dict[str, list[str]] = field(default_factory=dict)
    width: Spread = field(default_factory=Spread)
    height: Spread = field(default_factory=Spread)
    image_bytes: Spread = field(default_factory=Spread)
    caption_words: Spread = field(default_factory=Spread)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        spreads = {name: Spread(**values[name]) for name in ("width", "height", "image_bytes", "caption_words")}
        return cls(**(values | spreads))


class Index:
    """An opened index: arrays by `memmap` (shared by all processes), the locations of the shards, the report."""

    def __init__(self, path: Path, shards: Sequence[str]) -> None:
        self.path = path
        head, arrays = read(path)
        self.fingerprint: str = head["fingerprint"]
        self.report = Report.from_dict(head["report"])
        self.kind: Kind = kind_of(self.report.records)
        self.pictures: np.ndarray = arrays["pictures"]
        self.shard_starts: np.ndarray = arrays["shard_starts"]
        self.text_starts: np.ndarray = arrays["text_starts"]
        self.names, self.sizes, self.times = arrays["names"], arrays["sizes"], arrays["times"]
        self.digests = arrays["digests"]
        if not all(re.fullmatch(rb"[0-9a-f]{32}", digest) for digest in self.digests.tolist()):
            raise ValueError(
                f"{path}: a digest that is none, and digests name files of the cache; do not use this index"
            )
        self._keys, self._key_starts = arrays["keys"], arrays["key_starts"]
        self._texts = arrays.get("texts")
        # one buffer, not a list: reference counts of a list's strings would copy its pages into every worker
        self.locations = np.array([os.fsencode(s) for s in shards])
        _, names = common_root(shards)
        if [os.fsencode(n) for n in names] != self.names.tolist():
            raise ValueError(
                f"{path}: this index is of {len(self.names)} shards ({os.fsdecode(self.names[0])} ...), not of the "
                f"{len(names)} given ({names[0]} ...); make one for them with `blip data index`"
            )

    def __reduce__(self) -> tuple:
        return Index, (self.path, [os.fsdecode(s) for s in self.locations])  # opened anew, not copied

    def __len__(self) -> int:
        """Number of rows: pairs of one record and one of its entries."""
        return int(self.text_starts[-1])

    def places(self, picture: int) -> tuple[int, list[tuple[int, int]], bool]:
        """(number of the shard, places of the pictures and last of the text, (offset, length) each, whether that is JSON).

        An index that holds the texts itself (`text`) gives the places of the pictures alone.
        """
        row = self.pictures[picture]
        at, size = np.atleast_1d(row["image_at"]).tolist(), np.atleast_1d(row["image_size"]).tolist()
        text = [(int(row["text_at"]), int(row["text_size"]))] if self._texts is None else []
        return int(self.shard_of(picture)), [*zip(at, size, strict=True), *text], bool(row["json"])

    def text(self, picture: int) -> bytes | None:
        """The member that holds the texts of a record where it lies in the index itself, None where it lies in its shard."""
        if self._texts is None:
            return None
        row = self.pictures[picture]
        return self._texts[int(row["text_at"]) : int(row["text_at"]) + int(row["text_size"])].tobytes()

    def shard(self, shard: int) -> Shard:
        return Shard(self.location(shard), int(self.sizes[shard]), self.digests[shard].decode())

    def location(self, shard: int) -> str:
        return os.fsdecode(self.locations[shard])

    def name(self, shard: int) -> str:
        return os.fsdecode(self.names[shard])

    def key(self, picture: int) -> str:
        return self.keys(picture, picture + 1)[0].decode(errors="replace")

    def keys(self, start: int, stop: int) -> list[bytes]:
        """The keys of the records from start to stop, as they stand in their shards."""
        ends = self._key_starts[start : stop + 1].tolist()
        blob = self._keys[ends[0] : ends[-1]].tobytes()
        return [blob[a - ends[0] : b - ends[0]] for a, b in pairwise(ends)]

    def full_name(self, picture: int) -> str:
        """ "shard: key", by which a person finds the pair."""
        return f"{self.name(int(self.shard_of(picture)))}: {self.key(picture)}"

    def shard_of(self, pictures: np.ndarray | int) -> np.ndarray:
        return np.searchsorted(self.shard_starts, pictures, side="right") - 1

    def picture_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows -> (pictures, text numbers)."""
        pictures = np.searchsorted(self.text_starts, rows, side="right") - 1
        return pictures, rows - self.text_starts[pictures]

    def text_counts(self, pictures: np.ndarray) -> np.ndarray:
        return self.text_starts[np.asarray(pictures) + 1] - self.text_starts[pictures]

    def check_files(self) -> None:
        """ValueError where a local shard is gone, has another size, or another time and other bytes."""
        for shard in range(len(self.names)):
            self.check_file(shard)

    def check_file(self, shard: int) -> None:
        """The same of one shard."""
        location, size = self.location(shard), int(self.sizes[shard])
        if is_url(location):
            return  # the size is checked with every answer of the server
        try:
            now = os.stat(location)
        except FileNotFoundError:
            raise ValueError(f"{location}: the shard is gone since its index was made ({self.path})") from None
        if now.st_size != size:
            raise ValueError(f"{location}: {now.st_size} bytes, {size} when its index was made; {_again(self.path)}")
        if now.st_mtime_ns != self.times[shard]:
            if digest_of(location) != self.digests[shard].decode():
                raise ValueError(f"{location}: its bytes changed since its index was made; {_again(self.path)}")
            note_time(self.path, shard, now.st_mtime_ns)


def _again(path: Path) -> str:
    return f"if that is meant, delete {path} and start again"


# Making


def picture_type(kind: Kind) -> np.dtype:
    """A row of `Index.pictures`: of several pictures, places are [n]."""
    n = () if kind.pictures == 1 else (kind.pictures,)
    image = [("image_at", "<u8", n), ("image_size", "<u4", n)]
    return np.dtype([*image, ("text_at", "<u8"), ("text_size", "<u4"), ("json", "u1")])


def index_name(names: Sequence[str], records: str = PAIRS.name) -> str:
    """File name of the index of shards of these names (relative to the folder that holds them)."""
    return f"{records}-{hashlib.blake2b(chr(10).join(names).encode(), digest_size=6).hexdigest()}.index"


def build_index(
    shards: str | Path | Sequence[str | Path],
    out: Path | str | None = None,
    verify: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
    workers: int = 0,
    records: str = PAIRS.name,
) -> Index:
    """Makes the index of these shards (paths, patterns or URLs), writes it and opens it.

    `out` None: beside local shards, in the cache where their folder is read-only. `verify` decodes every picture once
    and leaves out those that fail. `progress(done, of, name)` is called after each shard; `workers` processes share the
    shards; `records` is the kind of them (`records.KINDS`). Raises BrokenShardsError when shards are damaged, ValueError when
    none has such a record.
    """
    kind, locations = kind_of(records), expand(shards)
    root, names = common_root(locations)
    target = Path(out) if out is not None else _places(root, names, records)[0]
    scans: list[Scan] = []
    for done, found in enumerate(_scans(locations, verify, workers, records), start=1):
        scans.append(found)
        if progress is not None:
            progress(done, len(locations), names[done - 1])
    if broken := {locations[i]: s.broken for i, s in enumerate(scans) if s.broken}:
        raise BrokenShardsError(broken)
    report = _report(scans, names, verify, records)
    if not report.pictures:
        raise ValueError(f"{root}: no {kind.one} in {len(names)} shard(s); left out: {report.skipped or 'nothing'}")
    key_blobs = [os.fsencode(key) for s in scans for key in s.keys]
    arrays = {
        "pictures": np.array([p for s in scans for p in s.pictures], dtype=picture_type(kind)),
        "shard_starts": _running_sum([len(s.pictures) for s in scans]),
        "text_starts": _running_sum([n for s in scans for n in s.texts]),
        "keys": np.frombuffer(b"".join(key_blobs), dtype=np.uint8),
        "key_starts": _running_sum([len(k) for k in key_blobs]),
        "names": np.array([os.fsencode(n) for n in names]),
        "digests": np.array([s.digest.encode() for s in scans]),
        "sizes": np.array([s.size for s in scans], dtype="<i8"),
        "times": np.array([s.time for s in scans], dtype="<i8"),
    }
    write(target, arrays, asdict(report))
    return Index(target, locations)


def _scans(locations: list[str], verify: bool, workers: int, records: str) -> Iterator[Scan]:
    options = [verify] * len(locations), [records] * len(locations)
    if not workers:
        yield from map(scan, locations, *options)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        yield from pool.map(scan, locations, *options)


def _running_sum(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype="<i8")]).astype("<i8")


def _report(scans: list[Scan], names: list[str], verified: bool, records: str) -> Report:
    skipped = [
        (reason, f"{name}: {key}") for name, found in zip(names, scans, strict=True) for reason, key in found.skipped
    ]
    named: dict[str, list[str]] = {}
    for reason, name in skipped:
        named.setdefault(reason, []).append(name)

    def spread(values: str) -> Spread:
        return Spread.of(np.array([v for s in scans for v in getattr(s, values)]))

    return Report(
        records=records,
        shards=len(names),
        pictures=sum(len(s.pictures) for s in scans),
        texts=sum(sum(s.texts) for s in scans),
        bytes=sum(s.size for s in scans),
        verified=verified,
        skipped=dict(Counter(reason for reason, _ in skipped).most_common()),
        skipped_names={reason: found[:NAMED] for reason, found in named.items()},
        width=spread("widths"),
        height=spread("heights"),
        image_bytes=spread("image_bytes"),
        caption_words=spread("words"),
        notes=[note for s in scans for note in s.notes],
    )


# Finding it, or making it where it is missing


def _places(root: str, names: Sequence[str], records: str, url: str = "") -> list[Path]:
    """Where the index may be, best first: of local shards beside them if that can be written, else in the cache."""
    tag = hashlib.blake2b(f"{root} {url}".encode(), digest_size=6).hexdigest()
    cached = cache_folder() / "indexes" / f"{tag}-{index_name(names, records)}"
    if is_url(root):
        return [cached]
    folder = Path(root)
    beside = folder / index_name(names, records)
    return [beside, cached] if writable(folder) else [cached, beside]


def open_index(
    shards: str | Path | Sequence[str | Path],
    index: Path | str | None = None,
    verify: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
    records: str = PAIRS.name,
    check: bool = True,
) -> Index:
    """Opens the index of these records in these shards; of local ones it is made first where it is missing, under a lock.

    `index` is a file (or the URL of one) made with `build_index`, for shards that lie elsewhere; without it the index of
    URLs is looked for beside them under `index_name`. Raises ValueError when shards changed since, or none is found. `check`
    false: who takes shards one by one asks `check_file` of each.
    """
    locations = expand(shards)
    root, names = common_root(locations)
    if index is not None and not is_url(str(index)):
        opened = _of_kind(Index(Path(index), locations), records)
        for shard, size in enumerate(opened.sizes.tolist() if check else []):
            if not is_url(root) and os.stat(locations[shard]).st_size != size:
                raise ValueError(f"{locations[shard]}: not the {size} bytes that {index} was made of")
        return opened
    places = _places(root, names, kind_of(records).name, str(index or ""))
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        places[0].parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{places[0]}.lock"):
            if not places[0].is_file():
                if is_url(root):
                    _fetch(str(index or f"{root}/{index_name(names, records)}"), places[0])
                else:
                    return build_index(shards, places[0], verify, progress, 0, records)
        found = places[0]
    opened = _of_kind(Index(found, locations), records)
    if check:
        opened.check_files()
    return opened


def _of_kind(index: Index, records: str) -> Index:
    if index.kind.name != records:
        raise ValueError(
            f"{index.path}: an index of {index.kind.name}, not of {records}; make one with `blip data index`"
        )
    return index


def _fetch(url: str, path: Path) -> None:
    try:
        os.replace(fetch_file(url, path.with_name(f"{path.name}.part")), path)
    except OSError as error:
        raise ValueError(
            f"{shown(url)}: no index there ({error}); make one with `blip data index SHARDS --out FILE` and give it as `index`"
        ) from error

"""What is in a set of tar shards: made once, checked strictly, fingerprinted.

Shards stay where they are and as they are (WebDataset's layout as img2dataset writes it: `KEY.jpg|jpeg|png|webp` with `KEY.txt`
and/or `KEY.json`). The index is one file beside them, or in the cache where they are read-only, and is opened by `memmap`:

    pictures     [P]    where image and text lie in their shard (25 bytes each)
    shard_starts [S+1]  running sum of pictures, one a shard
    text_starts  [P+1]  running sum of texts, one a picture: row r of the data is (picture, text number)
    keys                the keys as one blob with offsets
    names, sizes, times, digests [S]   of the shards, names relative to the folder that holds them all

A shard that is damaged stops the making (`BrokenShards` names every one); a pair that lacks a member, has no text or does not
decode gets no row and is counted by reason in `Index.report`. Only pictures and texts are ever read: no member is unpickled.

    build_index(shards, out=None, verify=True, progress=None, workers=0) -> Index      make and write
    open_index(shards, index=None) -> Index                                            open; made first where missing and local
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from filelock import FileLock

from blip.datamodules.images import ImageError, decode
from blip.datamodules.remote import cache_folder, fetch_file, is_url
from blip.datamodules.shards import common_root, expand

PICTURES = ("jpg", "jpeg", "png", "webp")
KEY = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]*)$")  # WebDataset's rule: up to the first dot of the base name
PICTURE = np.dtype(
    [("image_at", "<u8"), ("image_size", "<u4"), ("text_at", "<u8"), ("text_size", "<u4"), ("json", "u1")]
)
MAGIC = b"BLIP index 1\n"
NAMED = 100  # names kept for each reason of leaving out
NOTHING = ' \t\r\n.!"()*#:;~'  # what cleaning takes from a caption (PAPER 6): a text of these alone says nothing


class BrokenShards(ValueError):
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
    """What the making of an index found. `skipped`: reason -> count; `skipped_names`: reason -> the first "shard: key"."""

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
    def from_dict(cls, values: dict) -> Report:
        spreads = ("width", "height", "image_bytes", "caption_words")
        return cls(**{k: Spread(**v) if k in spreads else v for k, v in values.items()})


def texts_of(data: bytes, is_json: bool) -> list[str]:
    """The captions in a text member, in order, empty ones left out: the whole of a `txt`, `captions` or `caption` of a `json`."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("text is not UTF-8") from None
    found: object = text
    if is_json:
        try:
            record = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            raise ValueError("json does not parse") from None
        if not isinstance(record, dict):
            raise ValueError("json is not an object")
        found = record.get("captions", record.get("caption"))
    captions = found if isinstance(found, list) else [found]
    return [c.strip() for c in captions if isinstance(c, str) and c.strip(NOTHING)]


class Index:
    """An opened index: arrays by `memmap` (shared by all processes), the locations of the shards, the report."""

    def __init__(self, path: Path, shards: Sequence[str]) -> None:
        self.path = path
        head, arrays = _read(path)
        self.fingerprint: str = head["fingerprint"]
        self.report = Report.from_dict(head["report"])
        self.pictures: np.ndarray = arrays["pictures"]
        self.shard_starts: np.ndarray = arrays["shard_starts"]
        self.text_starts: np.ndarray = arrays["text_starts"]
        self.names, self.sizes, self.times = arrays["names"], arrays["sizes"], arrays["times"]
        self.digests = arrays["digests"]
        self._keys, self._key_starts = arrays["keys"], arrays["key_starts"]
        # one buffer, not a list: reference counts of a list's strings would copy its pages into every worker
        self.locations = np.array([os.fsencode(s) for s in shards])
        _, names = common_root(shards)
        if [os.fsencode(n) for n in names] != self.names.tolist():
            raise ValueError(
                f"{path}: this index is of {len(self.names)} shards ({os.fsdecode(self.names[0])} ...), not of the "
                f"{len(names)} given ({names[0]} ...); make one for them with `blip data index`"
            )

    def __len__(self) -> int:
        """Number of rows: pairs of one picture and one of its texts."""
        return int(self.text_starts[-1])

    def location(self, shard: int) -> str:
        return os.fsdecode(self.locations[shard])

    def name(self, shard: int) -> str:
        return os.fsdecode(self.names[shard])

    def key(self, picture: int) -> str:
        start, end = self._key_starts[picture : picture + 2]
        return self._keys[int(start) : int(end)].tobytes().decode()

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
        for shard, (size, time) in enumerate(zip(self.sizes.tolist(), self.times.tolist(), strict=True)):
            location = self.location(shard)
            if is_url(location):
                return  # the size is checked with every answer of the server
            try:
                now = os.stat(location)
            except FileNotFoundError:
                raise ValueError(f"{location}: the shard is gone since its index was made ({self.path})") from None
            if now.st_size != size:
                raise ValueError(
                    f"{location}: {now.st_size} bytes, {size} when its index was made; {_again(self.path)}"
                )
            if now.st_mtime_ns != time and _digest(location) != self.digests[shard].decode():
                raise ValueError(f"{location}: its bytes changed since its index was made; {_again(self.path)}")


def _again(path: Path) -> str:
    return f"if that is meant, delete {path} and start again"


# Making


@dataclass
class _Scan:
    """What one shard holds."""

    pictures: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)  # how many, a picture
    keys: list[str] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (reason, key)
    notes: list[str] = field(default_factory=list)
    size: int = 0
    time: int = 0
    digest: str = ""
    broken: str = ""


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _members(file, size: int) -> Iterator[tarfile.TarInfo]:
    """Members of a tar, one by one. `tarfile` takes an unreadable header for the end: what follows the last must be the end."""
    file.seek(0)
    if file.read(2) == b"\x1f\x8b":
        raise ValueError("compressed (gzip): no picture could be read by its place; unpack it to a plain .tar")
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            end = 0
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # flat memory
                if member.offset_data + (member.size if member.isreg() else 0) > size:
                    raise ValueError(f"cut inside {member.name} (byte {size})")
                end = member.offset_data + (-(-member.size // 512) * 512 if member.isreg() else 0)
                yield member
    except tarfile.TarError as error:
        raise ValueError(f"not a tar that can be read: {error}") from None
    file.seek(end)
    rest = file.read()
    if len(rest) < 1024 or rest.strip(b"\0"):
        raise ValueError(f"damaged or cut after byte {end}: no end mark follows the last readable member")


def _scan(location: str, verify: bool) -> _Scan:
    """Reads one shard; what stops it is in `broken`."""
    scan = _Scan()
    try:
        path = location if not is_url(location) else fetch_file(location)
    except OSError as error:
        scan.broken = f"cannot be fetched: {error}"
        return scan
    try:
        with open(path, "rb") as file:
            about = os.fstat(file.fileno())
            scan.size, scan.time, scan.digest = about.st_size, about.st_mtime_ns, _digest(path)
            done: set[str] = set()
            key, group = "", {}
            for member in _members(file, scan.size):
                if member.islnk() or member.issym() or member.issparse():
                    raise ValueError(f"{member.name} is a link or a sparse file: such members are not read")
                match = KEY.match(member.name)
                if not member.isreg() or match is None:
                    continue
                if match[1] != key:
                    _add(scan, file, key, group, verify)
                    done.add(key)
                    key, group = match[1], {}
                    if key in done:
                        raise ValueError(
                            f"the key {key} comes again later in the shard: two half pairs, or two of one name"
                        )
                extension = match[2].lower()
                if extension in group:
                    raise ValueError(f"{member.name} is there twice")
                if extension in (*PICTURES, "txt", "json"):
                    group[extension] = (member.offset_data, member.size)
                else:
                    group.setdefault("", (0, 0))  # a member of another kind: known to exist, never read
            _add(scan, file, key, group, verify)
    except (OSError, ValueError) as error:
        scan.broken = str(error)
    finally:
        if path != location:
            os.unlink(path)
    stats = Path(re.sub(r"\.tar$", "_stats.json", location))
    if path == location and stats.is_file() and not scan.broken:
        told = json.loads(stats.read_text()).get("successes")
        if told not in (None, len(done - {""}) + bool(group)):
            scan.notes.append(
                f"{Path(location).name}: {stats.name} tells of {told} successes, the shard holds {len(done)}"
            )
    return scan


def _add(scan: _Scan, file, key: str, group: dict[str, tuple[int, int]], verify: bool) -> None:
    """Gives the members of one key a row, or the reason why not."""
    if not group:
        return
    pictures = [group[e] for e in PICTURES if e in group]
    if len(pictures) != 1:
        scan.skipped.append(("no picture" if not pictures else "more than one picture", key))
        return
    if not ("txt" in group or "json" in group):
        scan.skipped.append(("no text", key))
        return
    try:
        texts, kind = _texts(file, group)
    except ValueError as error:
        scan.skipped.append((str(error), key))
        return
    if not texts:
        scan.skipped.append(("text is empty", key))
        return
    at, size = pictures[0]
    if verify:
        file.seek(at)
        try:
            height, width = decode(file.read(size)).shape[:2]
        except ImageError as error:
            scan.skipped.append((f"picture {error.reason}", key))
            return
        scan.widths.append(width)
        scan.heights.append(height)
    scan.pictures.append((at, size, *group[kind], kind == "json"))
    scan.texts.append(len(texts))
    scan.keys.append(key)
    scan.words.extend(len(text.split()) for text in texts)


def _texts(file, group: dict[str, tuple[int, int]]) -> tuple[list[str], str]:
    """The texts of a pair and which member holds them: `captions` of the json, else the txt, else `caption` of the json."""
    for kind in ("json", "txt"):
        if kind not in group:
            continue
        file.seek(group[kind][0])
        data = file.read(group[kind][1])
        if kind == "json" and "txt" in group and b'"captions"' not in data:
            continue
        return texts_of(data, kind == "json"), kind
    raise ValueError("no text")


def index_name(names: Sequence[str]) -> str:
    """File name of the index of shards of these names (relative to the folder that holds them)."""
    return f"pairs-{hashlib.blake2b(chr(10).join(names).encode(), digest_size=6).hexdigest()}.index"


def build_index(
    shards: str | Path | Sequence[str | Path],
    out: Path | str | None = None,
    verify: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
    workers: int = 0,
) -> Index:
    """Makes the index of these shards (paths, patterns or URLs), writes it and opens it.

    `out` None: beside local shards, in the cache where their folder is read-only. `verify` decodes every picture once
    and leaves out those that fail. `progress(done, of, name)` is called after each shard; `workers` processes share the
    shards. Raises BrokenShards when shards are damaged, ValueError when no pair is found.
    """
    locations = expand(shards)
    root, names = common_root(locations)
    target = Path(out) if out is not None else _places(root, names)[0]
    scans: list[_Scan] = []
    with ProcessPoolExecutor(max(1, workers), mp_context=get_context("forkserver")) as pool:
        run = pool.map if workers > 0 else map
        for done, scan in enumerate(run(_scan, locations, [verify] * len(locations)), start=1):
            scans.append(scan)
            if progress is not None:
                progress(done, len(locations), names[done - 1])
    if broken := {locations[i]: s.broken for i, s in enumerate(scans) if s.broken}:
        raise BrokenShards(broken)
    report = _report(scans, names, verify)
    if not report.pictures:
        raise ValueError(f"{root}: no pair in {len(names)} shard(s); left out: {report.skipped or 'nothing'}")
    key_blobs = [key.encode() for scan in scans for key in scan.keys]
    arrays = {
        "pictures": np.array([p for s in scans for p in s.pictures], dtype=PICTURE),
        "shard_starts": _running_sum([len(s.pictures) for s in scans]),
        "text_starts": _running_sum([n for s in scans for n in s.texts]),
        "keys": np.frombuffer(b"".join(key_blobs), dtype=np.uint8),
        "key_starts": _running_sum([len(k) for k in key_blobs]),
        "names": np.array([os.fsencode(n) for n in names]),
        "digests": np.array([s.digest.encode() for s in scans]),
        "sizes": np.array([s.size for s in scans], dtype="<i8"),
        "times": np.array([s.time for s in scans], dtype="<i8"),
    }
    _write(target, arrays, report)
    return Index(target, locations)


def _running_sum(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype="<i8")]).astype("<i8")


def _report(scans: list[_Scan], names: list[str], verified: bool) -> Report:
    skipped = [
        (reason, f"{name}: {key}") for name, scan in zip(names, scans, strict=True) for reason, key in scan.skipped
    ]
    named: dict[str, list[str]] = {}
    for reason, name in skipped:
        named.setdefault(reason, []).append(name)

    def spread(values: str) -> Spread:
        return Spread.of(np.array([v for s in scans for v in getattr(s, values)]))

    return Report(
        shards=len(names),
        pictures=sum(len(s.pictures) for s in scans),
        texts=sum(sum(s.texts) for s in scans),
        bytes=sum(s.size for s in scans),
        verified=verified,
        skipped=dict(Counter(reason for reason, _ in skipped).most_common()),
        skipped_names={reason: found[:NAMED] for reason, found in named.items()},
        width=spread("widths"),
        height=spread("heights"),
        image_bytes=Spread.of(np.array([p[1] for s in scans for p in s.pictures])),
        caption_words=spread("words"),
        notes=[note for s in scans for note in s.notes],
    )


# The file: magic, length of the header, header (JSON), arrays at multiples of 64


def _fingerprint(arrays: dict[str, np.ndarray]) -> str:
    """Digest of what the shards hold and of which rows it gives; neither places nor times are in it."""
    digest = hashlib.blake2b(MAGIC, digest_size=16)
    for name in ("names", "digests", "shard_starts", "text_starts", "pictures", "key_starts", "keys"):
        digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
    return digest.hexdigest()


def _write(path: Path, arrays: dict[str, np.ndarray], report: Report) -> None:
    """Writes the index whole or not at all."""
    table, at = {}, 0
    for name, array in arrays.items():
        table[name] = [at, np.lib.format.dtype_to_descr(array.dtype), len(array)]
        at += -(-array.nbytes // 64) * 64
    head = json.dumps(
        {"fingerprint": _fingerprint(arrays), "report": asdict(report), "arrays": table, "bytes": at},
        ensure_ascii=False,
    ).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(MAGIC + len(head).to_bytes(8, "little") + head)
        file.write(b"\0" * (-file.tell() % 64))
        for array in arrays.values():
            file.write(array.tobytes())
            file.write(b"\0" * (-array.nbytes % 64))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path}: not an index of this version; delete it and start again, or `blip data index`")
        size = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(size))
        start = -(-file.tell() // 64) * 64
        if os.fstat(file.fileno()).st_size != start + head["bytes"]:
            raise ValueError(f"{path}: the index is cut; delete it and start again")
    whole = np.memmap(path, mode="r")

    def array(at: int, descr, length: int) -> np.ndarray:
        dtype = np.lib.format.descr_to_dtype([tuple(d) for d in descr] if isinstance(descr, list) else descr)
        return whole[start + at : start + at + length * dtype.itemsize].view(dtype)

    return head, {name: array(*entry) for name, entry in head["arrays"].items()}


# Finding it, or making it where it is missing


def _places(root: str, names: Sequence[str]) -> list[Path]:
    """Where the index of local shards may be, best first: beside them if that can be written, in the cache."""
    tag = hashlib.blake2b(root.encode(), digest_size=6).hexdigest()
    cached = cache_folder() / "indexes" / f"{tag}-{index_name(names)}"
    if is_url(root):
        return [cached]
    folder = Path(root)
    # the mode is asked too, since os.access tells the superuser that everything can be written
    writable = os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222
    return [folder / index_name(names), cached] if writable else [cached, folder / index_name(names)]


def open_index(
    shards: str | Path | Sequence[str | Path],
    index: Path | str | None = None,
    verify: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> Index:
    """Opens the index of these shards; of local ones it is made first where it is missing, under a lock.

    `index` is a file (or the URL of one) made with `build_index`, for shards that lie elsewhere; without it the index of
    URLs is looked for beside them under `index_name`. Raises ValueError when shards changed since, or none is found.
    """
    locations = expand(shards)
    root, names = common_root(locations)
    if index is not None and not is_url(str(index)):
        opened = Index(Path(index), locations)
        for shard, size in enumerate(opened.sizes.tolist()):
            if not is_url(root) and os.stat(locations[shard]).st_size != size:
                raise ValueError(f"{locations[shard]}: not the {size} bytes that {index} was made of")
        return opened
    places = _places(root, names)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        places[0].parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{places[0]}.lock"):
            if not places[0].is_file():
                if is_url(root):
                    _fetch(str(index or f"{root}/{index_name(names)}"), places[0])
                else:
                    return build_index(shards, places[0], verify, progress)
        found = places[0]
    opened = Index(found, locations)
    opened.check_files()
    return opened


def _fetch(url: str, path: Path) -> None:
    try:
        os.replace(fetch_file(url, path.parent), path)
    except OSError as error:
        raise ValueError(
            f"{url}: no index there ({error}); make one with `blip data index SHARDS --out FILE` and give it as `index`"
        ) from error

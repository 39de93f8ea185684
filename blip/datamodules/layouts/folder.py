"""A folder or a zip of pictures with a file of captions -> WebDataset shards, the pictures' bytes untouched.

The captions stand in a CSV, JSON or JSON-lines file, one row a caption or one row a picture with a list of captions; the
columns are named `image` (or `file`, `file_name`, `filename`) and `caption` (or `captions`, `text`). JSON may also be
`{picture: caption or captions}`. A picture is named by its path within the folder or zip, or, where that is unambiguous, by
its file name with or without the ending. Nothing that a caption file or a zip names is opened as a path: names are only looked
up among the files found. What gives no pair is left out, counted and named by reason; what makes the whole input unusable is
one ValueError.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from webdataset import TarWriter

from blip.datamodules.images import MAX_BYTES, ImageError, decode
from blip.text import clean_caption

IMAGE_COLUMNS = ("image", "file", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "captions", "text")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")  # what is taken for a picture when it has no caption
LEFT_OUT = "left_out.jsonl"


@dataclass
class Built:
    """What `build` wrote; `left_out` has (reason, name) in the order met."""

    shards: int = 0
    pictures: int = 0
    captions: int = 0
    bytes: int = 0
    left_out: list[tuple[str, str]] = field(default_factory=list)

    @property
    def reasons(self) -> dict[str, list[str]]:
        """Reason -> names, the most frequent first."""
        counts = Counter(reason for reason, _ in self.left_out)
        return {reason: [name for why, name in self.left_out if why == reason] for reason, _ in counts.most_common()}


def build(
    images: str | Path,
    captions: str | Path,
    out: str | Path,
    split: str | None = None,
    split_column: str = "split",
    shard_size: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> Built:
    """Writes `out`/00000.tar ... of `shard_size` pictures each; the folder appears when all is written, or not at all.

    `split` keeps the rows with that value in `split_column`. Each pair is KEY.jpg|png|webp and KEY.txt, or KEY.json with
    `{"captions": [...]}` where a picture has several. What was left out is also listed in `out`/left_out.jsonl.
    Raises ValueError (with what, where and what to do) for input that gives no pair; OSError kin for files.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: already there; remove it or give another folder")
    if shard_size < 1:
        raise ValueError(f"a shard holds at least one picture, not {shard_size}")
    rows = read_rows(Path(captions))
    wanted = _select(rows, split, split_column, Path(captions))
    built = Built()
    out.parent.mkdir(parents=True, exist_ok=True)
    with open_pictures(Path(images)) as pictures:
        captions_of = _match(_Names(pictures.names), rows, wanted, built)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            _write(folder, _samples(pictures, captions_of, built, progress), shard_size, built)
            if not built.pictures:
                found = ", ".join(
                    f"{reason} ({len(names)} times, first {names[0]})" for reason, names in built.reasons.items()
                )
                raise ValueError(f"no pair in {images} with {captions}: {found or 'no rows'}")
            folder.chmod(0o755)
            if out.exists():
                out.rmdir()
            folder.rename(out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return built


def _write(folder: Path, samples: Iterator[dict[str, Any]], shard_size: int, built: Built) -> None:
    while (first := next(samples, None)) is not None:
        with open(folder / f"{built.shards:05d}.tar", "wb") as file:
            with TarWriter(file, encoder=False, mtime=0) as shard:  # no time of writing: equal input, equal bytes
                for sample in itertools.chain([first], itertools.islice(samples, shard_size - 1)):
                    shard.write(sample)
            file.flush()
            os.fsync(file.fileno())
        built.shards += 1
    if built.left_out:
        lines = (json.dumps({"reason": reason, "name": name}, ensure_ascii=False) for reason, name in built.left_out)
        (folder / LEFT_OUT).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _samples(
    pictures: Pictures, captions: Mapping[str, list[str]], built: Built, progress: Callable[[int, int], None] | None
) -> Iterator[dict[str, Any]]:
    """The members of each pair as TarWriter takes them, counted in `built` along with what is left out."""
    keys: set[str] = set()
    for done, (file, texts) in enumerate(captions.items(), start=1):
        if progress is not None:
            progress(done, len(captions))
        said = [text.strip() for text in texts if clean_caption(text.strip(), 1)]  # marks alone say nothing
        built.left_out += [("caption is empty", file)] * (len(texts) - len(said))
        if not said:
            continue
        try:
            data = pictures.read(file)
            ending = _ending(data)
        except ImageError as error:
            built.left_out.append((f"picture {error.reason}", file))
            continue
        built.pictures, built.captions, built.bytes = (
            built.pictures + 1,
            built.captions + len(said),
            built.bytes + len(data),
        )
        text = {"txt": said[0]} if len(said) == 1 else {"json": json.dumps({"captions": said}, ensure_ascii=False)}
        yield {"__key__": _key(file, keys), ending: data} | {kind: value.encode() for kind, value in text.items()}


def _match(
    names: _Names, rows: list[dict[str, Any]], wanted: Mapping[str, list[str]], built: Built
) -> dict[str, list[str]]:
    """File -> captions; what has no counterpart on the other side is left out."""
    files = {name: names.find(name) for name in dict.fromkeys(row["image"] for row in rows)}
    named = {file for found in files.values() for file in found}
    built.left_out += [
        ("picture without a caption", file)
        for file in names.all
        if file not in named and file.lower().endswith(ENDINGS)
    ]
    captions: dict[str, list[str]] = {}  # one file may be named in several ways
    for name, texts in wanted.items():
        if len(files[name]) == 1:
            captions.setdefault(files[name][0], []).extend(texts)
        else:
            built.left_out.append(("picture name is ambiguous" if files[name] else "picture is missing", name))
    return captions


def _ending(data: bytes) -> str:
    """The member's ending by what the bytes are, once they decode; ImageError for what has no place in shards."""
    decode(data)
    for start, ending in ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp")):
        if data.startswith(start):
            return ending
    raise ImageError("of a kind that shards do not hold", "shards hold JPEG, PNG and WebP; convert it to one of these")


def _key(file: str, taken: set[str]) -> str:
    """A WebDataset key from a file's name: no dot or slash in it, of a length that every tar holds, each once."""
    base = re.sub(r"[^\w-]", "_", PurePosixPath(file).stem, flags=re.ASCII)[:80] or "_"
    key, number = base, 1
    while key in taken:
        number += 1
        key = f"{base}-{number}"
    taken.add(key)
    return key


# --- the captions ---


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a caption file: every field as it stands, and `image` (a name) and `captions` (a list of texts)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of captions")
    readers = {".csv": _csv, ".tsv": _csv, ".json": _json, ".jsonl": _json_lines, ".ndjson": _json_lines}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: captions are read from {', '.join(readers)} files; rename or convert it")
    try:
        rows = [_row(record, f"{path}: row {number}") for number, record in readers[path.suffix.lower()](path)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if not rows:
        raise ValueError(f"{path}: holds no row")
    return rows


def _csv(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        reader = csv.DictReader(file, delimiter=max(",;\t", key=header.count), strict=True)
        try:
            for record in reader:
                if None in record:
                    raise ValueError(
                        f"{path}: line {reader.line_num} has more fields than the header "
                        f"({', '.join(reader.fieldnames or [])}); put captions that hold the delimiter in quotes"
                    )
                yield reader.line_num, {str(name).strip().lower(): value for name, value in record.items()}
        except csv.Error as error:
            raise ValueError(f"{path}: line {reader.line_num} is not CSV: {error}") from error


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if isinstance(records, dict):
        records = [{"image": name, "captions": texts} for name, texts in records.items()]
    if not isinstance(records, list):
        raise ValueError(
            f"{path}: a list of records or {{picture: captions}} is expected, not {type(records).__name__}"
        )
    yield from enumerate(records, start=1)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise ValueError(f"{path}: line {number} is not JSON: {error}") from error


def _row(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not a record but {str(record)[:60]!r}")
    fields = []
    for kind, names in (("picture", IMAGE_COLUMNS), ("caption", CAPTION_COLUMNS)):
        field_name = next((name for name in names if name in record), None)
        if field_name is None:
            raise ValueError(
                f"{where} has no {kind}: one of {', '.join(names)} is needed, found {', '.join(map(str, record))}"
            )
        fields.append(record[field_name])
    image, texts = fields
    if not isinstance(image, str) or not image.strip():
        raise ValueError(f"{where} names no picture, but {image!r}")
    if isinstance(texts, str) and texts.startswith("["):  # a list in a cell of a CSV
        try:
            texts = json.loads(texts)
        except json.JSONDecodeError:
            texts = [texts]
    texts = texts if isinstance(texts, list) and texts else [texts]
    return {**record, "image": image.strip(), "captions": [text if isinstance(text, str) else "" for text in texts]}


def _select(rows: list[dict[str, Any]], split: str | None, column: str, path: Path) -> dict[str, list[str]]:
    """Picture name -> its captions in file order, of the rows of a split."""
    if split is not None:
        if column not in rows[0]:
            raise ValueError(f"{path}: no column {column!r} to find the split in; columns found: {', '.join(rows[0])}")
        values = Counter(str(row.get(column)) for row in rows)
        if split not in values:
            raise ValueError(f"{path}: no row with {column}={split}; found {dict(values.most_common(10))}")
        rows = [row for row in rows if str(row.get(column)) == split]
    wanted: dict[str, list[str]] = {}
    for row in rows:
        wanted.setdefault(row["image"], []).extend(row["captions"])
    return wanted


# --- the pictures ---


class Pictures:
    """The files of a folder: `names` are their paths within it, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = sorted(
            (Path(root, file).relative_to(folder).as_posix() for root, _, files in os.walk(folder) for file in files)
        )

    def read(self, name: str) -> bytes:
        path = self.folder / name
        try:
            if not path.is_file():
                raise ImageError("not a file", "a broken link, a pipe or a device")
            _check_size(path.stat().st_size)
            return path.read_bytes()
        except OSError as error:
            raise ImageError("unreadable in the folder", str(error)) from error

    def __enter__(self) -> Pictures:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class ZippedPictures(Pictures):
    """The members of a zip, read where they are: nothing is unpacked to the disk."""

    def __init__(self, path: Path) -> None:
        self.zip = zipfile.ZipFile(path)
        members = [
            member
            for member in self.zip.infolist()
            if not member.is_dir() and not member.filename.startswith("__MACOSX/")
        ]
        self.members = {member.filename: member for member in members}
        self.names = [member.filename for member in members]

    def read(self, name: str) -> bytes:
        member = self.members[name]
        _check_size(member.file_size)
        try:
            return self.zip.read(member)  # stops at the size that was checked
        except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError) as error:
            raise ImageError("unreadable in the zip", str(error)) from error
        except Exception as error:  # zlib.error, lzma.LZMAError: damaged data
            raise ImageError("damaged in the zip", str(error)) from error

    def __exit__(self, *_: object) -> None:
        self.zip.close()


def open_pictures(path: Path) -> Pictures:
    """The pictures of a folder or of a zip file."""
    if path.is_dir():
        return Pictures(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such folder or zip of pictures")
    try:
        return ZippedPictures(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: neither a folder nor a zip of pictures ({error})") from error


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ImageError("too large", f"a file of {size / 1e6:.0f} MB, limit {MAX_BYTES / 1e6:.0f}")


class _Names:
    """Finds files by their path or the end of it, with or without the ending: `a/b.jpg` by `a/b.jpg`, `b`, `/data/a/b.jpg`."""

    def __init__(self, names: list[str]) -> None:
        self.all = names
        self._files: dict[str, list[str]] = {}
        for name in names:
            path = PurePosixPath(name)
            for short in dict.fromkeys((path.name, path.stem)):
                self._files.setdefault(short, []).append(name)

    def find(self, name: str) -> list[str]:
        """All files that may be meant: one, where the name is good; the very path, where it exists."""
        path = PurePosixPath(name)
        files = self._files.get(path.name, [])
        if str(path) in files:
            return [str(path)]
        folders = path.parts[:-1]
        return [file for file in files if _ends_alike(folders, PurePosixPath(file).parts[:-1])]


def _ends_alike(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether the shorter path is the end of the longer: of `train/1.jpg` and `val/1.jpg` neither is."""
    length = min(len(one), len(other))
    return one[len(one) - length :] == other[len(other) - length :]

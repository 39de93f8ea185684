"""What one tar shard holds: its members read strictly, its pairs with their places, what is left out and why."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from blip.datamodules.images import MAX_BYTES, ImageError, decode
from blip.datamodules.locations import is_url
from blip.datamodules.remote import digest_of, fetch_file

PICTURES = ("jpg", "jpeg", "png", "webp")
KEY = re.compile(r"^((?:.*/)?[^./]+)\.([^/]*)$")  # WebDataset's rule: up to the first dot of the base name
MAX_TEXT_BYTES = 1_000_000  # of one txt or json
NOTHING = ' \t\r\n.!"()*#:;~'  # what cleaning takes from a caption (released code): a text of these alone says nothing


@dataclass
class Scan:
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


def members(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
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
    if size - end < 1024 or any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(1 << 20), b"")):
        raise ValueError(f"damaged or cut after byte {end}: no end mark follows the last readable member")


def scan(location: str, verify: bool) -> Scan:
    """Reads one shard; what stops it is in `broken`."""
    found = Scan()
    try:
        path = location if not is_url(location) else str(fetch_file(location))
    except OSError as error:
        found.broken = f"cannot be fetched: {error}"
        return found
    try:
        with open(path, "rb") as file:
            about = os.fstat(file.fileno())
            found.size, found.time, found.digest = about.st_size, about.st_mtime_ns, digest_of(path)
            done: set[str] = set()
            key, group = "", dict[str, tuple[int, int]]()
            for member in members(file, found.size):
                if member.islnk() or member.issym() or member.issparse():
                    raise ValueError(f"{member.name} is a link or a sparse file: such members are not read")
                match = KEY.match(member.name)
                if not member.isreg() or match is None:
                    continue
                if match[1] != key:
                    _add(found, file, key, group, verify)
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
            _add(found, file, key, group, verify)
    except (OSError, ValueError) as error:
        found.broken = str(error)
    finally:
        if path != location:
            os.unlink(path)
    stats = Path(re.sub(r"\.tar$", "_stats.json", location))
    if path == location and stats.is_file() and not found.broken:
        try:
            told = json.loads(stats.read_text())["successes"]
        except (ValueError, KeyError, TypeError):  # another tool's file
            told = None
        if told not in (None, held := len(found.keys) + len(found.skipped)):
            found.notes.append(f"{Path(location).name}: {stats.name} tells of {told} successes, the shard holds {held}")
    return found


def _add(found: Scan, file: BinaryIO, key: str, group: dict[str, tuple[int, int]], verify: bool) -> None:
    """Gives the members of one key a row, or the reason why not."""
    if not group:
        return
    pictures = [group[e] for e in PICTURES if e in group]
    if len(pictures) != 1:
        found.skipped.append(("no picture" if not pictures else "more than one picture", key))
        return
    if not ("txt" in group or "json" in group):
        found.skipped.append(("no text", key))
        return
    at, size = pictures[0]
    if size > MAX_BYTES:
        found.skipped.append(("picture too large", key))
        return
    if max(group[e][1] for e in ("txt", "json") if e in group) > MAX_TEXT_BYTES:
        found.skipped.append(("text too large", key))
        return
    try:
        texts, kind = _texts(file, group)
    except ValueError as error:
        found.skipped.append((str(error), key))
        return
    if not texts:
        found.skipped.append(("text is empty", key))
        return
    if verify:
        try:
            height, width = decode(_bytes(file, at, size)).shape[:2]
        except ImageError as error:
            found.skipped.append((f"picture {error.reason}", key))
            return
        found.widths.append(width)
        found.heights.append(height)
    found.pictures.append((at, size, *group[kind], kind == "json"))
    found.texts.append(len(texts))
    found.keys.append(key)
    found.words.extend(len(text.split()) for text in texts)


def _texts(file: BinaryIO, group: dict[str, tuple[int, int]]) -> tuple[list[str], str]:
    """The texts of a pair and which member holds them: `captions` of the json, else the txt, else `caption` of the json."""
    texts, kind = [], "json"
    if "json" in group:
        data = _bytes(file, *group["json"])
        if "txt" not in group or b'"captions"' in data:
            texts = texts_of(data, is_json=True)
    if not texts and "txt" in group:
        texts, kind = texts_of(_bytes(file, *group["txt"]), is_json=False), "txt"
    return texts, kind


def _bytes(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)


def texts_of(data: bytes, is_json: bool) -> list[str]:
    """The captions in a text member, in order, empty ones left out: the whole of a `txt`, `captions` or `caption` of a `json`."""
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise ValueError("text is not UTF-8") from None
    found: object = text
    if is_json:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("json does not parse") from None
        if not isinstance(record, dict):
            raise ValueError("json is not an object")
        found = record.get("captions", record.get("caption"))
    captions = found if isinstance(found, list) else [found]
    texts = [c.strip() for c in captions if isinstance(c, str) and c.strip(NOTHING)]
    try:
        "".join(texts).encode()  # JSON can hold half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError:
        raise ValueError("text is not Unicode") from None
    return texts

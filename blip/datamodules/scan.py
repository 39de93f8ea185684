"""What one tar shard holds: its members read strictly, its records with their places, what is left out and why."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from blip.datamodules.images import MAX_BYTES, ImageError, decode
from blip.datamodules.locations import is_url
from blip.datamodules.records import CLIPS, PAIRS, Kind, entries_of, kind_of
from blip.datamodules.remote import digest_of, fetch_file
from blip.datamodules.video import MAX_CLIP_BYTES, frames_of, library

PICTURES = ("jpg", "jpeg", "png", "webp")
VIDEOS = ("mp4", "avi", "webm", "mkv")
KEY = re.compile(r"^((?:.*/)?[^./]+)\.([^/]*)$")  # WebDataset's rule: up to the first dot of the base name
MAX_TEXT_BYTES = 1_000_000  # of one txt or json
VERIFIED_FRAMES = 16  # of a clip


@dataclass
class Scan:
    """What one shard holds: rows of the index, and what it measured."""

    pictures: list[tuple] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)  # how many entries, a record
    keys: list[str] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    image_bytes: list[int] = field(default_factory=list)
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


def picture_names(kind: Kind) -> list[list[str]]:
    """What the pictures of a record may be called behind its key, a list for each of them."""
    endings = VIDEOS if kind.clips else PICTURES
    if kind.pictures == 1:
        return [list(endings)]
    return [[f"{number}.{ending}" for ending in endings] for number in range(kind.pictures)]


def scan(location: str, verify: bool, records: str = PAIRS.name) -> Scan:
    """Reads one shard; what stops it is in `broken`. OSError where what decodes clips is not installed."""
    found, kind = Scan(), kind_of(records)
    if verify and kind.clips:
        library()
    wanted = {name for names in picture_names(kind) for name in names} | {"txt", "json"}
    done: set[str] = set()
    try:
        path = location if not is_url(location) else str(fetch_file(location))
    except OSError as error:
        found.broken = f"cannot be fetched: {error}"
        return found
    try:
        with open(path, "rb") as file:
            about = os.fstat(file.fileno())
            found.size, found.time, found.digest = about.st_size, about.st_mtime_ns, digest_of(path)
            key, group = "", dict[str, tuple[int, int]]()
            for member in members(file, found.size):
                if member.islnk() or member.issym() or member.issparse():
                    raise ValueError(f"{member.name} is a link or a sparse file: such members are not read")
                match = KEY.match(member.name)
                if not member.isreg() or match is None:
                    continue
                if match[1] != key:
                    _add(found, file, key, group, verify, kind)
                    done.add(key)
                    key, group = match[1], {}
                    if key in done:
                        raise ValueError(
                            f"the key {key} comes again later in the shard: two half pairs, or two of one name"
                        )
                extension = match[2].lower()
                if extension in group:
                    raise ValueError(f"{member.name} is there twice")
                if extension in wanted:
                    group[extension] = (member.offset_data, member.size)
                else:
                    group.setdefault("", (0, 0))  # a member of another kind: known to exist, never read
            _add(found, file, key, group, verify, kind)
            done.add(key)
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
        if told not in (None, held := len(done - {""})):
            found.notes.append(f"{Path(location).name}: {stats.name} tells of {told} successes, the shard holds {held}")
    return found


def _add(found: Scan, file: BinaryIO, key: str, group: dict[str, tuple[int, int]], verify: bool, kind: Kind) -> None:
    """Gives the members of one key a row for each entry, or the reason why not."""
    if not group:
        return
    thing = "clip" if kind.clips else "picture"
    places = [[group[name] for name in names if name in group] for names in picture_names(kind)]
    if any(len(place) != 1 for place in places):
        missing = f"no {thing}" if kind.pictures == 1 else f"less than {kind.pictures} pictures"
        found.skipped.append((f"more than one {thing}" if all(places) else missing, key))
        return
    if not (kind in (PAIRS, CLIPS) and "txt" in group) and "json" not in group:
        found.skipped.append(("no text", key))
        return
    pictures = [place for (place,) in places]
    if max(size for _, size in pictures) > (MAX_CLIP_BYTES if kind.clips else MAX_BYTES):
        found.skipped.append((f"{thing} too large", key))
        return
    if max(group[e][1] for e in ("txt", "json") if e in group) > MAX_TEXT_BYTES:
        found.skipped.append(("text too large", key))
        return
    try:
        entries, reasons, member = _entries(file, group, kind)
    except ValueError as error:
        found.skipped.append((str(error), key))
        return
    found.skipped += [(reason, key) for reason in reasons]
    if not entries:
        found.skipped += [] if reasons else [("text is empty", key)]
        return
    if verify:
        try:
            shapes = [_decoded(_bytes(file, *place), kind) for place in pictures]
        except ImageError as error:
            found.skipped.append((f"{thing} {error.reason}", key))
            return
        found.heights += [height for height, _ in shapes]
        found.widths += [width for _, width in shapes]
    (at, sizes) = zip(*pictures, strict=True)
    found.pictures.append(
        (at[0], sizes[0], *group[member], member == "json")
        if kind.pictures == 1
        else (at, sizes, *group[member], member == "json")
    )
    found.texts.append(len(entries))
    found.keys.append(key)
    found.image_bytes += sizes
    found.words.extend(len(kind.text(entry).split()) for entry in entries)


def _decoded(data: bytes, kind: Kind) -> tuple[int, int]:
    """Height and width of a picture or clip that decodes; ImageError of one that does not."""
    height, width = (frames_of(data, VERIFIED_FRAMES)[0] if kind.clips else decode(data)).shape[:2]
    return height, width


def _entries(file: BinaryIO, group: dict[str, tuple[int, int]], kind: Kind) -> tuple[list[Any], list[str], str]:
    """The entries of a record, reasons of those left out, and which member holds them.

    Captions: `captions` of the json, else the txt, else `caption` of the json. All else stands in the json.
    """
    txt = "txt" in group and kind in (PAIRS, CLIPS)
    entries: list[Any] = []
    reasons: list[str] = []
    if "json" in group:
        data = _bytes(file, *group["json"])
        if not txt or b'"captions"' in data:
            entries, reasons = entries_of(data, True, kind)
    if not entries and txt:
        return *entries_of(_bytes(file, *group["txt"]), False, kind), "txt"
    return entries, reasons, "json"


def _bytes(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)

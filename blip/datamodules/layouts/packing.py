"""What annotations say and the pictures or clips they speak of -> WebDataset shards, the media's bytes untouched.

A layout gives entries, one for each key: the names of its pictures or of its clip, and the record that goes beside them.
Here they are looked up, checked and written. What cannot be had is left out, counted and named by reason; the folder of shards
appears when all is written, or not at all.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from blip.datamodules.images import MAX_BYTES, ImageError, decode
from blip.datamodules.layouts.media import CLIP_ENDINGS, PICTURE_ENDINGS, Media
from blip.datamodules.scan import MAX_TEXT_BYTES
from blip.datamodules.tars import picture_suffix, write_tar
from blip.datamodules.video import MAX_CLIP_BYTES
from blip.text import clean_caption

LEFT_OUT = "left_out.jsonl"
TEXTS = {"captions": "caption", "questions": "question", "statements": "sentence", "rounds": "question"}


class Entry(NamedTuple):
    """One key of a shard to be.

    key: what it is to be called, the published id where there is one
    media: for each of its pictures (two in NLVR2), or for its clip, the names that it may have on the disk
    record: the KEY.json; a text makes a KEY.txt instead
    """

    key: str
    media: tuple[tuple[str, ...], ...]
    record: dict[str, Any] | str


class LeftOut(NamedTuple):
    """Something published that makes no row: why, and its name."""

    reason: str
    name: str


@dataclass
class Built:
    """What was written; `rows` counts captions, questions, statements and rounds, `left_out` has (reason, name) as met.

    pictures: how many pictures or clips, bytes: theirs, thing: which of the two
    """

    thing: str = "picture"
    shards: int = 0
    pictures: int = 0
    bytes: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def leave_out(self, reason: str, name: str) -> None:
        """Notes what is not written. Names come from strangers: of a length and in characters that can be shown."""
        self.left_out.append((reason, "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name[:300])))

    @property
    def captions(self) -> int:
        return self.rows["captions"]

    @property
    def reasons(self) -> dict[str, list[str]]:
        """Reason -> names, the most frequent first."""
        names: dict[str, list[str]] = {}
        for reason, name in self.left_out:
            names.setdefault(reason, []).append(name)
        return dict(sorted(names.items(), key=lambda item: -len(item[1])))


def check_out(out: Path, shard_size: int) -> None:
    """ValueError where nothing could be written, before anything is read."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: already there; remove it or give another folder")
    if shard_size < 1:
        raise ValueError(f"a shard holds at least one picture, not {shard_size}")


def pack(
    entries: Iterable[Entry | LeftOut],
    media: Media,
    out: Path,
    shard_size: int = 1000,
    clips: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Built:
    """Writes `out`/00000.tar ... of `shard_size` keys each; what was left out is also listed in `out`/left_out.jsonl.

    `progress` is told how many keys are done, and of how many (0: not known yet). Raises ValueError where not one key could be
    written, with what was looked for and where; OSError for what the disk refuses.
    """
    check_out(out, shard_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    built = Built("clip" if clips else "picture")
    try:
        samples = _samples(entries, media, clips, built, progress)
        while (first := next(samples, None)) is not None:
            shard = itertools.chain([first], itertools.islice(samples, shard_size - 1))
            write_tar(folder / f"{built.shards:05d}.tar", shard)
            built.shards += 1
        if progress is not None:
            progress(built.pictures, built.pictures)
        if not built.pictures:
            raise ValueError(_nothing(media, built))
        if built.left_out:
            lines = (
                json.dumps({"reason": reason, "name": name}, ensure_ascii=False) for reason, name in built.left_out
            )
            (folder / LEFT_OUT).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        folder.chmod(0o755)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return built


def _samples(
    entries: Iterable[Entry | LeftOut],
    media: Media,
    clips: bool,
    built: Built,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The members of each key as `write_tar` takes them, counted in `built` along with what is left out."""
    keys: set[str] = set()
    of = len(entries) if isinstance(entries, list) else 0
    for done, entry in enumerate(entries, start=1):
        if progress is not None:
            progress(done, of)
        if isinstance(entry, LeftOut):
            built.leave_out(*entry)
            continue
        try:
            suffix, text, rows = _text(entry, built)
            data = [_read(names, media, clips) for names in entry.media]
        except _LeaveOutError as error:
            built.leave_out(*error.args)
            continue
        built.pictures += len(data)
        built.bytes += sum(len(one) for _, one in data)
        built.rows.update(rows)
        numbered = len(data) > 1
        members = {f"{number}.{ending}" if numbered else ending: one for number, (ending, one) in enumerate(data)}
        yield _key(entry.key, keys), members | {suffix: text}


class _LeaveOutError(Exception):
    """(reason, name): the key is left out."""


def _text(entry: Entry, built: Built) -> tuple[str, bytes, Counter[str]]:
    """The text member, its suffix and its rows by kind; rows that say nothing are left out."""
    name = entry.media[0][0]
    suffix, rows, record = "txt", Counter(captions=1), entry.record
    if isinstance(record, dict):
        suffix, rows, record = "json", Counter[str](), dict(record)
        for kind in TEXTS.keys() & record.keys():
            given = record[kind]
            if kind == "captions":
                record[kind] = [caption.strip() for caption in given if says(caption)]
            elif kind != "rounds":  # those are one story, and an answer may stand without its question
                record[kind] = [row for row in given if says(row[TEXTS[kind]])]
            for _ in range(len(given) - len(record[kind])):
                built.leave_out(f"{TEXTS[kind]} is empty", name)
            if given and not record[kind]:
                raise _LeaveOutError("nothing is said of it", name)
            rows[kind] = len(record[kind])
    try:
        text = (record if isinstance(record, str) else json.dumps(record, ensure_ascii=False)).encode()
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair, which no tokenizer takes
        raise _LeaveOutError("text is not Unicode", name) from None
    if len(text) > MAX_TEXT_BYTES:
        raise _LeaveOutError("text too large", name)
    return suffix, text, rows


def says(text: str) -> bool:
    """Whether cleaning leaves anything of a text: marks alone say nothing."""
    return bool(clean_caption(text.strip(), 1))


def _read(names: tuple[str, ...], media: Media, clips: bool) -> tuple[str, bytes]:
    """Ending and bytes of the one file that has one of the names."""
    thing, endings = ("clip", CLIP_ENDINGS) if clips else ("picture", PICTURE_ENDINGS)
    files = next((found for name in names if (found := media.find(name))), [])
    if len(files) > 1:  # a text or a sound of the same name is not meant
        files = [file for file in files if file.name.lower().endswith(endings)] or files
    if len(files) != 1:
        raise _LeaveOutError(f"{thing} name is ambiguous" if files else f"{thing} is missing", names[0])
    try:
        data = media.read(files[0], MAX_CLIP_BYTES if clips else MAX_BYTES)
        return _clip_ending(data) if clips else _picture_ending(data), data
    except ImageError as error:
        raise _LeaveOutError(f"{thing} {error.reason}", files[0].name) from None


def _picture_ending(data: bytes) -> str:
    """The member's ending by what the bytes are, once they decode; ImageError for what has no place in shards."""
    decode(data)
    if (ending := picture_suffix(data)) is not None:
        return ending
    raise ImageError("of a kind that shards do not hold", "shards hold JPEG, PNG and WebP; convert it to one of these")


def _clip_ending(data: bytes) -> str:
    """The same of a clip, by its container; it is not decoded, which would take longer than all else."""
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if data[4:8] == b"ftyp":
        return "mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "webm"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    raise ImageError("of a kind that shards do not hold", "shards hold MP4, WebM (Matroska) and AVI")


def _key(name: str, taken: set[str]) -> str:
    """A WebDataset key: no dot or slash in it, of a length that every tar holds, each once."""
    base = re.sub(r"[^\w-]", "_", name, flags=re.ASCII)[:80] or "_"
    key, number = base, 1
    while key in taken:
        number += 1
        key = f"{base}-{number}"
    taken.add(key)
    return key


def file_key(name: str) -> str:
    """The key of a picture that has no published id: its file's name without the ending."""
    return PurePosixPath(name).stem


def _nothing(media: Media, built: Built) -> str:
    where = ", ".join(map(str, media.paths))
    there = f"{len(media.files)} files, such as {media.files[0].name}" if media.files else "no file"
    found = ", ".join(f"{reason} ({len(names)} times, first {names[0]})" for reason, names in built.reasons.items())
    return f"no pair in {where} ({there}): {found or 'no rows'}"

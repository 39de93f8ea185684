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
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from blip.datamodules.layouts.media import PICTURE_ENDINGS, Media
from blip.datamodules.layouts.packing import Built, Entry, LeftOut, check_out, file_key, pack, says

IMAGE_COLUMNS = ("image", "file", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "captions", "text")


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
    check_out(out, shard_size)
    rows = read_rows(Path(captions))
    wanted = _select(rows, split, split_column, Path(captions))
    with Media([Path(images)]) as media:
        return pack(_entries(media, rows, wanted), media, out, shard_size, progress=progress)


def _entries(media: Media, rows: list[dict[str, Any]], wanted: Mapping[str, list[str]]) -> list[Entry | LeftOut]:
    """One entry for each file; what has no counterpart on the other side is left out."""
    files = {name: media.find(name) for name in dict.fromkeys(row["image"] for row in rows)}
    named = {file for found in files.values() for file in found}
    entries: list[Entry | LeftOut] = [
        LeftOut("picture without a caption", file.name)
        for file in media.files
        if file not in named and file.name.lower().endswith(PICTURE_ENDINGS)
    ]
    captions: dict[str, list[str]] = {}  # one file may be named in several ways
    for name, texts in wanted.items():
        if len(files[name]) == 1:
            captions.setdefault(files[name][0].name, []).extend(texts)
        else:
            entries.append(LeftOut("picture name is ambiguous" if files[name] else "picture is missing", name))
    for file, texts in captions.items():
        said = [text.strip() for text in texts if says(text)]
        entries += [LeftOut("caption is empty", file)] * (len(texts) - len(said))
        if said:
            entries.append(Entry(file_key(file), ((file,),), said[0] if len(said) == 1 else {"captions": said}))
    return entries


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

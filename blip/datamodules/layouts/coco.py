"""COCO's captions and the files of other data sets in its layout: {"images": [...], "annotations": [...]}.

captions_train2014.json, captions_val2017.json ...      a picture's captions, grouped by its id
image_info_test2014.json                                pictures without captions
nocaps_val_4500_captions.json, nocaps_test_image_info.json    NoCaps: pictures of Open Images with a domain
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from blip.datamodules.layouts.packing import Entry, LeftOut
from blip.datamodules.layouts.reading import Record, items

NUMBERED = re.compile(r"COCO_\w+_(\d{12})\.jpg")


def coco_names(name: str) -> tuple[str, ...]:
    """The names that a picture of COCO 2014 may have: its own, and that of the same picture in the release of 2017."""
    match = NUMBERED.fullmatch(PurePosixPath(name).name)
    return (name, f"{match[1]}.jpg") if match else (name,)


def coco_key(name: str) -> str:
    """The id of a COCO picture by its file's name, as a number without zeros; of another picture the name without the ending."""
    match = NUMBERED.fullmatch(PurePosixPath(name).name)
    return str(int(match[1])) if match else PurePosixPath(name).stem


def coco_captions(files: Sequence[Path], split: str | None = None) -> Iterator[Entry | LeftOut]:
    """The pictures of each file with their captions; of a file without annotations (a test set) with none.

    A `domain` of the picture (NoCaps) goes into the record; `split` keeps the pictures of one domain.
    """
    for path in files:
        pictures: dict[int | str, Record] = {}
        captions: dict[int | str, list[str]] = {}
        for name, where, value in items(path, "images", "annotations"):
            record = Record(value, where)
            if name == "images":
                pictures[record.id("id")] = record
            else:
                captions.setdefault(record.id("image_id"), []).append(record.text("caption"))
        domains = Counter(str(picture.value.get("domain")) for picture in pictures.values())
        if split is not None and split not in domains:
            raise ValueError(f"{path}: no picture of the domain {split!r}; found {dict(domains.most_common(10))}")
        for number, picture in pictures.items():
            said = captions.pop(number, [])
            file = picture.text("file_name")
            if split is not None and picture.value.get("domain") != split:
                continue
            if not said and captions:
                yield LeftOut("picture without a caption", file)
                continue
            domain = {"domain": picture.text("domain")} if "domain" in picture else {}
            yield Entry(str(number), (coco_names(file),), {"captions": said} | domain)
        for number in captions:
            yield LeftOut("captions of a picture that is not listed", str(number))

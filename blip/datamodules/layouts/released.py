"""The lists that the released code of ALBEF and BLIP reads, made by its authors from the published files.

coco_karpathy_*.json, flickr30k_*.json    [{"image", "caption": text or [texts]}], in training one record a caption
nocaps_val.json, nocaps_test.json         [{"image", "img_id"}]
vqa_train.json, vqa_val.json, vqa_test.json, vg_qa.json
    [{"question_id", "question", "answer": [ten texts], "image", "dataset"}]; of Visual Genome one text, in a test set none
nlvr_train.json, nlvr_dev.json, nlvr_test.json    [{"images": [left, right], "sentence", "label": "True"}]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blip.datamodules.layouts.coco import coco_key, coco_names
from blip.datamodules.layouts.nlvr2 import label
from blip.datamodules.layouts.packing import Entry, file_key
from blip.datamodules.layouts.reading import Record, items
from blip.datamodules.layouts.vqa import VG_WEIGHT


def released_captions(files: Sequence[Path]) -> Iterator[Entry]:
    """Each picture with its captions, of a test set (NoCaps) with none."""
    keys: dict[str, str] = {}
    captions: dict[str, list[str]] = {}
    for record in _records(files):
        name = record.text("image")
        keys.setdefault(name, str(record.id("img_id")) if "img_id" in record else coco_key(name))
        captions.setdefault(name, []).extend(record.texts("caption") if "caption" in record else [])
    for name, said in captions.items():
        yield Entry(keys[name], (coco_names(name),), {"captions": said})


def released_questions(files: Sequence[Path]) -> Iterator[Entry]:
    """Each picture with its questions; those of Visual Genome weigh as in training."""
    pictures: dict[str, list[dict[str, Any]]] = {}
    for record in _records(files):
        question: dict[str, Any] = {
            "id": record.id("question_id"),
            "question": record.text("question"),
            "answers": record.texts("answer") if "answer" in record else [],
        }
        if record.value.get("dataset") == "vg":
            question["weight"] = VG_WEIGHT
        pictures.setdefault(record.text("image"), []).append(question)
    for name, questions in pictures.items():
        yield Entry(coco_key(name), (coco_names(name),), {"questions": questions})


def released_statements(files: Sequence[Path]) -> Iterator[Entry]:
    """Each pair of pictures with its statements. These have no published ids here: their numbers in the lists stand for them."""
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for number, record in enumerate(_records(files)):
        images = record.texts("images")
        if len(images) != 2:
            raise ValueError(f"{record.where}: images are to be two, left and right, not {len(images)}")
        statement = {"id": number, "sentence": record.text("sentence")} | label(record)
        pairs.setdefault((images[0], images[1]), []).append(statement)
    for (left, right), statements in pairs.items():
        yield Entry(re.sub("-img0$", "", file_key(left)), ((left,), (right,)), {"statements": statements})


def _records(files: Sequence[Path]) -> Iterator[Record]:
    for path in files:
        for _, where, value in items(path, ""):
            yield Record(value, where)

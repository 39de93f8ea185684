"""Questions about pictures with the answers of humans: VQA v2 and Visual Genome, as published.

v2_OpenEnded_mscoco_*_questions.json      {"data_subtype", "questions": [{"image_id", "question", "question_id"}]}
v2_mscoco_*_annotations.json              {"annotations": [{"question_id", "answers": [{"answer"}], "question_type", ...}]}
question_answers.json (Visual Genome)     [{"id", "qas": [{"qa_id", "question", "answer"}]}]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

from blip.datamodules.layouts.coco import coco_names
from blip.datamodules.layouts.packing import Entry, LeftOut
from blip.datamodules.layouts.reading import Record, items

VG_WEIGHT = 0.2  # of an answer in training, as released (paper section 5.3)
PARTS = ("train2014", "val2014", "test2015")


class _Asked(NamedTuple):
    id: int | str
    question: str


class _Said(NamedTuple):
    answers: tuple[str, ...]
    about: dict[str, str]


def vqa_v2(files: Sequence[Path]) -> Iterator[Entry | LeftOut]:
    """The pictures of the questions in the order of the files; questions of a test set, or without annotations, have no answers."""
    asked: dict[tuple[str, int], list[_Asked]] = {}
    said: dict[int | str, _Said] = {}
    for path in files:
        part, of_file = "", dict[int, list[_Asked]]()
        for name, where, value in items(path, "data_subtype", "questions", "annotations"):
            if name == "data_subtype":
                part = str(value).replace("test-dev", "test")  # a selection of the questions about the same pictures
                continue
            record = Record(value, where)
            number = record.id("question_id")
            if name == "questions":
                of_file.setdefault(record.number("image_id"), []).append(_Asked(number, record.text("question")))
            else:
                said[number] = _answers(record)
        for image, questions in of_file.items():
            asked.setdefault((part, image), []).extend(questions)
    if not asked:
        raise ValueError(f"{', '.join(map(str, files))}: no questions; annotations need their file of questions")
    for (part, image), questions in asked.items():
        parts = (part,) if part in PARTS else PARTS
        names = tuple(dict.fromkeys(name for p in parts for name in coco_names(f"COCO_{p}_{image:012d}.jpg")))
        yield Entry(str(image), (names,), {"questions": [_question(q, said.pop(q.id, None)) for q in questions]})
    for number in said:
        yield LeftOut("answers without their question", str(number))


def _answers(record: Record) -> _Said:
    answers = tuple(intern(answer.text("answer")) for answer in record.records("answers"))
    about = {name: intern(record.text(name)) for name in ("question_type", "answer_type") if name in record}
    return _Said(answers, about)


def _question(asked: _Asked, said: _Said | None) -> dict[str, Any]:
    found = {"id": asked.id, "question": asked.question, "answers": list(said.answers) if said else []}
    return found | said.about if said else found


def visual_genome(files: Sequence[Path]) -> Iterator[Entry]:
    """The pictures that are asked about, each question with its one answer."""
    for path in files:
        for _, where, value in items(path, ""):
            picture = Record(value, where)
            number = picture.number("id")
            questions = [
                {
                    "id": qa.id("qa_id"),
                    "question": qa.text("question"),
                    "answers": [qa.text("answer")],
                    "weight": VG_WEIGHT,
                }
                for qa in picture.records("qas")
            ]
            if questions:
                yield Entry(str(number), ((f"{number}.jpg",),), {"questions": questions})

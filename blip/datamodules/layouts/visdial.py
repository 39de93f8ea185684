"""Visual Dialog 1.0: dialogues of ten rounds about a picture, a hundred candidate answers a round, and their relevance.

visdial_1.0_train.json, ..._val.json, ..._test.json
    {"split", "data": {"questions": [...], "answers": [...], "dialogs": [{"image_id", "caption", "dialog":
    [{"question": 3, "answer": 5, "answer_options": [100 numbers], "gt_index": 45}]}]}}
visdial_1.0_val_dense_annotations.json
    [{"image_id", "round_id": 1 to 10, "gt_relevance": [100 numbers]}]     ("relevance" in the training set's)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blip.datamodules.layouts.coco import coco_names
from blip.datamodules.layouts.packing import Entry, LeftOut
from blip.datamodules.layouts.reading import Record, items

Relevance = dict[tuple[int, int], list[float]]  # (image id, round from 1)


def visdial(files: Sequence[Path]) -> Iterator[Entry | LeftOut]:
    """Each dialogue in the order of the files, one in memory at a time; rounds have options where the file gives them."""
    relevance: Relevance = {}
    dialogues = []
    for path in files:
        kinds = {name for name, _, _ in _first(path)}
        if "" in kinds:
            relevance |= _relevance(path)
        else:
            dialogues.append(path)
    if not dialogues:
        raise ValueError(f"{', '.join(map(str, files))}: no dialogues; a relevance file needs that of its dialogues")
    for path in dialogues:
        split, questions, answers = "", list[str](), list[str]()
        for name, where, value in items(path, "split", "data.questions", "data.answers"):
            if not isinstance(value, str):
                raise ValueError(f"{where} is to be a text, not {str(value)[:60]!r}")
            if name == "split":
                split = value
            else:
                (questions if name == "data.questions" else answers).append(value)
        for _, where, value in items(path, "data.dialogs"):
            yield _dialogue(Record(value, where), questions, answers, _parts(split), relevance)
    for image, number in relevance:
        yield LeftOut("relevance of a round that is not there", f"{image} round {number}")


def _first(path: Path) -> Iterator[Any]:
    """The first item of a file, to know it by."""
    for item in items(path, "", "data.questions", "data.answers", "data.dialogs"):
        yield item
        return


def _relevance(path: Path) -> Relevance:
    found: Relevance = {}
    for _, where, value in items(path, ""):
        record = Record(value, where)
        numbers = record.elements("gt_relevance" if "gt_relevance" in record else "relevance")
        if not all(type(number) in (int, float) for number in numbers):
            raise ValueError(f"{where}: the relevance is to be a list of numbers")
        found[record.number("image_id"), record.number("round_id")] = numbers
    return found


def _parts(split: str) -> tuple[str, ...]:
    """What the pictures' names begin with: the training set's are COCO's, the others were taken later."""
    return (f"VisualDialog_{split}",) if split.startswith(("val", "test")) else ("COCO_train2014", "COCO_val2014")


def _dialogue(
    record: Record, questions: list[str], answers: list[str], parts: tuple[str, ...], relevance: Relevance
) -> Entry:
    image = record.number("image_id")
    names = tuple(dict.fromkeys(name for part in parts for name in coco_names(f"{part}_{image:012d}.jpg")))
    rounds = []
    for number, turn in enumerate(record.records("dialog"), start=1):
        said: dict[str, Any] = {"question": _of(questions, turn, "question")}
        if "answer" in turn:
            said["answer"] = _of(answers, turn, "answer")
        if "answer_options" in turn:
            options = turn.elements("answer_options")
            if not all(type(option) is int and 0 <= option < len(answers) for option in options):
                raise ValueError(f"{turn.where}: answer_options are to be numbers of the {len(answers)} answers")
            said["options"] = [answers[option] for option in options]
            if "gt_index" in turn:
                _of(options, turn, "gt_index")
                said["answer_index"] = turn.number("gt_index")
            if (image, number) in relevance:
                said["relevance"] = relevance.pop((image, number))
                if len(said["relevance"]) != len(options):
                    raise ValueError(f"{turn.where}: {len(options)} options, but {len(said['relevance'])} relevances")
        rounds.append(said)
    return Entry(str(image), (names,), {"caption": record.text("caption"), "rounds": rounds})


def _of(texts: list[Any], turn: Record, name: str) -> Any:
    """The text that a field numbers."""
    number = turn.number(name)
    if not 0 <= number < len(texts):
        raise ValueError(f"{turn.where}: {name} is {number}, but there are {len(texts)}")
    return texts[number]

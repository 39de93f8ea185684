"""What a record of a shard holds: the lists of `KEY.json`, their entries checked one by one.

    pairs        {"captions": ["...", ...]}                              or a KEY.txt, or {"caption": "..."}
    questions    {"questions": [{"id": 1, "question": "...", "answers": ["red", ...], "weight": 1.0}]}
                 answers: what humans said, none in a test set; weight (default 1): of the question's answers together
    statements   {"statements": [{"id": "...", "sentence": "...", "label": true}]}   of the pictures KEY.0.jpg and KEY.1.jpg,
                 left and right; no label in a hidden test set
    rounds       {"caption": "...", "rounds": [{"question": "...", "answer": "...", "options": ["...", ...], "answer_index": 3,
                 "relevance": [0.0, ...]}]}                              a dialogue; a round without options is history alone
    clips, clip_questions                                                as pairs and questions, of a KEY.mp4

Each entry is a row of the stream. Strangers write these files: an entry of another type, or of senseless length, gets no row, and
the reason is counted when the index is made. An entry keeps what else it says (`question_type`), for who evaluates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

NOTHING = ' \t\r\n.!"()*#:;~'  # what cleaning takes from a caption (released code): a text of these alone says nothing
MAX_CHARACTERS = 10_000  # of one question, sentence or answer
MAX_ANSWERS = 1000  # of one question, and options of a round
MAX_ROUNDS = 100  # of one dialogue; VisDial has 10


@dataclass(frozen=True)
class Kind:
    """One kind of records.

    name: what its rows are called; row: what one is, entries: the object of KEY.json -> (its rows, reasons of those left out);
    text: what is written of an entry, to count words; pictures: of one record; clips: a KEY.mp4 stands in their place
    """

    name: str
    row: str
    entries: Callable[[Mapping[str, Any]], tuple[list[Any], list[str]]]
    text: Callable[[Any], str]
    pictures: int = 1
    clips: bool = False

    @property
    def one(self) -> str:
        """What one of its rows is called."""
        return self.name.removesuffix("s").replace("_", " ")

    @property
    def seen(self) -> str:
        """What a record shows."""
        return "clip" if self.clips else "picture" if self.pictures == 1 else "picture pair"


def entries_of(data: bytes, is_json: bool, kind: Kind) -> tuple[list[Any], list[str]]:
    """(entries, reasons of those left out) of a text member. ValueError, in the words of a reason, where it holds none at all."""
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise ValueError("text is not UTF-8") from None
    record: object = {"caption": text}
    if is_json:
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("json does not parse") from None
        if not isinstance(record, dict):
            raise ValueError("json is not an object")
    assert isinstance(record, dict)
    entries, reasons = kind.entries(record)
    if is_json and b"\\ud" in data.lower():  # an escape can be half of a surrogate pair, which no tokenizer takes
        try:
            json.dumps(entries, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise ValueError("text is not Unicode") from None
    return entries, reasons


class _UnfitError(ValueError):
    """Why an entry gets no row."""


def _captions(record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    found = record.get("captions", record.get("caption"))
    captions = found if isinstance(found, list) else [found]
    return [c.strip() for c in captions if isinstance(c, str) and c.strip(NOTHING)], []


def _each(name: str, check: Callable[[dict], dict]) -> Callable[[Mapping[str, Any]], tuple[list[dict], list[str]]]:
    """Reads the list `name` of a record entry by entry."""

    def entries(record: Mapping[str, Any]) -> tuple[list[dict], list[str]]:
        rows, reasons = [], []
        for entry in _list(record, name):
            try:
                rows.append(check(_object(entry, name)))
            except _UnfitError as error:
                reasons.append(str(error))
        return rows, reasons

    return entries


def _question(entry: dict) -> dict:
    answers = [answer for answer in _strings(entry.get("answers", []), "answers") if answer]
    weight = entry.get("weight", 1.0)
    if not _is_number(weight) or not 0 < weight <= 1000:
        raise _UnfitError("question of no weight")
    checked = {"id": _id(entry), "question": _text(entry, "question"), "answers": answers, "weight": float(weight)}
    return entry | checked


def _statement(entry: dict) -> dict:
    label = entry.get("label")
    if not isinstance(label, bool | None):
        raise _UnfitError("label is neither true nor false")
    return entry | {"id": _id(entry), "sentence": _text(entry, "sentence"), "label": label}


def _rounds(record: Mapping[str, Any]) -> tuple[list[dict], list[str]]:
    """The rounds with options, each with its `caption`, its number `round` (from 0) and its `history`, pairs of question and answer.

    A round that cannot be read ends the dialogue: those behind it would lack a part of their history.
    """
    rows: list[dict] = []
    history: list[tuple[str, str]] = []
    try:
        caption = _text(record, "caption")
        told = _list(record, "rounds")
        if len(told) > MAX_ROUNDS:  # each holds all that were before it
            raise _UnfitError("rounds too many")
        for number, entry in enumerate(told):
            entry = _object(entry, "rounds")
            question = _text(entry, "question")
            if "options" in entry:
                asked = {"caption": caption, "round": number, "history": list(history), "question": question}
                rows.append(entry | asked | _options(entry))
            if number + 1 < len(told):
                history.append((question, _text(entry, "answer")))
    except _UnfitError as error:
        return rows, [str(error)]
    return rows, []


def _options(entry: dict) -> dict:
    options = _strings(entry["options"], "options")  # also empty ones, for they are numbered
    index, relevance = entry.get("answer_index"), entry.get("relevance")
    if len(options) < 2:
        raise _UnfitError("fewer than two options")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(options):
        raise _UnfitError("answer_index is none of the options")
    fits = relevance is None or (isinstance(relevance, list) and len(relevance) == len(options))
    if not fits or not all(_is_number(r) and r >= 0 for r in relevance or []):
        raise _UnfitError("relevance is not a number for each option")
    return {"options": options}


def _list(record: Mapping[str, Any], name: str) -> list:
    found = record.get(name)
    if not isinstance(found, list):
        raise ValueError(f"no list of {name}")
    return found


def _object(entry: Any, name: str) -> dict:
    if not isinstance(entry, dict):
        raise _UnfitError(f"{name} with an entry that is no object")
    return entry


def _id(entry: Mapping[str, Any]) -> int | str:
    found = entry.get("id")
    if isinstance(found, bool) or not isinstance(found, int | str) or len(str(found)) > MAX_CHARACTERS:
        raise _UnfitError("entry without an id")
    return found


def _text(entry: Mapping[str, Any], name: str) -> str:
    found = entry.get(name)
    if not isinstance(found, str) or not found.strip(NOTHING):
        raise _UnfitError(f"{name} is empty")
    if len(found) > MAX_CHARACTERS:
        raise _UnfitError(f"{name} too long")
    return found.strip()


def _strings(found: Any, name: str) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise _UnfitError(f"{name} is not a list of texts")
    if len(found) > MAX_ANSWERS or any(len(text) > MAX_CHARACTERS for text in found):
        raise _UnfitError(f"{name} too long")
    return [text.strip() for text in found]


def _is_number(found: Any) -> bool:
    if isinstance(found, bool) or not isinstance(found, int | float):
        return False
    return abs(found) < 2**53 if isinstance(found, int) else math.isfinite(found)


PAIRS = Kind("pairs", "caption", _captions, str)
QUESTIONS = Kind("questions", "question", _each("questions", _question), lambda entry: entry["question"])
STATEMENTS = Kind(
    "statements", "statement", _each("statements", _statement), lambda entry: entry["sentence"], pictures=2
)
ROUNDS = Kind("rounds", "round", _rounds, lambda entry: entry["question"])
CLIPS = Kind("clips", "caption", _captions, str, clips=True)
CLIP_QUESTIONS = Kind("clip_questions", "question", QUESTIONS.entries, QUESTIONS.text, clips=True)
OF_CLIPS = {PAIRS.name: CLIPS, QUESTIONS.name: CLIP_QUESTIONS}
KINDS = {kind.name: kind for kind in (PAIRS, QUESTIONS, STATEMENTS, ROUNDS, CLIPS, CLIP_QUESTIONS)}


def kind_of(name: str) -> Kind:
    """The kind of this name; ValueError with the names there are."""
    if name not in KINDS:
        raise ValueError(f"records={name!r}: there are {', '.join(KINDS)}")
    return KINDS[name]

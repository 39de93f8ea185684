"""What strangers write into KEY.json becomes rows of known types, or a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from blip.datamodules.records import KINDS, PAIRS, QUESTIONS, ROUNDS, STATEMENTS, entries_of, kind_of

ASKED = {"id": 1, "question": " Is it red? ", "answers": ["yes", "no", " "]}
SAID = {"id": "x", "sentence": "Two cubes.", "label": True}
ROUND = {"question": "is it red", "answer": "no", "options": ["yes", "no", "maybe"], "answer_index": 1}


def read(kind, record: Any):
    return entries_of(json.dumps(record).encode(), True, kind)


def test_an_entry_is_made_whole_and_keeps_what_else_it_says():
    ((entry,), reasons) = read(QUESTIONS, {"questions": [ASKED | {"question_type": "is"}], "other": 1})
    assert entry == {"id": 1, "question": "Is it red?", "answers": ["yes", "no"], "weight": 1.0, "question_type": "is"}
    assert reasons == []
    assert read(QUESTIONS, {"questions": [{"id": 1, "question": "q"}]})[0][0]["answers"] == []
    assert read(STATEMENTS, {"statements": [{"id": 1, "sentence": "s"}]})[0][0]["label"] is None


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("text", "questions with an entry that is no object"),
        (ASKED | {"id": None}, "entry without an id"),
        (ASKED | {"id": True}, "entry without an id"),
        (ASKED | {"question": " ... "}, "question is empty"),
        (ASKED | {"question": ["q"]}, "question is empty"),
        (ASKED | {"question": "q" * 10_001}, "question too long"),
        (ASKED | {"answers": "yes"}, "answers is not a list of texts"),
        (ASKED | {"answers": [1]}, "answers is not a list of texts"),
        (ASKED | {"answers": ["yes"] * 1001}, "answers too long"),
        (ASKED | {"answers": ["y" * 10_001]}, "answers too long"),
        (ASKED | {"weight": 0}, "question of no weight"),
        (ASKED | {"weight": "1"}, "question of no weight"),
        (ASKED | {"weight": float("nan")}, "question of no weight"),
        (ASKED | {"weight": 10**400}, "question of no weight"),
    ],
)
def test_a_question_of_another_type_or_length_is_left_out_with_its_reason(entry, reason):
    rows, reasons = read(QUESTIONS, {"questions": [ASKED, entry, ASKED]})
    assert len(rows) == 2
    assert reasons == [reason]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (SAID | {"label": "True"}, "label is neither true nor false"),
        (SAID | {"label": 1}, "label is neither true nor false"),
        (SAID | {"sentence": 7}, "sentence is empty"),
        ([], "statements with an entry that is no object"),
    ],
)
def test_a_statement_of_another_type_is_left_out_with_its_reason(entry, reason):
    assert read(STATEMENTS, {"statements": [entry, SAID]}) == ([SAID | {"sentence": "Two cubes."}], [reason])


def test_a_round_knows_caption_and_what_was_said_before():
    last = {"question": "and big?", "options": ["a", "b"], "answer_index": 0, "relevance": [1, 0.5]}
    told = {"question": "a story?", "answer": "yes"}
    rows, reasons = read(ROUNDS, {"caption": "a cube", "rounds": [ROUND, told, last]})
    assert reasons == []
    assert [(row["round"], row["caption"], row["history"]) for row in rows] == [
        (0, "a cube", []),
        (2, "a cube", [("is it red", "no"), ("a story?", "yes")]),
    ]
    assert rows[1]["relevance"] == [1, 0.5]
    ((row,), _) = read(ROUNDS, {"caption": "c", "rounds": [ROUND | {"options": ["", " no ", ""]}]})
    assert row["options"] == ["", "no", ""], "options keep their numbers"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (ROUND | {"options": ["yes"]}, "fewer than two options"),
        (ROUND | {"options": ["yes", 2]}, "options is not a list of texts"),
        (ROUND | {"options": None}, "options is not a list of texts"),
        (ROUND | {"answer_index": 3}, "answer_index is none of the options"),
        (ROUND | {"answer_index": True}, "answer_index is none of the options"),
        (ROUND | {"relevance": [1]}, "relevance is not a number for each option"),
        (ROUND | {"relevance": [1, None, 0]}, "relevance is not a number for each option"),
        (ROUND | {"relevance": [-1, 0, 0]}, "relevance is not a number for each option"),
        ({"answer": "no"}, "question is empty"),
        ({"question": "q"}, "answer is empty"),
        (3, "rounds with an entry that is no object"),
    ],
)
def test_a_round_that_cannot_be_read_ends_the_dialogue(entry, reason):
    rows, reasons = read(ROUNDS, {"caption": "a cube", "rounds": [ROUND, entry, ROUND]})
    assert ([row["round"] for row in rows], reasons) == ([0], [reason])


def test_a_dialogue_without_end_is_left_out():
    assert read(ROUNDS, {"caption": "a cube", "rounds": [ROUND] * 101}) == ([], ["rounds too many"])


@pytest.mark.parametrize("kind", [kind for name, kind in KINDS.items() if name not in ("pairs", "clips")])
@pytest.mark.parametrize("found", [None, {}, "text", 3])
def test_a_record_without_its_list_is_an_error_that_names_it(kind, found):
    with pytest.raises(ValueError, match=r"no list of (questions|statements|rounds)"):
        read(kind, {"caption": "c", "questions": found, "statements": found, "rounds": found})


def test_what_is_no_record_is_an_error_in_a_few_words():
    for data, said in (
        (b"\xff", "not UTF-8"),
        (b"[1]", "not an object"),
        (b"{", "does not parse"),
        (b"[" * 99999, "parse"),
    ):
        with pytest.raises(ValueError, match=said):
            entries_of(data, True, QUESTIONS)
    half = b'{"questions": [{"id": 1, "question": "\\uD800"}]}'
    with pytest.raises(ValueError, match="not Unicode"):
        entries_of(half, True, QUESTIONS)
    whole = b'{"questions": [{"id": 1, "question": "\\uD83D\\uDE00"}]}'
    assert entries_of(whole, True, QUESTIONS)[0][0]["question"] == "\U0001f600"


def test_captions_come_from_a_list_or_one_or_a_text_file():
    assert read(PAIRS, {"captions": [" a ", "...", 1, "b"]}) == (["a", "b"], [])
    assert read(PAIRS, {"caption": "a"}) == (["a"], [])
    assert entries_of("\ufeff a \n".encode(), False, PAIRS) == (["a"], [])


def test_an_unknown_kind_is_refused_with_those_there_are():
    assert kind_of("rounds") is ROUNDS
    with pytest.raises(ValueError, match="there are pairs, questions, statements, rounds, clips, clip_questions"):
        kind_of("dialogs")

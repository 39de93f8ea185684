"""Answers to questions: chosen or written, whatever else is in the batch, and what they are worth."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blip.evaluators import vqa
from blip.evaluators.vqa import VQAEvaluator, portions
from blip.modules.generation import Decoding
from blip.modules.vqa import VQA
from blip.tasks.vqa import VQATask
from tests.tasks.asking import TOKENIZER, pictures, question_batch, started

BEAM = Decoding("beam", 6, 1, 3, 1.0, 0, 1.0, 1.0, 0, 1.0, "all", 1)
ANSWERS = ["a", "b c", "d", "e f g", "h", "b", "d d"]
ASKED = [[("a b c", ["a"]), ("c", ["b c"]), ("e f", ["d"])], [], [("b b", ["h"])], [("a", ["b"]), ("k l m n", ["b"])]]


@pytest.fixture(scope="module")
def model() -> VQA:
    return started(VQATask, label_smoothing=0.1, max_tokens=12).model.eval()


def evaluator(**changes: Any) -> VQAEvaluator:
    options = {"inference": "rank", "answers": ANSWERS, "top_k": 4, "label_smoothing": 0.1, "decoding": BEAM}
    rest = {"accuracy": "vqa", "by": ["answer_type"], "questions_at_once": 64, "answers_at_once": 64}
    return VQAEvaluator(TOKENIZER, **(options | rest | changes))


@pytest.mark.parametrize("inference", ["rank", "generate"])
@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_answers_are_the_same_however_many_go_through_together(model: VQA, inference: str, at_once: int):
    batch = question_batch(pictures(4), ASKED)
    whole = evaluator(inference=inference).answer(model, batch)
    parts = evaluator(inference=inference, questions_at_once=at_once, answers_at_once=at_once).answer(model, batch)
    assert parts == whole
    assert len(set(whole)) > 1
    alone = [
        evaluator(inference=inference).answer(model, question_batch(pictures(4)[[row]], [[question]]))[0]
        for row, questions in enumerate(ASKED)
        for question in questions
    ]
    assert alone == whole


def test_a_ranked_answer_is_one_of_the_list_as_it_stands_there(model: VQA):
    batch = question_batch(pictures(4), ASKED)
    said = evaluator(answers=["A", "b, c", "D"]).answer(model, batch)
    assert set(said) <= {"A", "b, c", "D"}


def test_clips_are_answered_frame_states_in_a_row(model: VQA):
    clips = pictures(2, frames=3)
    asked = [[("a b", ["a"])], [("c d e", ["a"])]]
    said = evaluator().answer(model, question_batch(clips, asked))
    assert said == evaluator().answer(model, question_batch(clips.flip(1), asked))
    still = clips[:, :1]
    pictured = evaluator().answer(model, question_batch(still[:, 0], asked))
    assert evaluator().answer(model, question_batch(still, asked)) == pictured


def judged(rows: list[tuple[list[str], str, str]], **changes: Any) -> dict[str, float]:
    """Numbers for (humans' answers, what is said, kind) of each question."""
    judge = evaluator(**changes)
    judge.answer = lambda model, batch: [said for _, said, _ in rows]  # type: ignore[method-assign]
    entries = [{"id": i, "answers": answers, "answer_type": kind} for i, (answers, _, kind) in enumerate(rows)]
    judge.update(None, SimpleNamespace(questions=entries))
    return judge.compute(None)


def test_the_official_accuracy_of_each_kind_of_question():
    rows = [
        (["2"] * 4 + ["3"] * 6, "2", "number"),
        (["Yes"] * 9 + ["no"], "yes", "yes/no"),
        (["no"] * 10, "yes", "yes/no"),
    ]
    numbers = judged(rows)
    assert numbers["accuracy_number"] == 100
    assert numbers["accuracy_yes_no"] == 50
    assert numbers["accuracy"] == pytest.approx(200 / 3)
    assert numbers["chance"] == pytest.approx(100 * 1.3 / 3)  # "no": wrong, one human in ten, right


def test_exact_accuracy_is_of_words_as_the_tokenizer_writes_them():
    rows = [(["a  b"], "a b", "other"), (["c"], "d", "other"), (["c"], "c", "other"), (["c"], "a", "other")]
    assert judged(rows, accuracy="exact", by=[]) == {"accuracy": 50.0, "chance": 75.0}


def test_a_set_without_answers_has_no_number_and_keeps_what_was_said():
    judge = evaluator()
    judge.answer = lambda model, batch: ["a", "b"]  # type: ignore[method-assign]
    judge.update(None, SimpleNamespace(questions=[{"id": 1, "answers": []}, {"id": 2, "answers": []}]))
    assert judge.compute(None) == {}
    assert [(row["id"], row["said"]) for row in judge.rows] == [(1, "a"), (2, "b")]


def test_the_rows_of_all_ranks_count_once(monkeypatch: pytest.MonkeyPatch):
    other = {"id": 9, "answers": ["d"] * 10, "answer_type": "other", "said": "a"}
    monkeypatch.setattr(vqa, "from_all_ranks", lambda rows: [*rows, other])
    assert judged([(["a"] * 10, "a", "other")])["accuracy"] == 50


def test_a_list_of_answers_is_read_from_a_file_when_it_is_wanted(model: VQA, tmp_path: Path):
    path = tmp_path / "answer_list.json"
    batch = question_batch(pictures(4), ASKED)
    judge = evaluator(answers=str(path))
    with pytest.raises(FileNotFoundError, match="`blip data answers` makes one"):
        judge.answer(model, batch)
    path.write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match="expected a JSON list of answers"):
        judge.answer(model, batch)
    path.write_text(json.dumps(ANSWERS))
    assert judge.answer(model, batch) == evaluator().answer(model, batch)


def test_no_list_and_unknown_ways_are_refused_with_what_to_do(model: VQA):
    with pytest.raises(ValueError, match="or set inference=generate"):
        evaluator(answers=None).answer(model, question_batch(pictures(4), ASKED))
    with pytest.raises(ValueError, match="inference must be one of rank, generate, not 'guess'"):
        evaluator(inference="guess")
    with pytest.raises(ValueError, match="accuracy must be one of vqa, exact, not 'f1'"):
        evaluator(accuracy="f1")


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [0, 3, 0, 7, 2, 2], [9], [0, 0], [2, 5, 1, 1, 1, 30, 1]])
@pytest.mark.parametrize("most", [1, 3, 4, 100])
def test_portions_hold_all_texts_once_with_their_pictures_and_no_more_than_asked(counts: list[int], most: int):
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).tolist()
    seen = []
    for pictures_of, texts in portions(counts, most):
        rows = owner[texts]
        assert all(pictures_of.start <= row < pictures_of.stop for row in rows)
        fullest = max((rows.count(row) for row in rows), default=1)
        assert fullest * (pictures_of.stop - pictures_of.start) <= most
        seen += range(len(owner))[texts]
    assert seen == list(range(len(owner)))

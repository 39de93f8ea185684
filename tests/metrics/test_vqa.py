"""VQA's accuracy and normalisation are the official ones, and a submission is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blip.cli import main
from blip.metrics.vqa import normalise, score_vqa, vqa_accuracy, write_submission


@pytest.mark.parametrize(
    ("raw", "normalised"),
    [
        ("The Dog.", "dog"),
        ("two;three", "2 3"),
        ("on the left, the red one", "on left red 1"),  # the comma has a space beside it
        ("black/white", "black white"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("shouldntve", "shouldntve"),  # with both missing it is not in the table
        ("shouldn'tve", "shouldn't've"),
        ("somebody'd", "somebodyd"),
        (" tab\tand\nbreak ", "tab and break"),
    ],
)
def test_an_answer_is_normalised(raw: str, normalised: str):
    assert normalise(raw) == normalised


def test_three_who_agree_are_enough_and_each_is_left_out_once():
    humans = ["cat"] * 3 + ["dog"] * 7
    assert vqa_accuracy(humans, "dog") == 1
    assert vqa_accuracy(humans, "The cat.") == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa_accuracy(["cat"] + ["dog"] * 9, "cat") == pytest.approx(0.9 / 3)
    assert vqa_accuracy(humans, "cow") == 0


def test_nothing_is_normalised_where_all_humans_said_the_same():
    assert vqa_accuracy(["yes"] * 10, "Yes") == 0
    assert vqa_accuracy(["yes"] * 9 + ["no"], "Yes") == 1


def test_all_pairs_and_scored_questions_of_the_reference(reference: Path):
    expected = json.loads((reference / "data/metrics/vqa_normalisation.json").read_text(encoding="utf-8"))
    assert len(expected["pairs"]) == 296
    assert [pair for pair in expected["pairs"] if normalise(pair["raw"]) != pair["normalised"]] == []
    assert len(expected["scored"]) == 50
    for question in expected["scored"]:
        assert vqa_accuracy(question["answers"], question["predicted"]) == pytest.approx(question["accuracy"], abs=1e-9)


def test_every_breakdown_is_that_of_the_reference(reference: Path, capsys: pytest.CaptureFixture):
    folder, results = reference / "data/annotations/vqa_v2", reference / "data/metrics/vqa_eval"
    files = [
        folder / "v2_OpenEnded_mscoco_train2014_questions.json",
        folder / "v2_mscoco_train2014_annotations.json",
        results / "v2_OpenEnded_mscoco_train2014_example_results.json",
    ]
    assert main(["score", "--vqa", *map(str, files)]) == 0
    scores = json.loads(capsys.readouterr().out)
    expected = json.loads((results / "expected.json").read_text(encoding="utf-8"))
    assert {key: value for key, value in expected.items() if key != "source"} == {
        key: value for key, value in scores.items() if key != "n"
    }


def test_score_groups_by_type():
    annotations = [question(1, "yes/no", ["yes"] * 10), question(2, "other", ["red", "blue"] * 5)]
    scores = score_vqa({"1": "no", "2": "Red"}, annotations)
    assert scores["overall"] == 50
    assert scores["perAnswerType"] == {"other": 100, "yes/no": 0}
    assert scores["per_question"] == {"1": 0, "2": 100}


@pytest.mark.parametrize(
    ("results", "says"),
    [
        ([{"question_id": 1, "answer": "a"}], "not of the same questions; 1 only in annotations: 2"),
        ([{"question_id": n, "answer": "a"} for n in (1, 2, 3)], "1 only in answers: 3"),
        ([{"question_id": 1, "answer": "a"}] * 2, "question 1 is answered twice"),
        ([{"question_id": 1}], "row 0 is"),
        ({"1": "a"}, "expected a list"),
    ],
)
def test_results_of_other_questions_are_refused(results, says: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    annotations = [question(1, "other", ["a"] * 10), question(2, "other", ["a"] * 10)]
    for name, content in (
        ("questions", {"questions": [{"question_id": 1}, {"question_id": 2}]}),
        ("annotations", {"annotations": annotations}),
        ("results", results),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    assert main(["score", "--vqa", *(str(tmp_path / name) for name in ("questions", "annotations", "results"))]) == 1
    assert says in capsys.readouterr().err


def test_a_submission_is_whole_or_not_there(tmp_path: Path):
    path = tmp_path / "new" / "results.json"
    write_submission(path, {7: "a dog", 8: "2"})
    assert json.loads(path.read_text()) == [{"question_id": 7, "answer": "a dog"}, {"question_id": 8, "answer": "2"}]
    with pytest.raises(TypeError):
        write_submission(path, {9: object()})  # type: ignore[dict-item]
    assert len(json.loads(path.read_text())) == 2
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def question(number: int, answer_type: str, answers: list[str]) -> dict:
    return {
        "question_id": number,
        "answer_type": answer_type,
        "question_type": "what",
        "answers": [{"answer": answer, "answer_id": n} for n, answer in enumerate(answers)],
    }

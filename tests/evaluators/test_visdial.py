"""Ranking the candidates of a dialogue's rounds: in parts of any size, once, with the official numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blip.evaluators import visdial
from blip.evaluators.visdial import VisDialEvaluator
from blip.modules.visdial import VisDial
from blip.tasks.visdial import VisDialTask
from tests.tasks.asking import TOKENIZER, pictures, round_batch, started

OPTIONS = [["e", "f g", "h", "a b c d"], ["e", "k", "h i j", "l"], ["m", "n o", "p", "q"]]
CAPTIONS = ["a b", "a b", "b c d e"]  # two rounds about the first picture
IMAGES = [7, 7, 8]
ROUNDS: list[dict[str, Any]] = [
    {"caption": caption, "history": "x " * i, "question": "c d", "options": options, "answer_index": i}
    for i, (caption, options) in enumerate(zip(CAPTIONS, OPTIONS, strict=True))
]


@pytest.fixture(scope="module")
def model() -> VisDial:
    return started(VisDialTask, max_tokens=12).model.eval()


def image() -> torch.Tensor:
    return pictures(2)[[0, 0, 1]]


@pytest.mark.parametrize("at_once", [1, 3, 4, 100])
def test_scores_are_those_of_each_candidate_alone(model: VisDial, at_once: int):
    scores = VisDialEvaluator(TOKENIZER, at_once).scores(model, round_batch(image(), IMAGES, ROUNDS))
    assert scores.shape == (3, 4)
    for row, entry in enumerate(ROUNDS):
        for number, option in enumerate(entry["options"]):
            batch = round_batch(image()[[row]], [0], [entry | {"options": [option]}])
            cross = model.look(model.visual_encoder(batch.image), batch.caption_ids, batch.caption_layout)
            with torch.no_grad():
                logits = model.match_logits(batch.input_ids, batch.layout, cross)
            assert scores[row, number].item() == pytest.approx((logits[0, 1] - logits[0, 0]).item(), abs=1e-5)


def test_a_picture_of_several_rounds_is_encoded_once(model: VisDial, monkeypatch: pytest.MonkeyPatch):
    seen = []
    forward = model.visual_encoder.forward
    monkeypatch.setattr(model.visual_encoder, "forward", lambda x: (seen.append(x.shape[0]), forward(x))[1])
    VisDialEvaluator(TOKENIZER, 100).scores(model, round_batch(image(), IMAGES, ROUNDS))
    assert seen == [2]


def measured(scores: list[list[float]], rounds: list[dict[str, Any]]) -> dict[str, float]:
    judge = VisDialEvaluator(TOKENIZER, 100)
    judge.scores = lambda model, batch: torch.tensor(scores)  # type: ignore[method-assign]
    judge.update(None, SimpleNamespace(rounds=rounds))
    return judge.compute(None)


def test_numbers_are_of_the_human_s_answer_and_of_dense_relevance():
    rounds = [
        {"answer_index": 0, "relevance": [1.0, 0.5, 0.0]},
        {"answer_index": 2, "relevance": [0.0, 0.0, 0.0]},
        {"answer_index": 1},
    ]
    numbers = measured([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 1.0]], rounds)
    assert numbers["mrr"] == pytest.approx(100 * (1 + 1 / 3 + 1) / 3)
    assert numbers["r1"] == pytest.approx(200 / 3)
    assert numbers["mean_rank"] == pytest.approx(5 / 3)
    assert numbers["ndcg"] == pytest.approx(100)  # of the one round that someone judged
    assert numbers["chance_r1"] == pytest.approx(100 / 3)


def test_a_model_that_cannot_decide_gets_what_chance_gets():
    numbers = measured([[0.0] * 4] * 2, [{"answer_index": 0}, {"answer_index": 3}])
    assert numbers["mrr"] == numbers["chance_mrr"]
    assert numbers["r1"] == numbers["chance_r1"] == 25
    assert "ndcg" not in numbers


def test_the_rounds_of_all_ranks_count_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(visdial, "from_all_ranks", lambda rows: [*rows, {"r1": 0.0}])
    assert measured([[1.0, 0.0]], [{"answer_index": 0}])["r1"] == 50


def test_no_rounds_no_numbers(model: VisDial):
    assert VisDialEvaluator(TOKENIZER, 4).compute(model) == {}

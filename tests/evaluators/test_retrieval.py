"""Retrieval: re-ranking gives each wanted pair ITM's logit and does no more work than asked; ranks are counted strictly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from blip.evaluators.retrieval import RetrievalEvaluator, recalls
from blip.modules.blip import BLIP
from tests.modules.small import pictures, small_model, texts

LENGTHS = (3, 9, 5, 4, 7, 6, 3, 8, 5)
WANTED = torch.zeros(5, len(LENGTHS), dtype=torch.bool)
WANTED[2] = True  # a picture that is near to all texts
WANTED[torch.tensor([0, 0, 1, 4]), torch.tensor([8, 1, 3, 0])] = True


def evaluator(texts_at_once: int) -> RetrievalEvaluator:
    tokenizer: Any = SimpleNamespace(pad_id=0)
    return RetrievalEvaluator(tokenizer, top_k=2, texts_at_once=texts_at_once, itc_scale=1.0)


@pytest.fixture(scope="module")
def model() -> BLIP:
    return small_model()


@pytest.fixture(scope="module")
def held(model: BLIP) -> tuple[list, list]:
    """Pictures and texts as the evaluator holds them; the features don't matter here."""
    ids, layout = texts(*LENGTHS)
    nothing = torch.zeros(1)
    with torch.no_grad():
        states = model.visual_encoder(pictures(len(WANTED)))
    shown = [(i, state, nothing) for i, state in enumerate(states)]
    return shown, [(0, part.tolist(), nothing) for part in ids.split(layout.mask.sum(1).tolist())]


def alone(model: BLIP, state: Tensor, ids: list[int]) -> float:
    packed, layout = torch.tensor(ids), texts(len(ids))[1]
    return model.itm_logits(packed, layout, model.med.look(state[None]))[0, 1].item()


@pytest.mark.parametrize("texts_at_once", [1, 4, 100])
@torch.no_grad()
def test_each_wanted_pair_gets_the_logit_that_it_has_alone(model: BLIP, held: tuple, texts_at_once: int) -> None:
    shown, told = held
    logits = evaluator(texts_at_once).rerank(model, shown, told, WANTED)
    for picture, text in WANTED.nonzero().tolist():
        expected = alone(model, shown[picture][1], told[text][1])
        assert logits[picture, text].item() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_a_picture_near_to_all_texts_makes_no_work_for_the_others(
    model: BLIP, held: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    itm_logits = model.itm_logits
    monkeypatch.setattr(model, "itm_logits", lambda i, layout, c: rows.append(layout.rows) or itm_logits(i, layout, c))
    evaluator(4).rerank(model, *held, WANTED)
    assert max(rows) <= 4
    # 9 + 2 + 1 + 1; the two with one text stand beside the one with two
    assert sum(rows) <= WANTED.sum() + 2


def test_a_true_candidate_comes_behind_all_that_score_the_same() -> None:
    similarity = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    truth = torch.tensor([[True, False, False], [False, True, False]])
    assert recalls(similarity, truth, at=(1, 2)) == {1: 50.0, 2: 100.0}


def test_of_several_true_texts_the_best_counts() -> None:
    assert recalls(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([[True, True, False]]), at=(1,)) == {1: 100.0}


@pytest.mark.parametrize(("itc_scale", "found"), [(1.0, 0.0), (None, 100.0)])
def test_the_similarity_beside_itm_is_the_cosine_or_what_itc_makes_of_it(
    model: BLIP, monkeypatch: pytest.MonkeyPatch, itc_scale: float | None, found: float
) -> None:
    tokenizer: Any = SimpleNamespace(pad_id=0)
    judge = RetrievalEvaluator(tokenizer, top_k=2, texts_at_once=4, itc_scale=itc_scale)
    same = torch.eye(2)
    judge.pictures = [(i, torch.zeros(1, 1), same[i]) for i in range(2)]
    judge.texts = [(i, [1], same[i]) for i in range(2)]
    assert 1 / model.temperature.item() > 5
    monkeypatch.setattr(judge, "rerank", lambda *_: 5 * (1 - same))  # ITM errs by less than ITC is sure
    assert judge.compute(model)["i2t_r1"] == found

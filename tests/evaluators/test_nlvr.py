"""NLVR2's accuracy: each statement once, on any number of ranks, and the same each time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blip.evaluators.nlvr import NLVREvaluator
from tests.ranks import as_ranks

LABELS = torch.tensor([1, 0, 1, 1, 0, 1, 1])
SAID = torch.tensor([1, 0, 0, 1, 1, 1, 1])


def evaluator() -> NLVREvaluator:
    tokenizer: Any = None
    return NLVREvaluator(tokenizer)


def accuracy(which: list[int], labels: torch.Tensor = LABELS, at_once: int = 2) -> dict[str, float]:
    """What is said of these statements by a model that answers as `SAID` has it."""
    judge = evaluator()
    for start in range(0, len(which), at_once):
        rows = torch.tensor(which[start : start + at_once])
        model: Any = SimpleNamespace(nlvr_logits=lambda *_, r=rows: torch.eye(2)[SAID[r]])
        empty = dict.fromkeys(("image", "input_ids", "layout", "text_row"))
        judge.update(model, SimpleNamespace(labels=labels[rows], **empty))
    return judge.compute(model=None)  # type: ignore[arg-type]


def test_the_share_of_right_answers_stands_beside_that_of_the_more_frequent_one() -> None:
    assert accuracy(list(range(7))) == pytest.approx({"accuracy": 500 / 7, "chance": 500 / 7})


@pytest.mark.parametrize("world", [2, 3, 9])
def test_any_number_of_ranks_counts_each_statement_once(world: int) -> None:
    expected = accuracy(list(range(7)))
    assert as_ranks(world, lambda rank: accuracy(list(range(rank, 7, world)))) == [expected] * world


def test_statements_without_a_label_are_left_out() -> None:
    hidden = LABELS.clone()
    hidden[:5] = -1
    assert accuracy(list(range(7)), hidden) == {"accuracy": 100.0, "chance": 100.0}
    assert accuracy(list(range(7)), torch.full_like(LABELS, -1)) == {}

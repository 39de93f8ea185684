"""What can be chosen: controls, the nucleus and its edge cases, and draws that follow the weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from blip.modules.decoding import Decoding, controlled, draw, noise, nucleus

PLAIN: dict[str, Any] = {
    **{"strategy": "greedy", "max_length": 12, "min_length": 0, "samples": 1, "beams": 1, "length_penalty": 1.0},
    **{"length_counts": "all", "top_p": 1.0, "top_k": 0, "temperature": 1.0, "repetition_penalty": 1.0},
    "no_repeat_ngram": 0,
}
WEIGHTS = torch.tensor([0.02, 0.3, 0.05, 0.25, 0.1, 0.08, 0.2], dtype=torch.float64)


def how(**changed: Any) -> Decoding:
    return Decoding(**PLAIN | changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"strategy": "best"}, "strategy must be one of greedy, beam, nucleus, not 'best'"),
        ({"length_counts": "some"}, "length_counts must be one of all, new"),
        ({"top_p": 0.0, "beams": 0}, "beams=0, top_p=0.0 out of range"),
        ({"min_length": 13}, "min_length=13 out of range"),
        ({"samples": 2}, "samples=2: greedy writes at most 1 texts"),
        ({"strategy": "beam", "beams": 3, "samples": 4}, "samples=4: beam writes at most 3"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        how(**changed)


def test_ids_met_before_are_penalised_once_whatever_their_sign() -> None:
    scores = torch.tensor([[2.0, -3.0, 4.0, -5.0]])
    got = controlled(scores, torch.tensor([[0, 1, 1, 0]]), how(repetition_penalty=2.0), end=3)
    assert got.tolist() == [[1.0, -6.0, 4.0, -5.0]]


@pytest.mark.parametrize(("size", "banned"), [(1, {1, 2, 3}), (2, {2, 3}), (3, {3}), (4, set()), (7, set())])
def test_an_n_gram_is_not_written_twice(size: int, banned: set[int]) -> None:
    ids = torch.tensor([[[1, 2, 1, 3, 2, 1]]])
    got = controlled(torch.zeros(1, 1, 5), ids, how(no_repeat_ngram=size), end=0)[0, 0]
    # What followed the last n - 1 ids before: behind 1 came 2 and 3, behind 2 1 came 3.
    assert set(got.isinf().nonzero().flatten().tolist()) == banned


def test_texts_that_are_too_short_do_not_end() -> None:
    assert controlled(torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.long), how(min_length=5), 2)[0, 2] == -math.inf
    assert controlled(torch.zeros(1, 4), torch.zeros(1, 5, dtype=torch.long), how(min_length=5), 2)[0, 2] == 0


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({"top_p": 0.9}, {1, 3, 6, 4, 5}),  # 0.3 + 0.25 + 0.2 + 0.1 = 0.85 is too little
        ({"top_p": 0.8}, {1, 3, 6, 4}),
        ({"top_p": 0.01}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 5, "top_p": 0.7}, {1, 3, 6}),  # 0.75 of 0.93
        ({}, set(range(7))),
    ],
)
def test_the_nucleus_is_the_fewest_tokens_that_hold_p(changed: dict[str, Any], kept: set[int]) -> None:
    weights = nucleus(WEIGHTS.log(), how(**changed))
    assert set(weights.nonzero().flatten().tolist()) == kept
    among = weights / weights.sum()
    rest = torch.zeros(7, dtype=torch.float64).index_fill(0, torch.tensor(sorted(kept)), 1.0) * WEIGHTS
    torch.testing.assert_close(among, rest / rest.sum())


def test_temperature_sharpens() -> None:
    torch.testing.assert_close(nucleus(WEIGHTS.log(), how(temperature=0.5)), WEIGHTS**2 / (WEIGHTS**2).sum())


def test_tokens_of_equal_weight_are_in_the_nucleus_together() -> None:
    assert nucleus(torch.zeros(8), how(top_p=0.5)).count_nonzero() == 8


def test_draws_follow_the_weights() -> None:
    """Pearson's chi-square over 20,000 draws with a fixed seed; 6 degrees of freedom, 22.5 has probability 0.001."""
    count = 20_000
    weights = (3.0 * WEIGHTS).view(1, 1, -1)  # they need not sum to one
    tokens = draw(weights, noise([7], 1, count).view(1, count))[0]
    seen = torch.bincount(tokens, minlength=7).double()
    expected = count * WEIGHTS
    assert ((seen - expected) ** 2 / expected).sum() < 22.5


def test_a_token_without_weight_is_never_drawn() -> None:
    weights = torch.tensor([[[0.0, 0.1, 0.0, 0.7, 0.0]]])
    ends = torch.tensor([[0.0, 1.0 - 2.0**-24, 0.999999, 1.0]])
    assert draw(weights, ends).tolist() == [[1, 3, 3, 3]]


def test_the_noise_of_a_sample_is_its_own() -> None:
    together = noise([3, 5, 3], 4, 6)
    assert torch.equal(together[0], together[2])
    assert torch.equal(together[1], noise([5], 4, 6)[0])
    assert torch.equal(together[:, :2], noise([3, 5, 3], 2, 6))
    assert len(together[:2].flatten().unique()) == 48


def reference_nucleus(logits: Tensor, p: float) -> Tensor:
    """By hand: sorted, taken until their sum reaches p."""
    probabilities = logits.softmax(-1)
    kept, total = torch.zeros_like(probabilities), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if total >= p:
            break
        kept[token] = probabilities[token]
        total += float(probabilities[token])
    return kept / kept.sum()


def test_a_wide_nucleus_is_the_one_made_by_hand() -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    weights = nucleus(logits, how(top_p=0.9))
    for row, given in zip(weights, logits, strict=True):
        torch.testing.assert_close(row / row.sum(), reference_nucleus(given, 0.9))

"""VisDial's numbers: worked out by hand, the same as sorting gives where nothing ties, and what chance gets where all do."""

from __future__ import annotations

import math

import numpy as np
import pytest

from blip.metrics.ranking import ndcg, rank_rates, visdial_scores


def test_rates_by_hand():
    rates = rank_rates([[3, 2, 1], [3, 2, 1], [3, 2, 1]], [0, 1, 2], at=(1, 2))
    assert rates["mrr"] == pytest.approx([1, 1 / 2, 1 / 3])
    assert rates["mean_rank"].tolist() == [1, 2, 3]
    assert rates["r1"].tolist() == [1, 0, 0]
    assert rates["r2"].tolist() == [1, 1, 0]


def test_ranks_are_places_in_the_sorted_list():
    draw = np.random.default_rng(0)
    scores, correct = draw.permuted(np.tile(np.arange(100.0), (50, 1)), axis=1), draw.integers(0, 100, 50)
    order = np.argsort(-scores, axis=1)
    places = 1 + np.array([list(row).index(c) for row, c in zip(order, correct, strict=True)])
    rates = rank_rates(scores, correct)
    assert rates["mean_rank"].tolist() == places.tolist()
    assert rates["mrr"] == pytest.approx(1 / places)
    for k in (1, 5, 10):
        assert rates[f"r{k}"].tolist() == (places <= k).tolist()


def test_a_model_that_scores_all_alike_gets_what_chance_gets():
    rates = rank_rates(np.zeros((1, 100)), [17])
    assert rates["mean_rank"] == pytest.approx([50.5])
    assert rates["r10"] == pytest.approx([0.1])
    assert rates["mrr"] == pytest.approx([np.mean(1 / np.arange(1, 101))])
    relevance = np.eye(4)[[2]]
    assert ndcg(np.zeros((1, 4)), relevance) == pytest.approx([1 / 4])


def test_a_tie_is_the_mean_over_its_orders():
    scores = np.array([[5.0, 3.0, 3.0, 1.0]])
    either = [np.array([[5.0, 3.1, 3.0, 1.0]]), np.array([[5.0, 3.0, 3.1, 1.0]])]
    relevance = np.array([[0.0, 0.4, 0.2, 1.0]])
    for name, value in rank_rates(scores, [1], at=(1, 2)).items():
        assert value == pytest.approx(np.mean([rank_rates(one, [1], at=(1, 2))[name] for one in either]))
    assert ndcg(scores, relevance) == pytest.approx(np.mean([ndcg(one, relevance) for one in either]))


def test_ndcg_by_hand_counts_as_many_places_as_there_are_relevant_candidates():
    # two are relevant, so two places count: 0.5 at place 1, nothing at 2; at best 1 at place 1 and 0.5 at 2
    assert ndcg([[9, 8, 7]], [[0.5, 0, 1.0]]) == pytest.approx([0.5 / (1 + 0.5 / math.log2(3))])
    assert ndcg([[1, 2, 3]], [[0.2, 0.4, 1.0]]) == pytest.approx([1.0])


def test_means_are_in_percent_but_for_the_rank():
    means = visdial_scores(rank_rates([[2, 1], [1, 2]], [0, 0]) | {"ndcg": np.array([])})
    assert means == {"mrr": 75.0, "mean_rank": 1.5, "r1": 50.0, "r5": 100.0, "r10": 100.0}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: rank_rates([[1.0, np.nan]], [0]), "NaN, first in row 0"),
        (lambda: rank_rates([[1.0, 2.0]], [2]), "a candidate \\(0 to 1\\)"),
        (lambda: rank_rates([1.0, 2.0], [0]), "\\[rows, candidates\\]"),
        (lambda: ndcg([[1.0, 2.0]], [[0, 0]]), "row 0 has no relevant candidate"),
        (lambda: ndcg([[1.0, 2.0]], [[0, 0, 1]]), "same shape"),
    ],
)
def test_what_has_no_number_is_refused(call, says: str):
    with pytest.raises(ValueError, match=says):
        call()

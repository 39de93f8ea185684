"""Rates: the values are those of their definitions, and the intervals hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from blip.metrics.rates import auc, f1, share


def test_the_interval_of_a_share_is_wilsons() -> None:
    assert share(8, 10) == pytest.approx(
        (0.8, 0.490162, 0.943318), abs=1e-5
    )  # statsmodels proportion_confint(method="wilson")
    assert share(0, 20) == pytest.approx((0.0, 0.0, 0.161125), abs=1e-5)
    assert np.isnan(share(0, 0)).all()
    with pytest.raises(ValueError, match="0 <= successes <= of"):
        share(3, 2)


def test_f1_is_twice_precision_times_recall_over_their_sum() -> None:
    precision, recall = 30 / 40, 30 / 35
    found = f1(30, 10, 5)
    assert found.value == pytest.approx(2 * precision * recall / (precision + recall))
    assert 0 < found.low < found.value < found.high < 1


def test_the_area_is_the_share_of_pairs_in_order_with_ties_half() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 12, 200), rng.random(200) < 0.3
    pairs = scores[positive][:, None] - scores[~positive][None, :]
    assert auc(scores, positive).value == pytest.approx((pairs > 0).mean() + (pairs == 0).mean() / 2)
    assert auc(-scores, positive).value == pytest.approx(1 - auc(scores, positive).value)
    assert auc(np.zeros(9), np.arange(9) < 3).value == 0.5


def test_the_interval_of_the_area_holds_the_true_area_in_95_of_100_draws() -> None:
    rng = np.random.default_rng(1)
    positive = np.arange(150) < 60
    inside, true = 0, 0.921350  # Phi(2 / sqrt 2)
    for _ in range(400):
        found = auc(rng.standard_normal(150) + 2 * positive, positive)
        inside += found.low <= true <= found.high
    assert 0.925 <= inside / 400 <= 0.985


def test_cases_that_vary_together_count_as_what_they_are() -> None:
    """Each of 60 pictures with four texts of one common score and truth: as uncertain as 60 texts, not as 240."""
    rng = np.random.default_rng(2)
    positive = np.arange(60) < 25
    scores = rng.standard_normal(60) + positive
    once, repeated = (
        auc(scores, positive),
        auc(np.repeat(scores, 4), np.repeat(positive, 4), np.repeat(np.arange(60), 4)),
    )
    assert repeated == pytest.approx(once)
    assert auc(scores, positive, np.arange(60)[::-1]) == once
    apart = auc(np.repeat(scores, 4), np.repeat(positive, 4))
    assert apart.high - apart.low < 0.6 * (once.high - once.low)


def test_the_interval_of_groups_with_both_classes_holds_the_true_area_in_95_of_100_draws() -> None:
    rng = np.random.default_rng(3)
    positive, picture = np.tile([True, False, False], 50), np.repeat(np.arange(50), 3)
    inside, true = 0, 0.921350  # within a picture scores are correlated, which the area among all pictures does not see
    for _ in range(400):
        noise = np.sqrt(0.6) * rng.standard_normal(50)[picture] + np.sqrt(0.4) * rng.standard_normal(150)
        found = auc(noise + 2 * positive, positive, picture)
        inside += found.low <= true <= found.high
    assert 0.925 <= inside / 400 <= 0.985


def test_perfect_separation_of_few_cases_is_no_certainty() -> None:
    found = auc(np.arange(10), np.arange(10) >= 5)
    assert found.value == found.high == 1.0
    assert 0.4 < found.low < 0.6
    assert auc(np.arange(10), np.arange(10) < 5) == pytest.approx((0.0, 0.0, 1 - found.low))
    assert np.isnan(auc([0.1, 0.2], [True, True])).all()

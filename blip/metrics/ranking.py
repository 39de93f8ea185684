"""VisDial's numbers from scores of candidates: MRR, R@k, mean rank and NDCG (Das et al., 2017; the challenge's evaluation).

A candidate's rank is 1 + how many score higher. Candidates that score the same are taken in every order, each as likely: a
model that scores all alike gets what chance gets, not the best and not what the order of the list happens to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Rates = dict[str, NDArray[np.float64]]


def rank_rates(scores: ArrayLike, correct: ArrayLike, at: tuple[int, ...] = (1, 5, 10)) -> Rates:
    """Of each row "mrr", "r1", "r5", "r10" (0 to 1) and "mean_rank" of the correct candidate.

    scores [N, C], the higher the better; correct [N], which candidate the human gave. NaN is an error.
    """
    scores = _checked(scores)
    correct = np.asarray(correct)
    if correct.shape != scores.shape[:1] or ((correct < 0) | (correct >= scores.shape[1])).any():
        raise ValueError(
            f"correct must hold a candidate (0 to {scores.shape[1] - 1}) for each of {scores.shape[0]} rows"
        )
    own = np.take_along_axis(scores, correct[:, None], axis=1)  # [N, 1]
    higher = (scores > own).sum(axis=1)  # [N]
    equal = (scores == own).sum(axis=1)  # [N], the correct one among them
    rates = {
        "mrr": _mean_over_ties(1 / np.arange(1, scores.shape[1] + 1), higher, equal),
        "mean_rank": higher + (equal + 1) / 2,
    }
    return rates | {f"r{k}": np.clip((k - higher) / equal, 0, 1) for k in at}


def ndcg(scores: ArrayLike, relevance: ArrayLike) -> NDArray[np.float64]:
    """Normalised discounted cumulative gain of each row (0 to 1), over its first k places, k = its relevant candidates.

    scores, relevance [N, C]: as VisDial's dense annotations have it, the share of humans who found a candidate right. The gain
    at place p is relevance / log2(p + 1); the ideal order has the most relevant first. A row without any is an error.
    """
    scores = _checked(scores)
    relevance = np.asarray(relevance, dtype=np.float64)
    if relevance.shape != scores.shape:
        raise ValueError(f"relevance {relevance.shape} and scores {scores.shape} must have the same shape")
    relevant = (relevance != 0).sum(axis=1)  # [N]
    if not relevant.all():
        raise ValueError(f"row {int(relevant.argmin())} has no relevant candidate; NDCG is not defined there")
    places = np.arange(1, scores.shape[1] + 1)
    values = []
    for row, gains, k in zip(scores, relevance, relevant, strict=True):
        discount = np.where(places <= k, 1 / np.log2(places + 1), 0.0)
        higher = (row[None, :] > row[:, None]).sum(axis=1)  # [C]
        equal = (row[None, :] == row[:, None]).sum(axis=1)
        gained = (gains * _mean_over_ties(discount, higher, equal)).sum()
        values.append(gained / (np.sort(gains)[::-1] * discount).sum())
    return np.array(values)


def visdial_scores(rates: Mapping[str, NDArray[np.float64] | Sequence[float]]) -> dict[str, float]:
    """Means over rows, rates in percent: {"mrr", "r1", "r5", "r10", "mean_rank", "ndcg", ...} of what is given and not empty."""
    means = {name: float(np.mean(np.asarray(values))) for name, values in rates.items() if len(values)}
    return {name: mean if name == "mean_rank" else 100 * mean for name, mean in means.items()}


def _mean_over_ties(worth: NDArray, higher: NDArray, equal: NDArray) -> NDArray:
    """Mean worth of the places that a candidate may take, `higher` + 1 to `higher` + `equal`."""
    total = np.concatenate([[0.0], np.cumsum(worth)])
    return (total[higher + equal] - total[higher]) / equal


def _checked(scores: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores must be [rows, candidates], got shape {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"scores hold NaN, first in row {int(np.isnan(scores).any(axis=1).argmax())}")
    return scores

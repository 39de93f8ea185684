"""Rates with their 95 % intervals: shares by Wilson, F1 by Wilson over its Jaccard index, areas under the ROC curve by DeLong."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z = 1.959964  # of 95 %


class Rate(NamedTuple):
    """A value with the ends of its 95 % interval, fractions; all NaN where nothing was counted."""

    value: float
    low: float
    high: float


NONE = Rate(math.nan, math.nan, math.nan)


def share(successes: int, of: int) -> Rate:
    """successes / of, with Wilson's score interval, which holds for few cases and near 0 and 1 too."""
    if not 0 <= successes <= of:
        raise ValueError(f"{successes} of {of}: a share needs 0 <= successes <= of")
    if not of:
        return NONE
    value = successes / of
    middle = (value + Z**2 / (2 * of)) / (1 + Z**2 / of)
    half = Z * math.sqrt(value * (1 - value) / of + Z**2 / (4 * of**2)) / (1 + Z**2 / of)
    return Rate(value, min(max(middle - half, 0.0), value), max(min(middle + half, 1.0), value))


def f1(true_positives: int, false_positives: int, false_negatives: int) -> Rate:
    """F1 of a detection. J = TP / (TP + FP + FN) is a share, and F1 = 2 J / (1 + J) grows with it: so do its ends."""
    found = share(true_positives, true_positives + false_positives + false_negatives)
    return Rate(*(2 * each / (1 + each) for each in found))


def auc(scores: ArrayLike, positive: ArrayLike, groups: ArrayLike | None = None) -> Rate:
    """How often a positive case scores above a negative one, equal scores counting half: the area under the ROC curve.

    scores [N], no NaN; positive [N], bool. The interval is DeLong's (1988), by midranks (Sun and Xu, 2014), on the logit, so that it
    stays within 0 and 1; where every positive lies above every negative the variance is unknown, and the free end is the exact
    one-sided 2.5 % bound for as many trials as the smaller class has cases. NONE where one class is empty.
    groups [N]: cases of one number vary together, as the texts of one picture do; the variance is then Obuchowski's (1997).
    """
    scores, positive = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    if scores.shape != positive.shape or scores.ndim != 1 or np.isnan(scores).any():
        raise ValueError(f"scores {scores.shape} and positive {positive.shape} must be one number and one class a case")
    group = np.arange(len(scores)) if groups is None else np.unique(groups, return_inverse=True)[1]
    m, n = int(positive.sum()), int((~positive).sum())
    if not m or not n:
        return NONE
    among_all = _midranks(scores)
    above = (among_all[positive] - _midranks(scores[positive])) / n  # [m], share of the negatives below each positive
    below = 1 - (among_all[~positive] - _midranks(scores[~positive])) / m  # [n], of the positives above each negative
    area = float(above.mean())
    # [G], deviations of each group's positives, and of its negatives
    sums = [
        np.bincount(group[of], each - area, group.max() + 1) for of, each in ((positive, above), (~positive, below))
    ]
    sizes = [len(np.unique(group[of])) for of in (positive, ~positive)]  # groups that have any
    if area in (0.0, 1.0):
        bound = 0.025 ** (1 / min(sizes))
        return Rate(area, bound if area else 0.0, 1.0 if area else 1 - bound)
    groups_in_all = len(sums[0])
    variance = 2 * groups_in_all / max(groups_in_all - 1, 1) * float(sums[0] @ sums[1]) / (m * n)
    for total, size, count in zip(sums, sizes, (m, n), strict=True):
        variance += size / (size - 1) * float(total @ total) / count**2 if size > 1 else 0.25
    variance = max(variance, 0.0)
    logit, half = math.log(area / (1 - area)), Z * math.sqrt(variance) / (area * (1 - area))
    return Rate(area, _logistic(logit - half), _logistic(logit + half))


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))


def _midranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the middle of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]

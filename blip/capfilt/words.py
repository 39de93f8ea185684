"""What texts are made of: length, vocabulary, and which words one set of texts prefers over another."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LONGEST = 60  # words; longer texts are counted as this long
PRIOR = 1000.0  # words that the prior of a shift weighs as much as
_WORD = re.compile(r"\w+(?:['’-]\w+)*")  # noqa: RUF001


def words_of(text: str) -> list[str]:
    """The words of a text in lower case; what has no space between words is one word."""
    return _WORD.findall(text.lower())


class Texts:
    """Running statistics of a set of texts.

    lengths [LONGEST + 1]: how many texts have so many words; words: how often each occurs; count: texts
    """

    def __init__(self) -> None:
        self.count = 0
        self.lengths: NDArray[np.int64] = np.zeros(LONGEST + 1, np.int64)
        self.words: Counter[str] = Counter()
        self._seen: set[int] = set()

    def add(self, texts: Iterable[str]) -> None:
        for text in texts:
            words = words_of(text)
            self.count += 1
            self.lengths[min(len(words), LONGEST)] += 1
            self.words.update(words)
            self._seen.add(hash(tuple(words)))

    def __or__(self, other: Texts) -> Texts:
        """Both sets together."""
        both = Texts()
        both.count, both.lengths = self.count + other.count, self.lengths + other.lengths
        both.words, both._seen = self.words + other.words, self._seen | other._seen
        return both

    def numbers(self) -> dict[str, float]:
        """mean and median length in words, vocabulary (distinct words), entropy of its words (bits), distinct texts (percent)."""
        if not self.count:
            return {}
        total = self.words.total()
        entropy = -sum(n / total * math.log2(n / total) for n in self.words.values()) if total else 0.0
        middle = int(np.searchsorted(np.cumsum(self.lengths), (self.count + 1) // 2))
        return {
            "words_mean": total / self.count,
            "words_median": middle,
            "vocabulary": len(self.words),
            "word_entropy_bits": entropy,
            "distinct_texts": 100 * len(self._seen) / self.count,
        }


class Shift(NamedTuple):
    """How much more a word is said in one set than in the other: log-odds in standard errors, and its rates a thousand words."""

    word: str
    z: float
    first: float
    second: float


def shifts(first: Mapping[str, int], second: Mapping[str, int]) -> list[Shift]:
    """Words by how much the first counts prefer them over the second, the most preferred first.

    The log-odds ratio with an informative Dirichlet prior over its standard error (Monroe, Colaresi and Quinn, 2008, section 3.5.1);
    the prior is the words of both in their proportions, as heavy as PRIOR words. Empty where one has no words.
    """
    n, m = sum(first.values()), sum(second.values())
    if not n or not m:
        return []
    found = []
    for word in {*first, *second}:
        a, b = first.get(word, 0), second.get(word, 0)
        prior = PRIOR * (a + b) / (n + m)
        odds = [math.log((y + prior) / max(of + PRIOR - y - prior, 0.5)) for y, of in ((a, n), (b, m))]
        error = math.sqrt(1 / (a + prior) + 1 / (b + prior))
        found.append(Shift(word, (odds[0] - odds[1]) / error, 1000 * a / n, 1000 * b / m))
    return sorted(found, key=lambda shift: (-shift.z, shift.word))

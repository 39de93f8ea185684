"""The most typical caption of a set: what scores best when the same is said of every picture. A captioner has to do better.

CIDEr-D as COCO's evaluation has it, with document frequencies of the set itself. All captions are compared with the mean of the
set by their tf-idf vectors, which is CIDEr without its clipping and its penalty for other lengths and takes one pass; the best
`SHORTLIST` of them are then scored as they should be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from blip.metrics.ptb import tokenize

ORDERS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of the penalty for another length
SHORTLIST = 500


def typical_caption(captions: Sequence[Sequence[str]]) -> tuple[str, float]:
    """The caption that, said of every picture, has the highest CIDEr (in percent), and that CIDEr.

    captions: those of each picture. Of equally good ones the first. ValueError where no picture has a caption.
    """
    pictures = [texts for texts in captions if texts]
    if not pictures:
        raise ValueError("no captions: none is typical")
    texts = [text for each in pictures for text in each]
    share = np.concatenate([np.full(len(each), 1 / len(each)) for each in pictures]) / len(pictures)  # [C], sums to 1
    vectors = _Vectors(tokenize(texts), np.repeat(np.arange(len(pictures)), [len(each) for each in pictures]))
    closest = np.argsort(-vectors.to_mean(share), kind="stable")[:SHORTLIST]
    distinct = {vectors.sentences[number]: int(number) for number in sorted(closest, reverse=True)}
    scores = {number: vectors.cider(number, share) for number in sorted(distinct.values())}
    best = max(scores, key=scores.__getitem__)
    return texts[best], scores[best]


class _Vectors:
    """The n-grams of C sentences as tf-idf: entry e is `weight[e]` of n-gram `gram[e]` in sentence `row[e]`, sorted by n-gram."""

    def __init__(self, sentences: Sequence[str], picture: np.ndarray) -> None:
        self.sentences = sentences
        known: dict[tuple[str, ...], int] = {}
        rows: list[int] = []
        grams: list[int] = []
        counts: list[int] = []
        for number, sentence in enumerate(sentences):
            words = sentence.split()
            found = Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))
            rows += [number] * len(found)
            grams += [known.setdefault(gram, len(known)) for gram in found]
            counts += found.values()
        self.order = np.array([len(gram) - 1 for gram in known], np.int64)  # [G]
        row, gram = np.array(rows, np.int64), np.array(grams, np.int64)
        sort = np.argsort(gram, kind="stable")
        self.row, self.gram = row[sort], gram[sort]
        # in how many pictures an n-gram is
        seen = np.unique(np.stack([self.gram, picture[self.row]], 1), axis=0)[:, 0]
        idf = np.log(picture[-1] + 1) - np.log(np.bincount(seen, minlength=len(known)))
        self.weight = np.array(counts, np.float64)[sort] * idf[self.gram]
        self.starts = np.searchsorted(self.gram, np.arange(len(known) + 1))
        self.norm = np.sqrt(self._by_order(self.row, self.weight**2, self.gram))  # [C, 4]
        self.length = np.array([max(0, len(sentence.split()) - 1) for sentence in sentences])  # in pairs of words

    def _by_order(self, row: np.ndarray, value: np.ndarray, gram: np.ndarray) -> np.ndarray:
        """Sums of values by sentence and order of their n-gram, [C, 4]."""
        place = row * ORDERS + self.order[gram]
        return np.bincount(place, value, len(self.sentences) * ORDERS).reshape(-1, ORDERS)

    def to_mean(self, share: np.ndarray) -> np.ndarray:
        """[C]: products of each sentence's unit vectors with the mean of all, weighted by `share`, over the orders."""
        unit = self.weight / np.maximum(self.norm[self.row, self.order[self.gram]], 1e-12)
        mean = np.bincount(self.gram, unit * share[self.row], len(self.order))
        return self._by_order(self.row, unit * mean[self.gram], self.gram).mean(1)

    def cider(self, number: int, share: np.ndarray) -> float:
        """CIDEr-D in percent of saying sentence `number` everywhere; all sentences are references, weighted by `share`."""
        product = np.zeros((len(self.sentences), ORDERS))
        for entry in np.flatnonzero(self.row == number):
            gram = self.gram[entry]
            where = slice(self.starts[gram], self.starts[gram + 1])
            weight = self.weight[where]
            product[self.row[where], self.order[gram]] += np.minimum(self.weight[entry], weight) * weight
        norms = self.norm[number] * self.norm
        cosine = np.divide(product, norms, out=product, where=norms > 0)
        penalty = np.exp(-((self.length - self.length[number]) ** 2) / (2 * SIGMA**2))
        return 1000 * float(share @ (cosine.mean(1) * penalty))

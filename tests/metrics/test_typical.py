"""The most typical caption is the one that COCO's own CIDEr likes best when it is said everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from blip.metrics.captions import score_captions
from blip.metrics.typical import typical_caption

WORDS = ["a", "the", "dog", "cat", "man", "runs", "sits", "on", "in", "grass", "red", "big"]


def some(pictures: int, seed: int) -> list[list[str]]:
    """One to three captions of a few words for each picture."""
    rng = np.random.default_rng(seed)
    return [
        [" ".join(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(rng.integers(1, 4))] for _ in range(pictures)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_best_by_the_toolkits_cider_and_so_is_its_score(seed: int):
    pytest.importorskip("pycocoevalcap", reason="the extra `metrics` is not installed")
    captions = some(12, seed)
    said = {text for texts in captions for text in texts}
    scores = {text: 100 * score_captions(captions, [text] * 12, ["cider"]).corpus["CIDEr"] for text in said}
    found, score = typical_caption(captions)
    assert score == pytest.approx(scores[found])
    assert score == pytest.approx(max(scores.values()))


def test_each_picture_counts_alike_however_many_captions_it_has():
    many = [["a dog runs"] * 5, ["a cat sits on grass"], ["a cat sits on the grass"], ["red man"]]
    assert typical_caption(many)[0].startswith("a cat sits on")


def test_it_is_given_as_it_was_written_and_of_equals_the_first():
    captions = [["A Dog runs."], ["a dog runs"], ["two cats"], ["a man"]]
    assert typical_caption(captions)[0] == "A Dog runs."


def test_no_captions_are_told():
    with pytest.raises(ValueError, match="no captions"):
        typical_caption([[], []])

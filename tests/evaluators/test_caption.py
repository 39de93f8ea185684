"""Captions are written where something scores them, for each picture by itself, with what the model thinks of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch

from blip.evaluators.caption import Caption, CaptionEvaluator
from blip.modules.decoding import Decoding
from blip.text import Tokenizer
from tests.modules.small import VOCABULARY, pictures, small_model

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(VOCABULARY - 6)), "[DEC]", "[ENC]"]
DECODING: dict[str, Any] = {
    **{"strategy": "greedy", "max_length": 12, "min_length": 0, "samples": 1, "beams": 1, "length_penalty": 1.0},
    **{"length_counts": "all", "top_p": 0.9, "top_k": 0, "temperature": 1.0, "repetition_penalty": 1.0},
    "no_repeat_ngram": 0,
}


def evaluator(
    *scores: Any, prompt: str = "", seed: int = 0, baseline: str | None = None, **decoding: Any
) -> CaptionEvaluator:
    words = {piece: i for i, piece in enumerate(PIECES)}
    wordpiece = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    wordpiece.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return CaptionEvaluator(Tokenizer(wordpiece), scores, prompt, Decoding(**DECODING | decoding), seed, baseline)


def batch(*keys: str, seed: int = 0) -> Any:
    references = [[key] for key in keys]
    return SimpleNamespace(image=pictures(len(keys), seed), keys=list(keys), references=references)


def told(text: str, log_prob: float) -> list[Caption]:
    return [Caption(text, log_prob, [text], [log_prob])]


def test_scores_get_the_captions_with_their_references_and_are_put_together() -> None:
    model: Any = None
    both = evaluator(
        lambda references, captions: {"right": sum(c in r for r, c in zip(references, captions, strict=True))},
        lambda references, captions: {"count": len(captions)},
    )
    both.write = lambda model, batch: [told("a cat", -1.0), told("a cow", -2.0)]  # type: ignore[method-assign]
    for _ in range(2):
        both.update(model, SimpleNamespace(references=[["a cat"], ["a dog"]]))
    assert both.compute(model) == {"right": 2, "count": 4, "log_prob": -1.5}
    both.reset()
    assert both.compute(model) == {}


def test_what_a_constant_caption_scores_stands_beside_the_models() -> None:
    model: Any = None
    beside = evaluator(
        lambda references, captions: {"right": sum(c in r for r, c in zip(references, captions, strict=True))},
        baseline="a dog",
    )
    beside.write = lambda model, batch: [told("a cat", -1.0), told("a cow", -2.0)]  # type: ignore[method-assign]
    beside.update(model, SimpleNamespace(references=[["a dog"], ["a dog", "a cow"]]))
    assert beside.compute(model) == {"right": 1, "right_baseline": 2, "log_prob": -1.5}


def test_nothing_is_written_that_nothing_scores() -> None:
    model: Any = None
    none = evaluator()
    none.write = None  # type: ignore[assignment]
    none.update(model, batch("a"))
    assert none.compute(model) == {}


def test_a_caption_has_no_prompt_and_a_log_probability_for_each_token() -> None:
    captions = [row[0] for row in evaluator(prompt="w1 w2").write(small_model(), batch("a", "b", "c"))]
    for caption in captions:
        assert [token for token in caption.tokens if not token.startswith("[")] == caption.text.split()
        assert len(caption.tokens) <= 12 - 3
        assert len(caption.log_probs) == len(caption.tokens)
        assert max(caption.log_probs) < 0
        assert caption.log_prob == pytest.approx(sum(caption.log_probs) / len(caption.log_probs))


def test_what_is_drawn_for_a_picture_depends_on_its_key_and_the_seed_alone() -> None:
    model = small_model()
    image = pictures(3)
    nucleus: dict[str, Any] = {"strategy": "nucleus", "samples": 2, "top_p": 1.0}

    def drawn(keys: list[str], rows: list[int], seed: int = 0) -> list[list[str]]:
        made = evaluator(seed=seed, **nucleus).write(model, SimpleNamespace(image=image[rows], keys=keys))
        return [[caption.text for caption in captions] for captions in made]

    together = drawn(["a", "b", "c"], [0, 1, 2])
    assert together == drawn(["a"], [0]) + drawn(["c", "b"], [2, 1])[::-1]
    assert drawn(["a"], [0], seed=1) != drawn(["a"], [0])
    assert all(len(set(texts)) == 2 for texts in together)
    assert torch.equal(image, pictures(3))

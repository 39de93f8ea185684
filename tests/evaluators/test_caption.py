"""Captions are written where something scores them, and a rank or set without pictures is no error."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from blip.evaluators.caption import CaptionEvaluator

BATCH = SimpleNamespace(image=None, references=[["a cat"], ["a dog"]])


def evaluator(*scores: Any) -> CaptionEvaluator:
    tokenizer: Any = SimpleNamespace()
    made = CaptionEvaluator(tokenizer, scores, max_length=4)
    made.write = lambda model, image: ["a cat", "a cow"]  # type: ignore[method-assign]
    return made


def test_scores_get_the_captions_with_their_references_and_are_put_together() -> None:
    model: Any = None
    both = evaluator(
        lambda references, captions: {"right": sum(c in r for r, c in zip(references, captions, strict=True))},
        lambda references, captions: {"count": len(captions)},
    )
    both.update(model, BATCH)
    both.update(model, BATCH)
    assert both.compute(model) == {"right": 2, "count": 4}
    both.reset()
    assert both.compute(model) == {}


def test_nothing_is_written_that_nothing_scores() -> None:
    model: Any = None
    none = evaluator()
    none.write = None  # type: ignore[assignment]
    none.update(model, BATCH)
    assert none.compute(model) == {}

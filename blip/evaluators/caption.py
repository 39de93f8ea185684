"""What a model's captions are worth: writes one for each picture and hands them to the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from blip.evaluators.collect import from_all_ranks
from blip.modules.blip import BLIP
from blip.modules.generation import greedy
from blip.text import Tokenizer

Score = Callable[[list[list[str]], list[str]], dict[str, float]]


class CaptionEvaluator:
    """Captions of held-out pictures; `scores` are functions (references, captions) -> {name: number}.

    prompt: words that every caption begins with (not part of it); max_length counts [DEC] and the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, scores: Sequence[Score], max_length: int, prompt: str = "") -> None:
        self.tokenizer, self.scores, self.max_length = tokenizer, list(scores), max_length
        self.prompt = tokenizer.encode([prompt], max_length)[0][1:-1] if prompt else []
        self.reset()

    def reset(self) -> None:
        self.captions: list[str] = []
        self.references: list[list[str]] = []

    @torch.no_grad()
    def update(self, model: BLIP, batch: Any) -> None:
        if self.scores:
            self.captions += self.write(model, batch.image)
            self.references += batch.references

    def write(self, model: BLIP, image: torch.Tensor) -> list[str]:
        """Captions of normalised images [B, 3, S, S], without the prompt."""
        states = model.visual_encoder(image)
        ids = greedy(model, states, self.prompt, self.max_length, self.tokenizer.sep_id, self.tokenizer.pad_id)
        return [self.tokenizer.decode(row[1 + len(self.prompt) :]) for row in ids.tolist()]

    def compute(self, model: BLIP) -> dict[str, float]:
        references, captions = from_all_ranks(self.references), from_all_ranks(self.captions)
        if not captions:
            return {}
        return {name: number for score in self.scores for name, number in score(references, captions).items()}

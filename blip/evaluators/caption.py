"""What a model's captions are worth: writes them for each picture and hands the first to the scores."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blip.evaluators.collect import from_all_ranks
from blip.modules.generation import Decoding, generate, noise
from blip.text import Tokenizer

Score = Callable[[list[list[str]], list[str]], dict[str, float]]


@dataclass(frozen=True)
class Caption:
    """A text without its prompt; log_prob is the mean over its tokens, [SEP] included, as the model has them unchanged."""

    text: str
    log_prob: float
    tokens: list[str]
    log_probs: list[float]

    def row(self) -> dict[str, Any]:
        """As it stands in predictions.jsonl."""
        return {"caption": self.text, "log_prob": self.log_prob, "tokens": self.tokens, "log_probs": self.log_probs}


class CaptionEvaluator:
    """Captions of held-out pictures; `scores` are functions (references, captions) -> {name: number}.

    prompt: words that every caption begins with (not part of it). seed: of sampling; what is drawn for a picture depends on
    it and on the picture's key alone. baseline: a text whose scores, when it is said of every picture, stand beside the model's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        scores: Sequence[Score],
        prompt: str,
        decoding: Decoding,
        seed: int,
        baseline: str | None = None,
    ) -> None:
        self.tokenizer, self.scores, self.decoding, self.seed = tokenizer, list(scores), decoding, seed
        self.baseline = baseline
        self.prompt = [tokenizer.dec_id, *tokenizer.encode([prompt], decoding.max_length)[0][1:-1]]
        self.reset()

    def reset(self) -> None:
        self.captions: list[Caption] = []
        self.references: list[list[str]] = []

    @torch.no_grad()
    def update(self, model: Any, batch: Any) -> None:
        if self.scores:
            self.captions += [captions[0] for captions in self.write(model, batch)]
            self.references += batch.references

    @torch.no_grad()
    def write(self, model: Any, batch: Any) -> list[list[Caption]]:
        """`decoding.samples` captions for each normalised picture of the batch."""
        how, tokenizer = self.decoding, self.tokenizer
        cross = model.med.look(model.visual_encoder(batch.image), decoder=True)
        uniform = None
        if how.strategy == "nucleus":
            seeds = [zlib.crc32(f"{self.seed} {key}".encode()) for key in batch.keys]
            uniform = noise(seeds, how.samples, how.max_length - len(self.prompt))
        texts = generate(model.med, cross, self.prompt, how, tokenizer.sep_id, tokenizer.pad_id, uniform)
        rows = zip(texts.ids.tolist(), texts.log_probs.tolist(), texts.written.tolist(), strict=True)
        said = [self._caption(ids[len(self.prompt) :][:count], told[:count]) for ids, told, count in rows]
        return [said[i : i + how.samples] for i in range(0, len(said), how.samples)]

    def _caption(self, ids: list[int], log_probs: list[float]) -> Caption:
        tokens = [self.tokenizer.decode([i], keep_special=True) for i in ids]
        return Caption(self.tokenizer.decode(ids), sum(log_probs) / len(log_probs), tokens, log_probs)

    def compute(self, model: Any) -> dict[str, float]:
        """What the scores make of all captions, `NAME_baseline` of the baseline's, and `log_prob`, the mean of the captions' own."""
        references, captions = from_all_ranks(self.references), from_all_ranks(self.captions)
        if not captions:
            return {}
        texts = [caption.text for caption in captions]
        numbers = {name: number for score in self.scores for name, number in score(references, texts).items()}
        if self.baseline is not None:
            constant = [self.baseline] * len(texts)
            beside = {
                f"{k}_baseline": number for score in self.scores for k, number in score(references, constant).items()
            }
            numbers |= beside
        return {**numbers, "log_prob": sum(caption.log_prob for caption in captions) / len(captions)}

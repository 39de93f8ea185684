"""What a model makes of statements about two pictures (NLVR2): the share that it judges right."""

from __future__ import annotations

from typing import Any

import torch

from blip.evaluators.collect import from_all_ranks
from blip.modules.nlvr import NLVR
from blip.text import Tokenizer


class NLVREvaluator:
    """`accuracy` in percent, and `chance`: what the more frequent answer alone would reach.

    Pictures stand in the order of the data: nothing is drawn, so that a score is a function of model and data (the released
    code swaps the two at random in evaluation, too).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.reset()

    def reset(self) -> None:
        self.judged: list[torch.Tensor] = []  # on the device: labels and answers, [2, R] a batch

    @torch.no_grad()
    def update(self, model: NLVR, batch: Any) -> None:
        logits = model.nlvr_logits(batch.image, batch.input_ids, batch.layout, batch.text_row)
        self.judged.append(torch.stack([batch.labels, logits.argmax(1)]))

    def compute(self, model: NLVR) -> dict[str, float]:
        """Empty where no statement has a label, as in a test set that is judged elsewhere."""
        judged = from_all_ranks([(int(label), int(said)) for part in self.judged for label, said in part.T.tolist()])
        told = [(label, said) for label, said in judged if label >= 0]
        if not told:
            return {}
        true = sum(label for label, _ in told) / len(told)
        right = sum(label == said for label, said in told) / len(told)
        return {"accuracy": 100 * right, "chance": 100 * max(true, 1 - true)}

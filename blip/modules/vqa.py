"""Answering questions about pictures (paper section 5.3): the question looks at the picture, the answer looks at the question.

- encoder and decoder share nothing; the decoder's cross-attention is as wide as the text, for it never sees the picture
- all states of the question are looked at, its padding is not: an answer does not depend on what else is in the batch
- `rank` chooses from a list of answers, `generation.generate` writes one
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blip.layout import TextLayout
from blip.modules.blip import Backbone, BLIPConfig
from blip.modules.losses import at_least_float32, text_losses
from blip.modules.med import CrossKV


class VQA(Backbone):
    """Image encoder, question encoder, answer decoder; whatever `config` says that MED shares, here it is nothing."""

    def __init__(self, config: BLIPConfig) -> None:
        med = replace(config.med, share="none", decoder_look_width=config.med.width)
        super().__init__(replace(config, med=med))

    def ask(
        self, input_ids: Tensor, layout: TextLayout, cross: list[CrossKV], row: Tensor | None = None
    ) -> list[CrossKV]:
        """Questions [CLS] ... [SEP] looking at pictures to what their answers look at, Q rows; [ENC] replaces [CLS].

        row [Q], ascending: the picture that each question is about; None: one question a picture.
        """
        grid = layout if row is None else layout.folded(row, cross[0].key.shape[0])
        states = self.med.encode(input_ids.index_fill(0, layout.firsts, self.config.enc_id), grid, cross)  # [T, D]
        return self.med.look(layout.pad(states), layout.mask, decoder=True)

    def answer_losses(
        self, input_ids: Tensor, layout: TextLayout, questions: list[CrossKV], smoothing: float
    ) -> Tensor:
        """[R]: label-smoothed cross-entropy of answers [CLS] ... [SEP], summed over their tokens ([DEC] replaces [CLS])."""
        states = self.lm_states(input_ids, layout, questions)
        followed = layout.followed()
        answer = layout.index[followed] // layout.longest
        logits = self.med.lm_head(states[followed])
        return text_losses(logits, input_ids[followed + 1], answer, layout.rows, smoothing)


@dataclass(frozen=True)
class Candidates:
    """Answers to choose from: ids [C, L], each [CLS] ... [SEP] and then whatever, and lengths [C]."""

    ids: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, texts: list[list[int]], device: torch.device | str) -> Candidates:
        """The candidates of these ids; ValueError where there is none, or one without a word."""
        if not texts or min(map(len, texts)) < 3:
            raise ValueError(f"{len(texts)} answers to choose from, of which the shortest is empty")
        lengths = torch.tensor([len(text) for text in texts])
        ids = torch.zeros(len(texts), int(lengths.max()), dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        return cls(ids.to(device), lengths.to(device))


@dataclass(frozen=True)
class Ranking:
    """The k candidates of each question that came through the first token, likeliest first token first.

    chosen [Q, k]: their numbers; first [Q, k]: probability of their first token; scores [Q, k]: label-smoothed
    log-likelihood of all their tokens.
    """

    chosen: Tensor
    first: Tensor
    scores: Tensor

    @property
    def best(self) -> Tensor:
        """[Q]: the number of the likeliest candidate."""
        return self.chosen.gather(1, self.scores.argmax(1, keepdim=True)).squeeze(1)


@torch.no_grad()
def rank(
    model: VQA, questions: list[CrossKV], candidates: Candidates, top_k: int, at_once: int, smoothing: float
) -> Ranking:
    """Two stages, as released: the `top_k` candidates by their first token, then all tokens of these (a sum, no mean).

    The released code leaves the training's label smoothing on when it ranks. At most `at_once` answers are decoded
    together, but one of each question at least; those of a question fold into one row of queries.
    """
    count, device = questions[0].key.shape[0], questions[0].key.device
    start = TextLayout.from_lengths([1] * count).to(device)
    opening = candidates.ids.new_full((count,), model.config.dec_id)
    logits = at_least_float32(model.med.lm_head(model.med.decode(opening, start, questions)))  # [Q, V]
    probabilities = logits.softmax(1)[:, candidates.ids[:, 1]]  # [Q, C]
    # Stable: of equal first tokens the earlier candidates, whatever else is in the batch.
    first, chosen = (part[:, :top_k] for part in probabilities.sort(dim=1, descending=True, stable=True))
    places = torch.arange(candidates.ids.shape[1], device=device)
    scores = []
    for numbers in chosen.split(max(1, at_once // count), dim=1):
        ids, lengths = candidates.ids[numbers.flatten()], candidates.lengths[numbers.flatten()]
        layout = TextLayout.from_lengths(lengths.tolist()).to(device)
        packed = ids[places < lengths[:, None]]
        scores.append(-model.answer_losses(packed, layout, questions, smoothing).view(numbers.shape))
    return Ranking(chosen, first, torch.cat(scores, dim=1))

"""Rounds of dialogues about pictures with their candidate answers (VisDial v1.0) as batches. Paper section 5.5."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blip.datamodules.batches import RecordBatch, Sample, Words, common
from blip.datamodules.plan import permutation
from blip.datamodules.records import ROUNDS
from blip.datamodules.stream import StreamDataModule
from blip.layout import TextLayout
from blip.text import Tokenizer, clean_caption, clean_question


@dataclass(kw_only=True)
class RoundBatch(RecordBatch):
    """B rounds, each with its picture, and C candidate answers of each, R = B * C.

    caption_ids and caption_layout: the B packed captions `[CLS] ... [SEP]`; input_ids [T] int64, the packed texts `[CLS]` history,
    question, candidate `[SEP]` that `layout` places, those of a round adjacent; text_row [R] int64, the round of a text;
    labels [R] int64, 1 for the human's answer; rounds [B]: the entries, in evaluation all of their options are candidates.
    """

    caption_ids: Tensor
    caption_layout: TextLayout
    input_ids: Tensor
    layout: TextLayout
    text_row: Tensor
    labels: Tensor
    rounds: list[dict[str, Any]]


def collate(samples: Sequence[Sample], words: Words, candidates: int | None = None, seed: int = 0) -> RoundBatch:
    """Samples of one round each -> RoundBatch.

    `candidates` (training): the true answer and so many less one of the others, drawn by (seed, epoch, position), in the
    order of the options; None: all. ValueError where a round has fewer, or the rounds of a batch not equally many.
    """
    rounds = [entry for sample in samples for entry in sample.entries]
    chosen = [_chosen(sample, candidates, seed) for sample in samples]
    if len({len(numbers) for numbers in chosen}) > 1:
        counts = {sample.key: len(numbers) for sample, numbers in zip(samples, chosen, strict=True)}
        raise ValueError(f"the rounds of a batch must have equally many options, not {counts}")
    caption_ids, caption_layout = words.encode([clean_caption(entry["caption"], words.max_words) for entry in rounds])
    texts = [text for entry, n in zip(rounds, chosen, strict=True) for text in _texts(entry, n, words)]
    input_ids, layout = words.pack(texts)
    return RoundBatch(
        **common(samples),
        caption_ids=caption_ids,
        caption_layout=caption_layout,
        input_ids=input_ids,
        layout=layout,
        text_row=torch.arange(len(rounds)).repeat_interleave(len(chosen[0])),
        labels=torch.tensor([int(n == e["answer_index"]) for e, ns in zip(rounds, chosen, strict=True) for n in ns]),
        rounds=rounds,
    )


def _chosen(sample: Sample, candidates: int | None, seed: int) -> list[int]:
    """Numbers of the options that are shown, in their order."""
    (entry,) = sample.entries
    options, true = len(entry["options"]), entry["answer_index"]
    if candidates is None:
        return list(range(options))
    if not 2 <= candidates <= options:
        raise ValueError(
            f"{sample.key}: candidates={candidates} of {options} options; at least 2 and no more than those"
        )
    drawn = permutation(options - 1, seed, sample.epoch, sample.at, "candidates")[: candidates - 1]
    return sorted([true, *(int(n) + (n >= true) for n in drawn)])


def _texts(entry: dict[str, Any], chosen: Sequence[int], words: Words) -> list[list[int]]:
    """Ids of history, question and each candidate; what is over max_tokens is cut from the left, so the oldest goes first."""
    said = [f"{_asked(question, words)} {answer}" for question, answer in entry["history"]]
    before, *answers = _plain(
        words.tokenizer,
        [" ".join([*said, _asked(entry["question"], words)]), *(entry["options"][n] for n in chosen)],
    )
    room = words.max_tokens - 2
    texts = []
    for answer in answers:
        answer = answer[:room]
        texts.append(before[max(0, len(before) + len(answer) - room) :] + answer)
    return [[words.tokenizer.cls_id, *text, words.tokenizer.sep_id] for text in texts]


def _asked(question: str, words: Words) -> str:
    return clean_question(question, words.max_words).rstrip("?").rstrip() + "?"


def _plain(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [ids[1:-1] for ids in tokenizer.encode(texts, sys.maxsize)]


class DialoguesDataModule(StreamDataModule):
    """Rounds of dialogues, each with its picture, in training and in evaluation.

    candidates: answers of a round that training compares; evaluation compares all; all else is `StreamDataModule`'s
    """

    kind = ROUNDS

    def __init__(self, *, candidates: int, **stream: Any) -> None:
        super().__init__(**stream)
        if candidates < 2:
            raise ValueError(f"candidates={candidates}: at least the true answer and another")
        self.candidates = candidates

    def collator(self, training: bool) -> Callable[[Sequence[Sample]], RoundBatch]:
        return partial(collate, words=self.words, candidates=self.candidates if training else None, seed=self.seed)

    def shown(self, spec: Mapping[str, Any]) -> str:
        return "each"

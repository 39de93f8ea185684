"""Questions about pictures (VQA v2, Visual Genome) or clips (MSRVTT-QA, MSVD-QA) as batches. Paper section 5.3."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blip.datamodules.batches import RecordBatch, Sample, Words, common, rows_of
from blip.datamodules.records import QUESTIONS
from blip.datamodules.stream import StreamDataModule
from blip.layout import TextLayout
from blip.text import clean_question


@dataclass(kw_only=True)
class QuestionBatch(RecordBatch):
    """B pictures, Q questions (training: Q = B), A answers.

    input_ids [T] int64, the packed questions `[CLS] ... [SEP]` that `layout` places; text_row [Q] int64, the row of the picture
    a question is about; answer_ids and answer_layout alike, each distinct answer of a question once; answer_row [A] int64,
    which question it answers; weights [A] float32, the question's weight by the share of people who said so. Without any
    answer (a test set) answer_ids has no tokens and answer_layout is None. questions [Q]: the entries of the shards.
    """

    input_ids: Tensor
    layout: TextLayout
    text_row: Tensor
    answer_ids: Tensor
    answer_layout: TextLayout | None
    answer_row: Tensor
    weights: Tensor
    questions: list[dict[str, Any]]


def collate(samples: Sequence[Sample], words: Words, training: bool) -> QuestionBatch:
    """Samples -> QuestionBatch. Answers are not cleaned. ValueError where training meets a question without any."""
    questions = [entry for sample in samples for entry in sample.entries]
    if training and (silent := [sample.key for sample in samples if not all(e["answers"] for e in sample.entries)]):
        raise ValueError(f"{silent[0]}: a question without answers, as in a test set: it cannot be trained on")
    input_ids, layout = words.encode([clean_question(entry["question"], words.max_words) for entry in questions])
    said = [Counter(entry["answers"]) for entry in questions]
    answers = [answer for counts in said for answer in counts]
    answer_ids, answer_layout = words.encode(answers) if answers else (torch.empty(0, dtype=torch.int64), None)
    shares = [
        e["weight"] * n / counts.total() for e, counts in zip(questions, said, strict=True) for n in counts.values()
    ]
    return QuestionBatch(
        **common(samples),
        input_ids=input_ids,
        layout=layout,
        text_row=rows_of(samples),
        answer_ids=answer_ids,
        answer_layout=answer_layout,
        answer_row=torch.tensor([q for q, counts in enumerate(said) for _ in counts], dtype=torch.int64),
        weights=torch.tensor(shares, dtype=torch.float32),
        questions=questions,
    )


class QuestionsDataModule(StreamDataModule):
    """Questions about one picture; of a set with `frames`, about one clip. In evaluation all of a picture come with it."""

    kind = QUESTIONS

    def collator(self, training: bool) -> Callable[[Sequence[Sample]], QuestionBatch]:
        return partial(collate, words=self.words, training=training)

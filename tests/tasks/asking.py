"""Batches of questions and of dialogues without shards, and tasks without a trainer, float64; for tests."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import tokenizers
import torch

from blip.layout import TextLayout
from blip.text import Tokenizer
from tests.tasks.steps import MED, VIT, WORDS


def words_json() -> str:
    words = {word: i for i, word in enumerate(WORDS)}
    wordpiece = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    wordpiece.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return json.dumps(json.loads(wordpiece.to_str()))


TOKENIZER = Tokenizer.from_json(words_json())


def nodes(vit: dict[str, Any] | None = None, **med: Any) -> dict[str, Any]:
    """Config nodes of a model whose paths all matter."""
    text = {**MED, "dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.3, **med}
    return {"vit": VIT | (vit or {}), "med": text, "embed_width": 8, "temperature": 0.2}


def started(
    kind: Any, model: dict[str, Any] | None = None, evaluators: dict[str, Any] | None = None, **rest: Any
) -> Any:
    """A task of this kind that logs nowhere."""
    torch.manual_seed(0)
    task = kind(
        **{"model": model or nodes(), "tokenizer": words_json(), "optimizer": None, "schedule": None, **rest},
        evaluators=evaluators or {},
    )
    task.log = lambda *_, **__: None
    return task.double().train()


def pictures(count: int, seed: int = 0, frames: int | None = None) -> torch.Tensor:
    """Normalised pictures [B, 3, 16, 16], or clips [B, F, 3, 16, 16]."""
    shape = (count, 3, 16, 16) if frames is None else (count, frames, 3, 16, 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def packed(texts: list[str]) -> tuple[torch.Tensor, TextLayout]:
    ids = TOKENIZER.encode(texts, 100)
    return torch.tensor([i for text in ids for i in text]), TextLayout.from_lengths([len(text) for text in ids])


def question_batch(image: torch.Tensor, asked: list[list[tuple[str, list[str]]]]) -> Any:
    """For each picture its questions with their answers, each answer once and weighing as much as it was said."""
    pairs = [pair for questions in asked for pair in questions]
    entries = [{"id": i, "question": question, "answers": said} for i, (question, said) in enumerate(pairs)]
    answers = [(row, answer) for row, entry in enumerate(entries) for answer in dict.fromkeys(entry["answers"])]
    input_ids, layout = packed([entry["question"] for entry in entries])
    answer_ids, answer_layout = packed([answer for _, answer in answers]) if answers else (torch.tensor([]), None)
    shares = [entries[row]["answers"].count(answer) / len(entries[row]["answers"]) for row, answer in answers]
    return SimpleNamespace(
        image=image,
        keys=[f"k{i}" for i in range(len(asked))],
        input_ids=input_ids,
        layout=layout,
        text_row=torch.tensor([row for row, questions in enumerate(asked) for _ in questions]),
        answer_ids=answer_ids,
        answer_layout=answer_layout,
        answer_row=torch.tensor([row for row, _ in answers]),
        weights=torch.tensor(shares),
        questions=entries,
    )


def round_batch(image: torch.Tensor, image_ids: list[int], rounds: list[dict[str, Any]]) -> Any:
    """Rounds {caption, history, question, options, answer_index} of dialogues, all of their candidates."""
    texts = [f"{entry['history']} {entry['question']} {option}" for entry in rounds for option in entry["options"]]
    input_ids, layout = packed(texts)
    caption_ids, caption_layout = packed([entry["caption"] for entry in rounds])
    each = len(rounds[0]["options"])
    return SimpleNamespace(
        image=image,
        image_ids=torch.tensor(image_ids),
        keys=[f"k{i}" for i in image_ids],
        caption_ids=caption_ids,
        caption_layout=caption_layout,
        input_ids=input_ids,
        layout=layout,
        text_row=torch.arange(len(rounds)).repeat_interleave(each),
        labels=torch.tensor([int(n == entry["answer_index"]) for entry in rounds for n in range(each)]),
        rounds=rounds,
    )

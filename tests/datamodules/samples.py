"""Samples and words for the tests of batches, without shards."""

from __future__ import annotations

from typing import Any

import numpy as np

from blip.datamodules.batches import Sample, Words
from blip.layout import TextLayout
from blip.text import BERT_TOKENS, Tokenizer, train_wordpiece

TEXT = "a b c d e f g is are the there red blue green left right leftmost two cubes more than one what colour how many yes no in picture ?"


def words(max_tokens: int = 35, max_words: int = 50, vocab_size: int | None = None) -> Words:
    """A vocabulary in which each word of TEXT is a piece."""
    tokenizer = Tokenizer(train_wordpiece([TEXT] * 50, 500))
    return Words(tokenizer, max_words, max_tokens, vocab_size or len(tokenizer))


def sample(number: int, entries: list[Any], shape: tuple[int, ...] = (8, 8, 3), at: int | None = None) -> Sample:
    """Sample `number`, every byte of its picture n that number + 50 n."""
    image = np.full(shape, number, np.uint8)
    for n in range(shape[0] if len(shape) == 4 else 0):
        image[n] = number + 50 * n
    return Sample(image, entries, entries, f"key{number}", number, 0, 0, 4, number if at is None else at)


def spoken(words: Words, ids, layout: TextLayout) -> list[str]:
    """What packed texts say, each checked to be `[CLS] ... [SEP]`."""
    grid = layout.pad(ids)
    said = []
    for row, mask in zip(grid, layout.mask, strict=True):
        text = row[mask].tolist()
        assert (text[0], text[-1]) == (words.tokenizer.cls_id, words.tokenizer.sep_id)
        said.append(words.tokenizer.decode(text))
    assert set(BERT_TOKENS) <= set(words.tokenizer.pieces())
    return said

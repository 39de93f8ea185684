"""A batch of statements: two pictures, and left and right that may change their places together."""

from __future__ import annotations

import pytest
import torch

from blip.datamodules.statements import collate, swap_sides
from tests.datamodules.samples import sample, spoken, words

SENTENCE = "The left picture is red."


def samples(count: int, epoch: int = 0) -> list:
    entry = {"id": "a", "sentence": SENTENCE, "label": True}
    return [sample(n, [entry | {"label": n % 2 == 0}], (2, 8, 8, 3))._replace(epoch=epoch) for n in range(count)]


def test_pictures_statement_and_label_belong_together():
    known = words()
    batch = collate(samples(3), known, training=True)
    assert batch.image.shape == (3, 2, 3, 8, 8)
    assert batch.image[:, :, 0, 0, 0].tolist() == [[0, 50], [1, 51], [2, 52]]
    assert spoken(known, batch.input_ids, batch.layout) == ["the left picture is red"] * 3
    assert (batch.labels.tolist(), batch.labels.dtype) == ([1, 0, 1], torch.int64)
    assert batch.text_row.tolist() == [0, 1, 2]


def test_left_and_right_change_with_the_pictures_or_not_at_all():
    known = words()
    batch = collate(samples(40), known, training=True, swap_seed=5)
    assert batch.image.is_contiguous()
    turned = (batch.image[:, 0, 0, 0, 0] >= 50).tolist()
    said = spoken(known, batch.input_ids, batch.layout)
    assert [text == "the right picture is red" for text in said] == turned
    assert 10 < sum(turned) < 30
    assert batch.labels.tolist() == [1, 0] * 20, "what is true stays true"


def test_what_is_swapped_is_a_function_of_seed_epoch_and_position():
    def turned(batch) -> list:
        return (batch.image[:, 0, 0, 0, 0] >= 50).tolist()

    whole = turned(collate(samples(40), words(), training=True, swap_seed=5))
    alone = [turned(collate([one], words(), training=True, swap_seed=5))[0] for one in samples(40)]
    assert whole == alone
    assert whole != turned(collate(samples(40, epoch=1), words(), training=True, swap_seed=5))
    assert whole != turned(collate(samples(40), words(), training=True, swap_seed=6))


def test_evaluation_never_swaps_and_an_unknown_label_is_told_apart():
    shown = [s._replace(entries=[s.entries[0] | {"label": None}]) for s in samples(20)]
    batch = collate(shown, words(), training=False, swap_seed=5)
    assert batch.image[:, 0, 0, 0, 0].tolist() == list(range(20))
    assert batch.labels.tolist() == [-1] * 20
    with pytest.raises(ValueError, match="key0: a statement without label"):
        collate(shown, words(), training=True)


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("the left one is right of the other", "the right one is left of the other"),
        ("the leftmost cube, a right-hand glove", "the rightmost cube, a left-hand glove"),
        ("a bright upright piano is lefty", "a bright upright piano is lefty"),
    ],
)
def test_only_the_words_for_sides_change(text, swapped):
    assert swap_sides(text) == swapped
    assert swap_sides(swapped) == text

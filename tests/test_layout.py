"""Where tokens sit when unequally many texts fold into the rows of what they look at."""

from __future__ import annotations

import torch

from blip.layout import TextLayout


def test_texts_stand_in_their_rows_side_by_side_in_their_order():
    layout = TextLayout.from_lengths([2, 1, 3])
    folded = layout.folded(torch.tensor([0, 2, 2]), 3)
    grid = folded.pad(torch.arange(1, 7)).view(3, 2, 3)  # three rows of two texts
    assert grid.tolist() == [
        [[1, 2, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 0, 0]],
        [[3, 0, 0], [4, 5, 6]],
    ]
    assert torch.equal(folded.pack(folded.pad(torch.arange(1, 7))), torch.arange(1, 7))
    assert torch.equal(folded.firsts, layout.firsts)


def test_a_place_without_a_text_has_something_to_look_at():
    folded = TextLayout.from_lengths([2]).folded(torch.tensor([1]), 3)
    assert folded.mask.any(1).all()
    assert folded.mask.tolist() == [[True, False], [True, True], [True, False]]


def test_positions_in_a_text_are_those_before_folding():
    layout = TextLayout.from_lengths([2, 4, 3])
    folded = layout.folded(torch.tensor([0, 0, 1]), 2)
    assert torch.equal(folded.index % folded.longest, layout.index % layout.longest)

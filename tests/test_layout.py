"""Where tokens sit when unequally many texts fold into the rows of queries of what they look at."""

from __future__ import annotations

import torch

from blip.layout import TextLayout


def test_texts_that_look_at_one_thing_are_one_row_of_queries_in_their_order():
    layout = TextLayout.from_lengths([2, 1, 3])
    folded = layout.folded(torch.tensor([0, 2, 2]), 3)
    assert folded.queries is not None
    tokens = torch.arange(1, 7)
    assert folded.queries.pad(tokens).tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [3, 4, 5, 6]]
    assert torch.equal(folded.queries.pack(folded.queries.pad(tokens)), tokens)


def test_among_themselves_texts_stand_as_before_folding():
    layout = TextLayout.from_lengths([2, 4, 3])
    folded = layout.folded(torch.tensor([0, 0, 1]), 2)
    for name in ("index", "mask", "firsts"):
        assert torch.equal(getattr(folded, name), getattr(layout, name))


def test_a_folded_layout_moves_as_a_whole():
    moved = TextLayout.from_lengths([2, 1]).folded(torch.tensor([0, 0]), 1).to("meta")
    assert moved.queries is not None
    assert {moved.index.device.type, moved.queries.index.device.type, moved.queries.mask.device.type} == {"meta"}

"""NLVR2's network: two looks a block, averaged or merged, and statements that fold beside each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blip.layout import TextLayout
from blip.modules.med import CrossAttention
from blip.modules.nlvr import NLVR, Average, TwinCrossAttention, merges_from
from tests.modules.small import pictures, small_config, texts


def network(merge_from: int = 1) -> NLVR:
    torch.manual_seed(0)
    return NLVR(small_config(), merge_from).double().eval()


def twos(count: int) -> torch.Tensor:
    return pictures(2 * count).unflatten(0, (count, 2))


def test_a_twin_whose_halves_are_one_cross_attention_is_it_where_both_pictures_are_one() -> None:
    torch.manual_seed(0)
    config = small_config().med
    single, twin = CrossAttention(config).double(), TwinCrossAttention(config, Average()).double()
    for half in twin.halves:
        half.load_state_dict({n: t for n, t in single.state_dict().items() if not n.startswith("norm.")})
    ids, layout = texts(4, 6)
    x = torch.randn(len(ids), config.width, dtype=torch.float64)
    states = torch.randn(2, 5, config.look_width, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    both = twin(x, layout, twin.look(torch.cat([states, states], 1), torch.cat([mask, mask], 1)))
    torch.testing.assert_close(both, single(x, layout, single.look(states, mask)), rtol=1e-12, atol=1e-12)


def test_each_picture_is_looked_at_by_its_own_half() -> None:
    model = network()
    ids, layout = texts(5)
    image = twos(1)
    with torch.no_grad():
        before = model.nlvr_logits(image, ids, layout)
        assert not torch.allclose(model.nlvr_logits(image.flip(1), ids, layout), before)
        for block in model.med.blocks():
            block.cross_attention.halves[1].out.weight.zero_()
        left = model.nlvr_logits(image, ids, layout)
        other = torch.stack([image[:, 0], twos(3)[2, :1]], dim=1)
        torch.testing.assert_close(model.nlvr_logits(other, ids, layout), left, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("merge_from", [0, 1, 2, 6])
def test_blocks_merge_from_the_one_named_on(merge_from: int) -> None:
    model = network(merge_from)
    kinds = [type(block.cross_attention.merge) for block in model.med.blocks()]
    assert kinds == [Average if number < merge_from else nn.Linear for number in range(2)]
    assert merges_from(model.state_dict()) == min(merge_from, 2)


def test_any_number_of_statements_of_two_pictures_gets_what_each_gets_alone() -> None:
    model, image = network(), twos(3)
    ids, layout = texts(5, 7, 4, 6)
    row = torch.tensor([0, 0, 0, 2])
    with torch.no_grad():
        together = model.nlvr_logits(image, ids, layout, row)
        for text, part in enumerate(ids.split(layout.mask.sum(1).tolist())):
            alone = model.nlvr_logits(image[row[text], None], part, TextLayout.from_lengths([len(part)]))
            torch.testing.assert_close(together[text], alone[0], rtol=1e-10, atol=1e-10)


def test_every_parameter_takes_part() -> None:
    model = network()
    ids, layout = texts(5, 4)
    model.nlvr_logits(twos(2), ids, layout).square().sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]

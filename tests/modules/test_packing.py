"""Matrices that are laid out for few rows give the same products, and follow their layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from blip.modules import packing
from blip.modules.decoding import Decoding
from blip.modules.generation import generate
from blip.modules.packing import packed
from tests.modules.small import pictures, small_model
from tests.modules.test_decoding import PLAIN

pytestmark = pytest.mark.skipif(not packing.AVAILABLE, reason="this torch has no oneDNN")


def product(linear: nn.Linear, x: Tensor, lay_out: bool) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        if not lay_out:
            return linear(x)
        with packed([linear]):
            return linear(x)


@pytest.mark.parametrize("rows", [1, 8, 24, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_layer(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 40, bias=bias), torch.randn(rows, 48)
    torch.testing.assert_close(product(linear, x, True), product(linear, x, False), rtol=1e-2, atol=1e-2)


def test_a_layer_that_is_not_trained_is_laid_out_once_until_it_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 40).requires_grad_(False), torch.randn(8, 48)
    before = product(linear, x, True)
    monkeypatch.setattr(packing, "ROWS", None)  # laying out would fail now
    assert torch.equal(product(linear, x, True), before)
    monkeypatch.undo()
    linear.load_state_dict(nn.Linear(48, 40).state_dict())
    torch.testing.assert_close(product(linear, x, True), product(linear, x, False), rtol=1e-2, atol=1e-2)
    assert not torch.allclose(product(linear, x, True), before, atol=0.05)


@pytest.mark.parametrize("fused", [True, False])  # fused steps leave a tensor's version as it was
def test_a_layer_that_is_trained_multiplies_by_what_it_has_learnt(fused: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 40), torch.randn(8, 48)
    before = product(linear, x, True)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1, fused=fused)
    linear(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(product(linear, x, True), product(linear, x, False), rtol=1e-2, atol=1e-2)
    assert not torch.allclose(product(linear, x, True), before, atol=0.05)


def test_layers_are_as_they_were_afterwards() -> None:
    linear, x = nn.Linear(8, 8), torch.randn(3, 8, requires_grad=True)
    product(linear, x, True)
    assert "forward" not in vars(linear)
    assert linear(x).dtype == torch.float32
    assert linear(x).requires_grad


def test_texts_in_bf16_are_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model, how = small_model(encoder=False).bfloat16(), Decoding(**PLAIN | {"strategy": "beam", "beams": 3})
    with torch.no_grad():
        cross = model.med.look(model.visual_encoder(pictures(4).bfloat16()), decoder=True)
    with_it = generate(model.med, cross, [58], how, 3, 0)
    monkeypatch.setattr(packing, "AVAILABLE", False)
    without = generate(model.med, cross, [58], how, 3, 0)
    torch.testing.assert_close(with_it.score, without.score, rtol=0.02, atol=0.02)

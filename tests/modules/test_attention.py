"""The function that attends: what it computes in parts is what it computes at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blip.modules import attention
from blip.modules.attention import attend


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [None, (5, 1, 1, 9), (1, 9)])
def test_pictures_attended_to_in_parts_give_what_all_at_once_give(
    causal: bool, masked: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
):
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(5, 2, n, 8, generator=draw).bfloat16() for n in (7, 9, 9))
    mask = None if masked is None else torch.rand(masked, generator=draw) < 0.7
    if mask is not None:
        mask[..., 0] = True
    whole = attend(query, key, value, mask, causal)
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 2 * 2 * 7 * 9)
    sizes: list[int] = []

    def counted(*inputs: Any) -> Tensor:
        sizes.append(len(inputs[0]))
        return attend(*inputs)

    monkeypatch.setattr(attention, "attend", counted)
    with torch.no_grad():
        assert torch.equal(attend(query, key, value, mask, causal), whole)
    assert sizes == [2, 2, 1]

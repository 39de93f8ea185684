"""Blocks that are computed a second time in the backward pass change memory and time, never a number."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from tests.tasks.steps import Stepper, batch, pairs, stepper


def made(blocks: int, side: str = "both") -> Stepper:
    """Two blocks a side, with dropout and drop path, the last `blocks` of a side recomputed."""
    chosen = {"checkpoint_blocks": blocks}
    vit = {"drop_path": 0.3} | (chosen if side in ("both", "vit") else {})
    med = chosen if side in ("both", "med") else {}
    return stepper(dropout=0.2, vit=vit, med=med, momentum_dropout=True)


def losses_and_gradients(task: Stepper) -> dict[str, Tensor]:
    torch.manual_seed(1)
    loss = task.training_step(batch(pairs(4, seed=3)), 0)
    loss.backward()
    return {"loss": loss, **task.logged, **{n: p.grad for n, p in task.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("side", ["vit", "med", "both"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_recomputing_leaves_losses_and_gradients_bit_for_bit(side: str, blocks: int) -> None:
    plain, recomputed = losses_and_gradients(made(0)), losses_and_gradients(made(blocks, side))
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        assert torch.equal(value, recomputed[name]), name


def test_dropout_is_on_in_that_comparison() -> None:
    task = made(0)
    first, second = (task.training_step(batch(pairs(4, seed=3)), 0) for _ in range(2))
    assert first != second


def calls(task: Stepper, backward: bool) -> dict[str, int]:
    """How often each feed-forward of both sides ran in one step."""
    seen: Counter[str] = Counter()
    sides: dict[str, nn.ModuleList] = {"vit": task.model.visual_encoder.blocks, "text": task.model.med.decoder}
    for side, blocks in sides.items():
        for i, block in enumerate(blocks):
            layer = block.mlp if side == "vit" else block.self_attention
            layer.register_forward_hook(lambda *_, name=f"{side}{i}": seen.update([name]))
    loss = task.training_step(batch(pairs(4, seed=3)), 0)
    if backward:
        loss.backward()
    return dict(seen)


def test_only_the_last_blocks_are_recomputed_and_only_in_training() -> None:
    assert calls(made(1), backward=True) == {"vit0": 1, "vit1": 2, "text0": 1, "text1": 2}
    with torch.no_grad():
        assert calls(made(1), backward=False) == {"vit0": 1, "vit1": 1, "text0": 1, "text1": 1}
    assert calls(made(1).eval(), backward=True) == {"vit0": 1, "vit1": 1, "text0": 1, "text1": 1}

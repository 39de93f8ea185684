"""The closed form of a step's FLOPs against what really runs, by torch's counter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from blip.modules.blip import BLIPConfig
from blip.modules.flops import counter, pretraining_flops
from blip.modules.med import MEDConfig
from blip.modules.vit import ViTConfig
from tests.tasks.steps import Pairs, Stepper, batch, pairs, stepper

BASE = BLIPConfig(
    vit=ViTConfig(224, 16, 768, 12, 12, 0.0),
    med=MEDConfig(30524, 768, 12, 12, 3072, 512, 768, "all_but_sa", 0.1, 0.1),
    embed_width=256,
    temperature=0.07,
    dec_id=30522,
    enc_id=30523,
)


def counted(task: Stepper, some: Pairs, dtype: torch.dtype = torch.bfloat16) -> int:
    """FLOPs of a real forward and backward pass; in bf16 attention is written out, so that each product is seen."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), counter() as flops:
        task.training_step(some, 0).backward()
    return flops.get_total_flops()


def some_pairs(count: int) -> Pairs:
    made = batch(pairs(count, seed=0))
    made.image = made.image.float()
    return made


@pytest.mark.parametrize("share", ["all", "all_but_sa", "all_but_ca", "none"])
@pytest.mark.parametrize("itm_start", [0.0, 0.5])
def test_closed_form_is_what_runs(share: str, itm_start: float) -> None:
    task = stepper(med={"share": share}, itm_start=itm_start).float()
    some = some_pairs(5)
    assert counted(task, some) == task.flops_per_pair(some) * 5


@pytest.mark.parametrize(("stem", "queue_start"), [("patch", 0.5), ("conv", 0.0)])
def test_closed_form_knows_the_stem_and_the_queue(stem: str, queue_start: float) -> None:
    task = stepper(vit={"stem": stem}, queue_start=queue_start).float()
    some = some_pairs(3)
    assert counted(task, some) == task.flops_per_pair(some) * 3


def test_recomputed_blocks_are_not_counted_as_work() -> None:
    task, other = stepper().float(), stepper(med={"checkpoint_blocks": 1}).float()
    some = some_pairs(3)
    assert counted(other, some) > counted(task, some)
    assert other.flops_per_pair(some) == task.flops_per_pair(some)


def test_negatives_of_other_ranks_cost_their_own_projection_and_the_common_width() -> None:
    alone = pretraining_flops(BASE, batch=2, tokens=20, longest=12, keys=2)
    gathered = pretraining_flops(BASE, batch=2, tokens=20, longest=12, keys=4, gathered_width=30)
    look = alone["keys and values"].forward
    assert gathered["ITM negative pictures"].forward - alone["ITM negative pictures"].forward == look
    assert gathered["ITM negative texts"].forward > 30 / 12 * alone["ITM negative texts"].forward
    assert gathered["LM"] == alone["LM"]


def test_padded_as_released_the_parts_are_those_of_the_paper_table() -> None:
    """PAPER.md section 10.1, base at 224 px, 30 tokens, GFLOP."""
    parts = pretraining_flops(BASE, batch=1, tokens=30, longest=30, keys=57601)
    forward = {name: part.forward / 1e9 for name, part in parts.items()}
    assert forward["image encoder"] == pytest.approx(35.126, abs=5e-4)
    assert forward["text encoder"] == pytest.approx(5.129, abs=5e-4)
    assert forward["keys and values"] == pytest.approx(5.577, abs=5e-4)
    assert forward["LM"] + forward["keys and values"] == pytest.approx(11.774, abs=5e-4)
    # The last of 30 tokens has nothing to predict.
    assert forward["LM head"] * 30 / 29 == pytest.approx(1.442, abs=5e-4)
    assert forward["momentum image encoder"] == forward["image encoder"]
    large = replace(BASE, vit=ViTConfig(384, 16, 1024, 24, 16, 0.1))
    image = pretraining_flops(large, batch=1, tokens=35, longest=35, keys=1)["image encoder"]
    assert image.forward / 1e9 == pytest.approx(382.131, abs=5e-4)


def base_step(**changes: Any) -> tuple[Stepper, Pairs]:
    """The base model's step and a batch of 6, as shapes without numbers; inside `FakeTensorMode`."""
    lengths = [9, 12, 12, 14, 15, 22]
    task = stepper(BASE, queue_size=57600, **changes).float()
    made = batch([(torch.zeros(3, 224, 224), [2, *[7] * (n - 2), 3], i) for i, n in enumerate(lengths)])
    return task, made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_base_model_counts_within_one_percent(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        task, some = base_step()
        closed = task.flops_per_pair(some) * 6
        assert counted(task, some, dtype) == pytest.approx(closed, rel=0.01)

"""The closed form of a step's FLOPs against what really runs, by torch's counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.pretrain_step import counted as counted_without_numbers
from benchmarks.pretrain_step import hollow_task, released_step, some_pairs
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


def counted(task: Stepper, some: Pairs) -> int:
    """FLOPs of a real forward and backward pass; in bf16 attention is written out, so that each product is seen."""
    with torch.autocast("cpu", torch.bfloat16), counter() as flops:
        task.training_step(some, 0).backward()
    return flops.get_total_flops()


def tiny_pairs(count: int) -> Pairs:
    made = batch(pairs(count, seed=0))
    made.image = made.image.float()
    return made


@pytest.mark.parametrize("share", ["all", "all_but_sa", "all_but_ca", "none"])
@pytest.mark.parametrize("itm_start", [0.0, 0.5])
def test_closed_form_is_what_runs(share: str, itm_start: float) -> None:
    task = stepper(med={"share": share}, itm_start=itm_start).float()
    some = tiny_pairs(5)
    assert counted(task, some) == task.flops_per_pair(some) * 5


@pytest.mark.parametrize(("stem", "queue_start"), [("patch", 0.5), ("conv", 0.0)])
def test_closed_form_knows_the_stem_and_the_queue(stem: str, queue_start: float) -> None:
    task = stepper(vit={"stem": stem}, queue_start=queue_start).float()
    some = tiny_pairs(3)
    assert counted(task, some) == task.flops_per_pair(some) * 3


def test_recomputed_blocks_are_not_counted_as_work() -> None:
    task, other = stepper().float(), stepper(med={"checkpoint_blocks": 1}).float()
    some = tiny_pairs(3)
    assert counted(other, some) > counted(task, some)
    assert other.flops_per_pair(some) == task.flops_per_pair(some)


def test_negatives_of_other_ranks_cost_their_own_projection_and_the_common_width() -> None:
    alone = pretraining_flops(BASE, batch=2, tokens=20, longest=12, keys=2)
    gathered = pretraining_flops(BASE, batch=2, tokens=20, longest=12, keys=4, gathered_width=30)
    look = alone["keys and values"].forward
    assert gathered["ITM negative pictures"].forward - alone["ITM negative pictures"].forward == look
    assert gathered["ITM negative texts"].forward > 30 / 12 * alone["ITM negative texts"].forward
    assert gathered["LM"] == alone["LM"]


def test_padded_as_released_the_parts_cost_what_the_released_shapes_do() -> None:
    """GFLOP that torch counts for modules of the released shapes: base at 224 px with 30 tokens, large at 384 px."""
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


def test_fused_attention_on_a_cpu_is_counted_with_its_recomputed_scores() -> None:
    query, key = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 3, 7, 8, requires_grad=True)
    with counter() as flops:
        torch.nn.functional.scaled_dot_product_attention(query, key, key).sum().backward()
    product = 2 * 2 * 3 * 5 * 7 * 8
    assert flops.get_total_flops() == 2 * product + 5 * product


def test_base_step_at_batch_75_counts_as_the_closed_form_and_stays_below_215_gflop_a_pair() -> None:
    task = hollow_task()
    assert task.model.config == BASE
    some = some_pairs(75, 224, BASE.med.vocab_size, seed=1)
    per_pair = counted_without_numbers(task, some, released=False) / 75
    assert per_pair == pytest.approx(task.flops_per_pair(some), rel=0.01)
    assert per_pair < 215e9


def test_released_way_gives_the_same_losses_and_gradients() -> None:
    """The benchmark's peer computes the same step: else the ratio would say nothing."""
    task = stepper(med={"positions": 32}, keys="local", negatives="local").float()
    some = tiny_pairs(4)
    results = []
    for step in (task.training_step, lambda batch, _: released_step(task, batch)):
        task.zero_grad()
        task.pending = []
        task.momentum.copy_from(task.model)
        loss = step(some, 0)
        loss.backward()
        results.append([loss, *(p.grad for p in task.parameters() if p.grad is not None)])
    for ours, released in zip(*results, strict=True):
        torch.testing.assert_close(ours, released, rtol=1e-4, atol=1e-6)

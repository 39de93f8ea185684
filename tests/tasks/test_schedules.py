"""The schedules against the values of the released code, and their by-step forms against what they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blip.tasks.schedules import cosine, cosine_by_epoch, paper, released

GOLDEN = json.loads((Path(__file__).parents[1] / "golden_cases" / "schedules.json").read_text())
PRETRAIN = GOLDEN["pretrain"]
PEAK = PRETRAIN["config"]["init_lr"]
RELEASED = {
    "warmup_steps": PRETRAIN["config"]["warmup_steps"],
    "start": PRETRAIN["config"]["warmup_lr"] / PEAK,
    "decay": PRETRAIN["config"]["lr_decay_rate"],
    "floor": PRETRAIN["config"]["min_lr"] / PEAK,
}


@pytest.mark.parametrize(("epoch", "rate"), PRETRAIN["step_lr_schedule"][1:])
def test_released_decays_by_epoch(epoch: int, rate: float) -> None:
    for step in (7 * epoch, 7 * epoch + 6):
        assert PEAK * released(step, 7 * 200, 7, **RELEASED) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(("step", "rate"), PRETRAIN["warmup_lr_schedule"])
def test_released_warms_up_in_epoch_0(step: int, rate: float) -> None:
    assert PEAK * released(step, 10**6, 20_000, **RELEASED) == pytest.approx(rate, rel=1e-12)


def test_released_never_meets_its_peak_where_an_epoch_is_shorter_than_the_warm_up() -> None:
    factors = [released(step, 2314 * 20, 2314, **RELEASED) for step in (2313, 2314)]
    assert factors[0] == pytest.approx(2.3e-4 / PEAK, rel=0.01)
    assert factors[1] == pytest.approx(0.9)


@pytest.mark.parametrize("total", [10, 100, 100_000])
def test_by_step_forms_meet_the_peak_once_and_end_low_for_any_length(total: int) -> None:
    options = {"warmup_share": 0.1, "start": 0.0, "floor": 0.0}
    for curve in (
        [cosine(step, total, 3, **options) for step in range(total + 1)],
        [paper(step, total, 3, decay=0.9, epochs=20, **options) for step in range(total + 1)],
    ):
        top = curve.index(max(curve))
        assert curve[0] == 0
        assert curve[top] == 1
        assert top == round(0.1 * total)
        assert all(a >= b for a, b in zip(curve[top:], curve[top + 1 :], strict=False))
    assert curve[-1] == pytest.approx(0.9**20)
    assert cosine(total, total, 3, **options) == 0


@pytest.mark.parametrize("name", GOLDEN["finetune"])
def test_cosine_by_epoch_is_the_released_fine_tuning(name: str) -> None:
    case = GOLDEN["finetune"][name]
    config = case["config"]
    epochs, peak = config["max_epoch"], config["init_lr"]
    for epoch, rate in case["cosine_lr_schedule"]:
        factor = cosine_by_epoch(5 * epoch + 4, 5 * epochs, 5, floor=config["min_lr"] / peak)
        assert peak * factor == pytest.approx(rate, rel=1e-12)

"""Training that fails without an error is noticed."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest

from blip.callbacks.health import PRIOR, Health
from tests.test_main import recorded, run


def watch() -> Health:
    return Health(every_steps=1, warmup_steps=10, temperature_floor=0.001)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    data = {"_target_": "tests.standin.Data", "spoil": True}
    recorded(tmp_path, "callbacks.health.every_steps=4", "callbacks.gallery=null", data=data)
    with pytest.raises(ValueError, match=r"not finite within the last 4 batches \(now at step 4\)"):
        run(tmp_path)


def test_no_checkpoint_is_saved_after_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    data = {"_target_": "tests.standin.Data", "spoil": True}
    recorded(tmp_path, "callbacks.health.every_steps=50", "callbacks.gallery=null", data=data)
    with pytest.raises(ValueError, match="not finite within the last 50 batches"):
        run(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_hung_itc_is_told_once() -> None:
    health = watch()
    with pytest.warns(UserWarning, match="temperature is on its floor"):
        health.look({"itc": math.log(544) - 0.5, "temperature": 0.001}, step=100, keys=544)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        health.look({"itc": math.log(544) - 0.5, "temperature": 0.001}, step=101, keys=544)


@pytest.mark.parametrize(("itc", "temperature"), [(math.log(544) - 2, 0.001), (math.log(544), 0.07)])
def test_an_itc_that_learns_or_is_free_to_is_not_told(itc: float, temperature: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch().look({"itc": itc, "temperature": temperature}, step=100, keys=544)


def test_an_itm_that_stays_at_its_prior_after_the_warm_up_is_told() -> None:
    health = watch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step, itm in [(5, PRIOR)] * 9 + [(10, PRIOR), (11, PRIOR), (12, 0.5), (13, PRIOR), (14, PRIOR)]:
            health.look({"itm": itm}, step, keys=8)
    with pytest.warns(UserWarning, match=r"ITM stays at 0\.637"):
        health.look({"itm": PRIOR + 0.005}, step=15, keys=8)

"""The best validation's weights are kept, by the sum of what is monitored, also across a restart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blip.callbacks.best import Best


def validated(saved: list[dict[str, float]], **metrics: float) -> Any:
    """A trainer whose validation measured `metrics`; what is saved goes into `saved`."""
    values = {f"val/{name}": value for name, value in metrics.items()}
    return SimpleNamespace(
        state=SimpleNamespace(fn="fit"),
        fast_dev_run=False,
        callback_metrics=values,
        save_checkpoint=lambda path, weights_only: saved.append(values),
    )


def test_the_highest_sum_is_kept_and_a_restart_knows_it(tmp_path: Path) -> None:
    saved: list[dict[str, float]] = []
    best = Best(str(tmp_path), ["val/a", "val/b"])
    for a, b in ((1.0, 2.0), (3.0, 0.0), (0.0, 2.9), (float("nan"), 9.0), (2.0, 2.0)):
        best.on_validation_end(validated(saved, a=a, b=b), None)  # type: ignore[arg-type]
    assert saved == [{"val/a": 1.0, "val/b": 2.0}, {"val/a": 2.0, "val/b": 2.0}]
    again = Best(str(tmp_path), ["val/a", "val/b"])
    again.load_state_dict(best.state_dict())
    again.on_validation_end(validated(saved, a=3.0, b=1.0), None)  # type: ignore[arg-type]
    assert len(saved) == 2


def test_a_metric_that_nobody_measures_is_told_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"val/c is not measured; what is: val/a"):
        Best(str(tmp_path), ["val/c"]).on_validation_end(validated([], a=1.0), None)  # type: ignore[arg-type]

"""metrics.json keeps what was measured before and is valid JSON whatever was measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from blip.callbacks.metrics import Metrics


def test_what_was_measured_before_stays_and_what_is_not_finite_becomes_null(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "metrics.json").write_text('{"val/a/b": 1.0, "test/a/b": 2.0}')
    trainer: Any = SimpleNamespace(
        callback_metrics={"test/a/b": 3.0, "test/a/c": float("nan")}, is_global_zero=True, fast_dev_run=False
    )
    Metrics(str(tmp_path)).on_test_end(trainer, None)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"test/a/b": 3.0, "test/a/c": None, "val/a/b": 1.0}
    assert capsys.readouterr().out.split() == ["test/a/b", "3.00"]


def test_a_published_result_stands_beside_the_measured_one(tmp_path: Path, capsys: Any) -> None:
    trainer: Any = SimpleNamespace(callback_metrics={"test/a/b": 3.0}, is_global_zero=True, fast_dev_run=False)
    expected = {"test/a/b": 4.0, "test/a/c": 5.0, "test/a/d": None}
    Metrics(str(tmp_path), expected).on_test_end(trainer, None)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "comparison.json").read_text()) == {
        "test/a/b": {"measured": 3.0, "expected": 4.0},
        "test/a/c": {"measured": None, "expected": 5.0},
    }
    assert capsys.readouterr().out.split() == ["test/a/b", "3.00", "expected", "4.00"]


def test_only_what_validation_measured_goes_into_the_checkpoint() -> None:
    metrics = Metrics("folder")
    metrics.values = {"train/loss": 1.0, "val/a/b": 2.0, "run/mfu": 0.5}
    assert metrics.state_dict() == {"values": {"val/a/b": 2.0}}

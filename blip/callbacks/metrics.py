"""metrics.json: the last value of everything that a run measured, flat, `stage/task/metric`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from blip.files import write_text


class Metrics(L.Callback):
    """Writes `folder`/metrics.json after training, validation and test, and prints what the test measured.

    What validation measured goes into the checkpoint, so a run that was interrupted ends with the file of one that was not.
    Callbacks with a method `run_metrics` add theirs. A value that is not finite becomes null. `expected`: what a published
    result says of some of them; they are printed and kept (comparison.json) beside what was measured.
    """

    def __init__(self, folder: str, expected: Mapping[str, float | None] | None = None) -> None:
        self.path = Path(folder) / "metrics.json"
        self.expected = {name: value for name, value in (expected or {}).items() if value is not None}
        self.values: dict[str, float] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.take(trainer)
        if trainer.state.fn != "fit":
            self.write(trainer, "val/")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.take(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            self.values.update(getattr(callback, "run_metrics", dict)())
        self.write(trainer, "val/")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.take(trainer)
        self.write(trainer, "test/")

    def take(self, trainer: L.Trainer) -> None:
        self.values.update({name: float(value) for name, value in trainer.callback_metrics.items()})

    def write(self, trainer: L.Trainer, shown: str) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        before = json.loads(self.path.read_text()) if self.path.exists() else {}
        now = {name: value if math.isfinite(value) else None for name, value in self.values.items()}
        values = dict(sorted((before | now).items()))
        write_text(self.path, as_json(values))
        if self.expected:
            beside = {name: {"measured": values.get(name), "expected": value} for name, value in self.expected.items()}
            write_text(self.path.with_name("comparison.json"), as_json(beside))
        width = max(map(len, values), default=0)
        for name, value in values.items():
            if name.startswith(shown) and value is not None:
                told = f"  expected {self.expected[name]:8.2f}" if name in self.expected else ""
                print(f"  {name:{width}}  {value:8.2f}{told}")

    def state_dict(self) -> dict[str, Any]:
        return {"values": {name: value for name, value in self.values.items() if name.startswith("val/")}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values = dict(state_dict["values"])


def as_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"

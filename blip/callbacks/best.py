"""The weights of the validation that went best, which the tests at the end of a run then take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L


class Best(L.Callback):
    """Keeps `folder`/best.ckpt, the weights where the sum of the metrics `monitor` was highest; of equal ones the first.

    ValueError for a metric that validation does not measure. A value that is not finite never wins.
    """

    def __init__(self, folder: str, monitor: Sequence[str]) -> None:
        if not monitor:
            raise ValueError("callbacks.best.monitor is empty: name the metrics of validation to go by")
        self.path, self.monitor = Path(folder) / "best.ckpt", list(monitor)
        self.highest: float | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        known = trainer.callback_metrics
        if unknown := [name for name in self.monitor if name not in known]:
            measured = ", ".join(sorted(name for name in known if name.startswith("val/")))
            raise ValueError(f"callbacks.best.monitor: {', '.join(unknown)} is not measured; what is: {measured}")
        value = sum(float(known[name]) for name in self.monitor)
        if math.isfinite(value) and (self.highest is None or value > self.highest):
            self.highest = value
            trainer.save_checkpoint(self.path, weights_only=True)

    def state_dict(self) -> dict[str, Any]:
        return {"highest": self.highest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.highest = state_dict["highest"]

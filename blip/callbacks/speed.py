"""How fast a run is: pairs a second, the share of time spent waiting for data, and MFU.

Only the host's clock is read. The host may run ahead of the device within a step, not over a window of many, so no step is
made to wait for the device.
"""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int, repeats: int = 5) -> float:
    """FLOP/s of a product of two square matrices of `side`, the best of `repeats`."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def seconds() -> float:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds()
    return 2 * side**3 / min(seconds() for _ in range(repeats))


class Speed(L.Callback):
    """Logs run/pairs_per_s, run/data_wait and run/mfu (fractions) over windows of `every_steps` batches.

    Time spent in validation and in saving is left out, and the wait for the batch after it. MFU needs the task's
    `flops_per_pair(batch)` (forward and backward); it is the share of the device's matrix rate, measured at the start in
    the trainer's precision.
    """

    def __init__(self, every_steps: int) -> None:
        self.every_steps = every_steps
        self.rate = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        device = pl_module.device
        if not self.rate and hasattr(pl_module, "flops_per_pair"):
            precision = str(trainer.precision)
            dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32
            self.rate = matrix_rate(device, dtype, side=1024 if device.type == "cpu" else 8192)
        self.total = Window()
        self.window = Window()
        self.mark = time.perf_counter()
        self.paused = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if not self.paused:
            self.window.wait += now - self.mark
        self.mark, self.paused = now, False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.window.work += now - self.mark
        pairs = batch.image.shape[0]
        self.window.pairs += pairs * trainer.world_size
        if self.rate:
            self.window.flops += pairs * pl_module.flops_per_pair(batch)  # type: ignore[operator]
        self.window.batches += 1
        if self.window.batches == self.every_steps:
            pl_module.log_dict(self.window.numbers(self.rate), batch_size=pairs)
            self.total.add(self.window)
            self.window = Window()
        self.mark = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.paused = True

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.paused = True

    def run_metrics(self) -> dict[str, float]:
        """The three numbers over all of this process's training, {} before any of it."""
        if not hasattr(self, "total"):
            return {}
        self.total.add(self.window)
        self.window = Window()
        return self.total.numbers(self.rate)


class Window:
    """Seconds of waiting and of work, pairs of all ranks, FLOPs of this rank."""

    def __init__(self) -> None:
        self.wait = self.work = self.flops = 0.0
        self.pairs = self.batches = 0

    def add(self, other: Window) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def numbers(self, rate: float) -> dict[str, float]:
        if not self.batches:
            return {}
        seconds = self.wait + self.work
        numbers = {"run/pairs_per_s": self.pairs / seconds, "run/data_wait": self.wait / seconds}
        return numbers | ({"run/mfu": self.flops / seconds / rate} if rate else {})

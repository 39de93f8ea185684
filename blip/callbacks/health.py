"""Watches for the ways in which BLIP's training is known to fail without an error."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

PRIOR = math.log(3) - 2 / 3 * math.log(2)  # ITM that knows only that one of three pairs matches: 0.6365


class Health(L.Callback):
    """Looks every `every_steps` batches, so that no step waits for the device.

    A loss that was not finite since the last look stops the run with ValueError, and before anything is saved. Two things
    are warned about once: the ITC temperature on its floor while ITC is hardly below chance, and ITM at the prior after
    `warmup_steps`.
    """

    def __init__(self, every_steps: int, warmup_steps: int, temperature_floor: float) -> None:
        self.every_steps, self.warmup_steps = every_steps, warmup_steps
        self.temperature_floor = temperature_floor
        self.warned: set[str] = set()
        self.broken: torch.Tensor | None = None
        self.stuck = 0  # looks in a row at which ITM was at the prior

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        broken = ~torch.isfinite(outputs["loss"].detach())
        self.broken = broken if self.broken is None else self.broken | broken
        if (batch_idx + 1) % self.every_steps == 0:
            self.stop_if_broken(trainer)
            seen = {
                k.removeprefix("train/"): float(v) for k, v in trainer.callback_metrics.items() if k[:6] == "train/"
            }
            self.look(seen, trainer.global_step, batch.image.shape[0] * trainer.world_size + queue_size(pl_module))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.stop_if_broken(trainer)

    def stop_if_broken(self, trainer: L.Trainer) -> None:
        if self.broken is not None and self.broken.item():
            raise ValueError(
                f"the loss was not finite within the last {self.every_steps} batches (now at step {trainer.global_step}): "
                f"lower the rate, clip gradients (trainer.gradient_clip_val), or train in float32. "
                f"The last checkpoint is from before"
            )
        self.broken = None

    def look(self, seen: dict[str, float], step: int, keys: int) -> None:
        """Warns about what `seen` (the losses by name) shows; `keys` is the number of keys that ITC compares with."""
        if {"itc", "temperature"} <= seen.keys():
            hung = seen["temperature"] <= self.temperature_floor * 1.01 and seen["itc"] > math.log(keys) - 1
            if hung:
                self.warn(
                    "itc",
                    f"step {step}: the temperature is on its floor ({seen['temperature']:.4g}) while ITC ({seen['itc']:.2f}) is near chance "
                    f"({math.log(keys):.2f}); it rarely recovers. Bring queue and soft targets in later, slow the temperature",
                )
        if "itm" in seen and step >= self.warmup_steps:
            self.stuck = self.stuck + 1 if abs(seen["itm"] - PRIOR) < 0.01 else 0
            if self.stuck >= 3:
                self.warn(
                    "itm",
                    f"step {step}: ITM stays at {PRIOR:.3f}, its value without any knowledge: lower the rate, or cleaner data",
                )

    def warn(self, kind: str, message: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            rank_zero_warn(message)


def queue_size(task: Any) -> int:
    return getattr(getattr(task, "queue", None), "size", 0)

"""A progress line over the whole run: losses, pairs a second, share of waiting for data, MFU and time left."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar


class Progress(ProgressBar):
    """Rewrites one line on a terminal, else prints a line every `seconds`; the speed is what `Speed` logged last."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.live = sys.stderr.isatty()
        self.on = True
        self.shown = -float("inf")
        self.started = time.monotonic()
        self.first = 0

    def disable(self) -> None:
        self.on = False

    def enable(self) -> None:
        self.on = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started, self.first = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        total = trainer.estimated_stepping_batches
        if self.due(final=trainer.global_step == total):
            self.show(self.training_line(trainer, pl_module, total))

    def training_line(self, trainer: L.Trainer, pl_module: L.LightningModule, total: float) -> str:
        step = trainer.global_step
        parts = [f"step {step}" if total == float("inf") else f"step {step}/{int(total)} {100 * step / total:3.0f} %"]
        losses = self.get_metrics(trainer, pl_module)
        parts += [f"{k.removeprefix('train/')} {v:.3g}" for k, v in losses.items() if isinstance(v, int | float)]
        speed = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("run/")}
        for name, text in (("pairs_per_s", "{:.0f} pairs/s"), ("data_wait", "data {:.1%}"), ("mfu", "MFU {:.1%}")):
            if f"run/{name}" in speed:
                parts.append(text.format(speed[f"run/{name}"]))
        done = step - self.first
        if done and total != float("inf"):
            parts.append(f"{clock((time.monotonic() - self.started) / done * (total - step))} left")
        return " | ".join(parts)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.evaluation_line("validating", trainer.num_val_batches, batch_idx, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.evaluation_line("testing", trainer.num_test_batches, batch_idx, dataloader_idx)

    def evaluation_line(self, what: str, sizes: Any, batch_idx: int, dataloader_idx: int) -> None:
        if self.due():
            sizes = sizes if isinstance(sizes, list) else [sizes]
            self.show(f"{what} | set {dataloader_idx + 1}/{len(sizes)} | batch {batch_idx + 1}/{sizes[dataloader_idx]}")

    def due(self, final: bool = False) -> bool:
        wait = 0.2 if self.live else self.seconds
        return self.on and (final or time.monotonic() - self.shown >= wait)

    def show(self, line: str) -> None:
        self.shown = time.monotonic()
        print(f"\r\x1b[2K{line}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.on and self.live:
            print(file=sys.stderr, flush=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end()

    def print(self, *args: Any, **kwargs: Any) -> None:
        self.end()
        print(*args, **kwargs)


def clock(seconds: float) -> str:
    """h:mm:ss, without hours where there are none."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"

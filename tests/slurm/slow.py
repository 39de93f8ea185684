"""What waits at work for the signal, so that a job is caught there, and does not once the job was queued again."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np

from blip import signals
from blip.capfilt import generate

FIRST = "SLURM_RESTART_COUNT" not in os.environ


class Captioner(generate.Captioner):
    """The first job of an array waits when it has written of so many batches."""

    batches = 4

    def write(self, pixels: Sequence[np.ndarray], seeds: Sequence[int]) -> list[list[generate.Written]]:
        while FIRST and os.environ.get("SLURM_ARRAY_TASK_ID") == "0" and not self.batches:
            time.sleep(0.05)  # the signal ends it
        self.batches -= 1
        return super().write(pixels, seeds)


class Wait(L.Callback):
    """Waits after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        while FIRST and trainer.global_step == self.step and not signals.told:
            time.sleep(0.05)

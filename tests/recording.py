"""Callbacks for tests: one writes down which pairs a run trains on, step by step, and can cut it off; others slow or tell a rank."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import lightning as L


class Samples(L.Callback):
    """A line a micro-batch in `folder`/samples-N.jsonl, N counting the starts of the run: step, place in the stream, keys, texts
    and a hash of the pictures as the model gets them. Of rank r > 0 in samples_of_r-N.jsonl.

    stop_after: the optimizer step after which the run is cut off by an InterruptedError, after what that step saves.
    """

    def __init__(self, folder: str, stop_after: int | None = None) -> None:
        self.folder, self.stop_after = Path(folder), stop_after

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        starts = len(written(self.folder, trainer.global_rank))
        self.path = self.folder / f"{name_of(trainer.global_rank)}-{starts}.jsonl"
        self.path.touch()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.stop_after:
            raise InterruptedError("cut off")
        line = {
            "step": trainer.global_step,
            "micro_batch": pl_module.micro_batch,
            "epoch": batch.epoch,
            "position": batch.position,
            "keys": batch.keys,
            "texts": batch.texts,
            "image": hashlib.sha256(batch.image.numpy().tobytes()).hexdigest(),
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def name_of(rank: int) -> str:
    return f"samples_of_{rank}" if rank else "samples"


def written(folder: Path, rank: int) -> list[Path]:
    return list(folder.glob(f"{name_of(rank)}-*.jsonl"))


def samples(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """What the run of a folder was trained on in the end: each start replaces all from the step on that it went on at."""
    kept: list[dict[str, Any]] = []
    for number in range(len(written(folder, rank))):
        lines = (folder / f"{name_of(rank)}-{number}.jsonl").read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be cut by a kill
        if rows:
            again = [row for row in kept if row["step"] >= rows[0]["step"]]
            assert rows[: len(again)] == again[: len(rows)], f"start {number} did not repeat what was lost"
            kept = [row for row in kept if row["step"] < rows[0]["step"]] + rows
    return kept


class Slow(L.Callback):
    """One rank takes so many seconds longer for each step than the others."""

    def __init__(self, rank: int, seconds: float) -> None:
        self.rank, self.seconds = rank, seconds

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == self.rank:
            time.sleep(self.seconds)


class Told(L.Callback):
    """One rank is told by a signal, in the step that follows so many steps, or in the validation then."""

    def __init__(self, number: int, step: int, rank: int = 0, validating: bool = False) -> None:
        self.number, self.step, self.rank, self.validating = number, step, rank, validating

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.tell(trainer, validating=False)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 1:
            self.tell(trainer, validating=True)

    def tell(self, trainer: L.Trainer, validating: bool) -> None:
        if (trainer.global_step, trainer.global_rank, validating) == (self.step, self.rank, self.validating):
            os.kill(os.getpid(), self.number)

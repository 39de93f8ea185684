"""The checkpoint of a run: one file, replaced as a whole, saved where the state is that of a finished optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from blip.files import whole


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it when it is on the disk: its place never holds half a file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """OSError if it can't be written, a full disk included; what stood at `path` before then still stands there."""
        path = Path(path)
        try:
            with whole(path) as partial, open(partial, "wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch's writer reports a failed write as RuntimeError
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            kept = "the checkpoint before it is kept" if path.exists() else "there is none before it"
            raise OSError(
                cause.errno,
                f"checkpoint not saved ({cause.strerror}); {kept}. Make room, then resume the run",
                str(path),
            ) from None


class Checkpoint(L.Callback):
    """Saves `folder`/last.ckpt every `every_steps` optimizer steps and at the end of training.

    Where a validation follows the step, it is saved after it: a run that goes on from the file lacks no validation.
    """

    def __init__(self, folder: str, every_steps: int) -> None:
        if every_steps < 1:
            raise ValueError(f"callbacks.checkpoint.every_steps must be at least 1, not {every_steps}")
        self.path = Path(folder) / "last.ckpt"
        self.every_steps = every_steps
        self.step = 0  # the last optimizer step that was seen
        self.waiting = False  # for the validation to end

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step, self.waiting = trainer.global_step, False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:  # a micro-batch: its gradients are in no file
            return
        self.step = trainer.global_step
        if not (is_last(trainer) or self.step % self.every_steps == 0):
            return
        self.waiting = validation_follows(trainer)
        if not self.waiting:
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.waiting:
            self.waiting = False
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.path, weights_only=False)


def is_last(trainer: L.Trainer) -> bool:
    """Whether the optimizer step that ends now is the last of training."""
    epoch_ends = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
    return trainer.global_step == trainer.max_steps or (epoch_ends and trainer.current_epoch + 1 == trainer.max_epochs)


def validation_follows(trainer: L.Trainer) -> bool:
    """Whether a validation comes after the optimizer step that ends now."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    validated = bool(trainer.datamodule.val_names)  # type: ignore[attr-defined]
    return validated and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)

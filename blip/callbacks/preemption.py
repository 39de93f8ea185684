"""A run that is told to end, or that its time is nearly up, saves what it has made and ends; Slurm starts it again.

Lightning's own handler saves where the signal finds the process. Of several ranks one may then wait for the others to save while
these wait for its gradients. Here a signal is only noted, and all ranks agree at the end of an optimizer step, or between two
batches of a validation, which a run that goes on makes from its beginning.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from blip import signals
from blip.callbacks.checkpoint import is_last, validation_follows

# What ranks exchange is the place in this list; of several signals the later in it counts for all.
HEARD = (0, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preemption(L.Callback):
    """Saves `folder`/last.ckpt when any rank was told to end, and raises `signals.Stop` on all.

    On a GPU the answer to the question before is taken, which is on the host by then: no step waits for the device.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "last.ckpt"
        self.step = 0  # the last optimizer step that was seen
        self.asked: Answer | None = None  # the question before
        self.stop: signals.Stop | None = None  # agreed and saved
        self.pending: int | None = None  # the epoch in which a step ended whose validation is still to be made
        self.kept: dict[str, Any] | None = None  # the checkpoint of that step

    def state_dict(self) -> dict[str, Any]:
        return {"pending": self.pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pending = state_dict["pending"]

    # where signals go

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.former = {number: signal.getsignal(number) for number in signals.SIGNALS}
        signals.listen()
        signals.attended = stage == "fit"
        self.asked = self.stop = None
        # Lightning's agreement on SIGTERM: a broadcast, and a wait for the device, at every micro-batch.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signals.listen()  # Lightning has put its own handler for SIGTERM before ours

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        signals.attended = False
        signals.leave()  # for what was told since the last question
        self.restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, signals.Stop):  # who stops goes on noting what comes
            self.restore()

    def restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.former.items():
                signal.signal(number, handler)

    # where it is asked

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signals.listen()
        self.step = trainer.global_step
        self.stop_if(ask(pl_module.device))  # nothing is new
        if self.pending is not None:
            validate(trainer, self.pending)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:  # a micro-batch: its gradients are in no file
            return
        self.step, last = trainer.global_step, is_last(trainer)
        if validation_follows(trainer) and not last:
            self.pending = trainer.current_epoch
            self.kept = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        else:
            self.pending = self.kept = None
        if not last and (number := self.agreed(pl_module.device)):
            self.stop = signals.Stop(number)
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.stop:  # all that belongs to the step that was saved is done
            raise self.stop

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.stop:
            raise self.stop
        if trainer.state.fn == "fit":
            self.batches = least(trainer.num_val_batches, pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != "fit" or batch_idx >= self.batches[dataloader_idx]:
            return
        if number := self.agreed(pl_module.device):
            self.stop = signals.Stop(number)
            if self.kept:  # else the checkpoint on the disk is of this step, or the step is the last: it is made again
                trainer.strategy.save_checkpoint(self.kept, filepath=self.path)
                trainer.strategy.barrier()
            raise self.stop

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pending = self.kept = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stop_if(ask(pl_module.device))  # the last step is saved; the tests are to come

    def agreed(self, device: torch.device) -> int:
        """The signal for which all ranks stop now; 0 if none. Each rank has to ask at the same place."""
        before, self.asked = self.asked, ask(device)
        answer = self.asked if self.asked.arrived is None else before
        return answer.read() if answer else 0

    def stop_if(self, answer: Answer) -> None:
        if number := answer.read():
            self.stop = signals.Stop(number)
            raise self.stop


# What ranks tell each other ---------------------------------------------------------------------------------------


class Answer:
    """The signal that any rank was told, on its way from the device; 0 if none was."""

    def __init__(self, place: torch.Tensor) -> None:
        self.place, self.arrived = place, None
        if place.is_cuda:
            self.place = torch.empty_like(place, device="cpu", pin_memory=True).copy_(place, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> int:
        if self.arrived is not None:
            self.arrived.synchronize()
        return HEARD[int(self.place)]


def ask(device: torch.device) -> Answer:
    place = torch.tensor(HEARD.index(signals.told[0]) if signals.told else 0)
    if several_ranks():
        place = place.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else place
        dist.all_reduce(place, op=dist.ReduceOp.MAX)
    return Answer(place)


def least(counts: list[int | float], device: torch.device) -> list[int]:
    """Of each count the smallest of all ranks."""
    found = torch.tensor(counts, device=device)
    if several_ranks():
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return [int(count) for count in found]


def several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def validate(trainer: L.Trainer, epoch: int) -> None:
    """The validation that Lightning runs after a step, here before the first; `epoch` is what it had come to then."""
    loop, progress = trainer.fit_loop.epoch_loop.val_loop, trainer.fit_loop.epoch_progress.current
    loop.restarting = False
    now, progress.completed = progress.completed, epoch
    trainer.validating = True
    loop.run()
    trainer.training = True
    progress.completed = now

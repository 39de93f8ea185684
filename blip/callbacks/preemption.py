"""A run that is told to end, or that its time is nearly up, saves what it has made and ends; Slurm starts it again.

Lightning's own handler saves where the signal finds the process. Of several ranks one may then wait for the others to save while
these wait for its gradients. Here a signal is only noted, and all ranks agree at the end of an optimizer step.
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

# What ranks exchange is the place in this list; of several signals the later in it counts for all.
HEARD = (0, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preemption(L.Callback):
    """Saves `folder`/last.ckpt when any rank was told to end, and raises `signals.Stop` on all before the next step begins.

    On a GPU the answer of the step before is taken, which is on the host by then: no step waits for the device.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "last.ckpt"
        self.step = 0  # the last optimizer step that was seen
        self.asked: Answer | None = None  # of the step before
        self.stop: signals.Stop | None = None  # agreed and saved

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.former = {number: signal.getsignal(number) for number in signals.SIGNALS}
        signals.listen()
        signals.attended = stage == "fit"
        if stage == "fit":
            self.asked = self.stop = None
            # Lightning's agreement on SIGTERM: a broadcast, and a wait for the device, at every micro-batch.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        signals.attended = False
        if signals.told:  # since the last step
            signals.leave()
        self.restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, signals.Stop):  # who stops goes on noting what comes
            self.restore()

    def restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.former.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signals.listen()  # Lightning has put its own handler for SIGTERM before ours
        self.step = trainer.global_step
        if number := ask(pl_module.device).read():  # before the first step: nothing to save
            self.stop = signals.Stop(number)
            raise self.stop

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signals.listen()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:  # a micro-batch: its gradients are in no file
            return
        self.step = trainer.global_step
        before, self.asked = self.asked, ask(pl_module.device)
        answer = self.asked if self.asked.arrived is None else before
        if answer is not None and (number := answer.read()):
            self.stop = signals.Stop(number)
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.stop:  # all that belongs to the step that was saved is done
            raise self.stop

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if number := ask(pl_module.device).read():  # the last step is saved; the tests are to come
            self.stop = signals.Stop(number)
            raise self.stop


class Answer:
    """The signal that any rank was told, on its way from the device; 0 if none was."""

    def __init__(self, place: torch.Tensor) -> None:
        self.arrived: torch.cuda.Event | None = None
        if place.is_cuda:
            self.place = torch.empty_like(place, device="cpu", pin_memory=True).copy_(place, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        else:
            self.place = place

    def read(self) -> int:
        if self.arrived is not None:
            self.arrived.synchronize()
        return HEARD[int(self.place)]


def ask(device: torch.device) -> Answer:
    """Asks all ranks; each has to ask at the same step."""
    place = torch.tensor(HEARD.index(signals.told[0]) if signals.told else 0)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        place = place.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else place
        dist.all_reduce(place, op=dist.ReduceOp.MAX)
    return Answer(place)

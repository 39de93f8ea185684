"""The speed of a run is counted over its training alone."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blip.callbacks.speed import Speed, matrix_rate


class Task:
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def flops_per_pair(self, batch: Any) -> float:
        return 3e9

    def log_dict(self, values: dict[str, float], batch_size: int) -> None:
        self.logged.append(values)


def test_pairs_waiting_and_mfu_are_counted_by_the_clock_without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr("blip.callbacks.speed.matrix_rate", lambda *args, **kwargs: 1e12)
    trainer: Any = SimpleNamespace(precision="32-true", world_size=2)
    batch = SimpleNamespace(image=torch.zeros(8, 1))
    task: Any = Task()
    speed = Speed(every_steps=2)
    speed.on_train_start(trainer, task)
    for step in range(6):
        now[0] += 1.0  # waits for data
        speed.on_train_batch_start(trainer, task, batch, step)
        now[0] += 3.0  # works
        speed.on_train_batch_end(trainer, task, None, batch, step)
        if step == 1:
            now[0] += 50.0  # validates
            speed.on_validation_end(trainer, task)
        if step in (1, 3):
            speed.on_save_checkpoint(trainer, task, {})
            now[0] += 20.0  # writes
    assert len(task.logged) == 3
    assert task.logged[0] == pytest.approx({"run/pairs_per_s": 32 / 8, "run/data_wait": 2 / 8, "run/mfu": 0.006})
    for paused in task.logged[1:]:  # the wait behind a pause is not known
        assert paused == pytest.approx({"run/pairs_per_s": 32 / 7, "run/data_wait": 1 / 7, "run/mfu": 0.048 / 7})
    expected = {"run/pairs_per_s": 96 / 22, "run/data_wait": 4 / 22, "run/mfu": 0.144 / 22}
    assert speed.run_metrics() == pytest.approx(expected)


def test_a_process_that_trained_nothing_tells_no_speed() -> None:
    assert Speed(1).run_metrics() == {}


def test_the_matrix_rate_is_measured() -> None:
    assert 1e6 < matrix_rate(torch.device("cpu"), torch.bfloat16, side=64) < 1e16

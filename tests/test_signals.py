"""What a run is told from outside reaches it at any time, and ends it so that Slurm starts it again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blip import signals
from blip.datamodules.stream import _begin_worker

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def nothing_told() -> Iterator[None]:
    yield
    signals.told.clear()


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in, first in PATH, that writes down what it is asked; returns that file."""
    asked = tmp_path / "asked.txt"
    command = tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_PROCID", "LOCAL_RANK", "SUBMITIT_EXECUTOR"):
        monkeypatch.delenv(name, raising=False)
    return asked


def run_of(folder: Path) -> subprocess.Popen:
    """A run as Slurm starts it, with a config that it never comes to read: signals wait from its first instant on."""
    signals.hold()
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "blip.main", str(folder / "config.yaml")],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signals.release()


@pytest.mark.parametrize(("number", "asked"), [(signal.SIGUSR1, "requeue 12\n"), (signal.SIGTERM, None)])
def test_a_signal_that_comes_before_anything_is_imported_ends_the_run_and_queues_its_job_again(
    scontrol: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, asked: str | None
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    run = run_of(tmp_path)
    run.send_signal(number)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert (scontrol.read_text() if scontrol.exists() else None) == asked
    assert ("job 12 is queued again" in errors) == bool(asked)


def test_before_training_a_rank_that_is_not_the_first_leaves_a_warning_to_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signals, "listener", os.getpid())
    monkeypatch.setenv("SLURM_PROCID", "1")
    signals.hear(signal.SIGUSR1, None)
    assert signals.told == [signal.SIGUSR1]


@pytest.mark.parametrize(
    ("environment", "asked", "told"),
    [
        ({"SLURM_JOB_ID": "12"}, "requeue 12\n", "job 12 is queued again"),
        (
            {"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"},
            "requeue 12_3\n",
            "job 12_3 is queued again",
        ),
        ({"SLURM_JOB_ID": "12", "SUBMITIT_EXECUTOR": "slurm"}, None, "submitit queues the job again"),
        ({}, None, None),
    ],
    ids=["job", "array", "submitit", "no Slurm"],
)
def test_the_job_that_runs_it_is_queued_again_and_no_other(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], asked: str | None, told: str | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert signals.requeue() == told
    assert (scontrol.read_text() if scontrol.exists() else None) == asked


def test_a_job_that_can_not_be_queued_again_is_told(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    (scontrol.parent / "bin" / "scontrol").write_text("#!/bin/sh\necho 'slurm_requeue error: Batch only' >&2; exit 1\n")
    assert signals.requeue() == "job 12 is not queued again: slurm_requeue error: Batch only"
    monkeypatch.setenv("PATH", str(scontrol.parent))
    assert signals.requeue() == "job 12 is not queued again: scontrol: No such file or directory"


SUBMITTED = """
import signal, sys
from blip import signals
signal.signal(signal.SIGUSR2, lambda *_: print("queued again", flush=True))
signals.carry_out([sys.executable, "-c", sys.argv[1]], {})
"""
SAVING = """
import os, signal, time
def save(*_):
    print("saved", flush=True)
    os._exit(140)
signal.signal(signal.SIGUSR2, save)
from blip import signals
signals.release()
os.kill(os.getppid(), signal.SIGUSR2)
while True: signal.pause()
"""


def test_what_submitit_does_at_a_warning_waits_until_the_run_has_saved() -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SUBMITTED.replace("{}", f"{{'PYTHONPATH': {str(ROOT)!r}}}"), SAVING],
        env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.split("\n") == ["saved", "queued again", ""], done.stderr
    assert done.returncode == 0


def test_a_job_that_fails_says_so() -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        signals.carry_out([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ))
    assert failed.value.returncode == 3


def test_the_workers_of_a_loader_are_deaf_to_what_the_whole_job_is_told() -> None:
    read, write = os.pipe()
    if (worker := os.fork()) == 0:
        _begin_worker(0)
        for number in signals.SIGNALS:
            os.kill(os.getpid(), number)
        os.write(write, b"at work")
        os._exit(0)
    assert os.waitpid(worker, 0)[1] == 0
    assert os.read(read, 10) == b"at work"

"""What a run is told from outside: to end, or that its time is nearly up. No torch here, for it listens before that is imported.

SIGTERM          end (an operator, scancel, Slurm's own pre-emption, which queues the job again by itself)
SIGUSR1, SIGUSR2 the warning that Slurm sends before a time limit (`sbatch --signal`): end, and queue the job again

While a model is trained, `blip.callbacks.preemption` attends: it looks at `told` where all ranks have made the same step, saves,
and ends the run. At any other time there is nothing to save, and the handler itself ends the run.
Slurm signals every process of a job step: the workers of a loader are told, too, and leave it to the run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = (signal.SIGTERM, *WARNINGS)

told: list[int] = []  # the signals that came, in their order
attended = False  # whether somebody looks at `told`
listener = 0  # the process that listens


class Stop(SystemExit):
    """Ends a run that was told `number`; the exit status is what a shell shows of a process that the signal ended."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def listen() -> None:
    """From now on signals are heard, those included that came since `hold`. In the main thread; elsewhere it does nothing."""
    global listener
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGUSR1) is not hear:
        told.clear()
    listener = os.getpid()
    for number in SIGNALS:
        signal.signal(number, hear)
    release()


def hear(number: int, frame: Any) -> None:
    """The handler."""
    if os.getpid() != listener:  # forked from the run, which is told, too
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    told.append(number)
    if not attended:
        leave()


def leave() -> None:
    """Ends this process for the first signal that it was told, if any; there is nothing to save.

    Of several ranks only the first goes at a warning, for one that ended before it could take it along before the job is queued.
    """
    if told and (told[0] not in WARNINGS or first_rank()):
        ignore()
        if told[0] in WARNINGS and (outcome := requeue()):
            print(outcome, file=sys.stderr, flush=True)
        raise Stop(told[0])


def first_rank() -> bool:
    return all(int(os.environ.get(name, 0)) == 0 for name in ("SLURM_PROCID", "LOCAL_RANK"))


def requeue() -> str | None:
    """Has Slurm start this process's job again, and says so; submitit does that itself. None where no Slurm runs it.

    The job's processes get SIGTERM within a second, and SIGKILL after Slurm's KillWait.
    """
    slurm = os.environ
    if "SLURM_JOB_ID" not in slurm:
        return None
    if "SUBMITIT_EXECUTOR" in slurm:
        return "submitit queues the job again"
    job = slurm["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in slurm:
        job = f"{slurm['SLURM_ARRAY_JOB_ID']}_{slurm['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"job {job} is not queued again: scontrol: {error.strerror}"
    if done.returncode:
        return f"job {job} is not queued again: {(done.stderr or done.stdout).strip()}"
    return f"job {job} is queued again"


def ignore() -> None:
    """For a run that ends already, and is told again while it does."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# Processes that start a run ---------------------------------------------------------------------------------------


def hold() -> None:
    """Signals wait, also through `exec` and in processes started from now on, until one of them listens."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def release() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def carry_out(command: list[str], environment: dict[str, str]) -> None:
    """Runs a command to its end; CalledProcessError if it fails.

    Under submitit this process is told of the end of its time, too, and would end at once, and the job with it. Here the
    command is told and ends first, then this process does what submitit wants (it queues the job again).
    """
    came: list[int] = []
    process: subprocess.Popen | None = None

    def pass_on(number: int, frame: Any) -> None:
        came.append(number)
        if process is not None:
            process.send_signal(number)

    with handled_by(pass_on):
        hold()
        try:
            process = subprocess.Popen(command, env=environment)
        finally:
            release()
        for number in came:
            process.send_signal(number)
        code = process.wait()
    if came:
        signal.raise_signal(came[0])
        sys.exit(0)  # of several ranks submitit's first queues the job again; another that failed would end it before
    if code:
        raise subprocess.CalledProcessError(code, command)


@contextmanager
def handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Warnings go to this handler where somebody handles them; those whom nobody awaits end a process, as ever."""
    former = {number: signal.getsignal(number) for number in WARNINGS}
    taken = [number for number, before in former.items() if callable(before)]
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, former[number])

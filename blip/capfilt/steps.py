"""Steps: commands that each leave a folder; run once for what decides their result, side by side where they may be.

A step is a Hydra multirun of this program in a process of its own. It works in <pipeline folder>/<name>/<key>, where the key is a
hash of what decides its result (`keys.py`):

    step.json       what decides, in full, so that another key can say what differs; when this attempt began, seconds before it
    log.txt         what all attempts printed; whoever still writes it holds a lock on it
    finished.json   nothing is left to do: seconds, and the fingerprint of what the step leaves to others

A finished step is skipped. One that was cut off is started again in its folder and goes on from what lies there: a training run
from its checkpoint, a pass over shards with those that are missing. Nothing is ever overwritten: what differs has another folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip.capfilt.keys import Step, changes, decided_by, digest, key_of, override, step_overrides
from blip.files import write_text
from blip.main import environment
from blip.overrides import choices

COMMAND = (sys.executable, "-c", "from blip.main import main; main()")
# Lines that stay in a step's log: details, paths, Hydra's own; errors are told when the step has ended.
UNTOLD = (
    *(" ", "/", "[", "error: "),
    *(
        "Error executing job",
        "Traceback",
        "subprocess.CalledProcessError",
        "Set the environment variable HYDRA_FULL_ERROR",
    ),
)
POLL = 0.2  # seconds between looks at what is running
PATIENCE = 300  # seconds that a step which was told to stop has for its checkpoint


@dataclass
class Running:
    """A step that was started: its process, where its logs were long then, and how far they have been told."""

    step: Step
    folder: Path
    process: subprocess.Popen
    began: float
    before: dict[Path, int]
    told: dict[Path, int]


class Steps:
    """Runs steps in a pipeline's folder.

    root: working directory of the steps; launcher: `local` (in the step's process; several workers by joblib), or the name of a
    Hydra launcher; resources: stage, or `all` -> options of the launcher; command: what stands before the overrides
    """

    def __init__(
        self,
        folder: Path,
        root: Path,
        launcher: str = "local",
        resources: Mapping[str, Mapping[str, Any]] | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        if launcher not in (there_are := ["local", *choices("hydra/launcher")]):
            raise ValueError(f"pipeline.launcher={launcher} is none of {', '.join(there_are)}")
        self.folder, self.root, self.launcher = folder, root, launcher
        self.resources, self.command = dict(resources or {}), tuple(command)
        self.done: dict[str, Path] = {}  # name -> folder of all that were asked for, in their order

    def run(self, *steps: Step, only: Collection[str] | None = None) -> list[Path]:
        """Runs side by side those that are not finished; the folders of all.

        ValueError with the own error of one that fails, and for one that is not finished and whose stage is not in `only`.
        """
        folders, start = [], []
        for step in steps:
            decided = decided_by(step, self.root)
            folder = self.folder / step.name / key_of(decided)
            folders.append(folder)
            if (folder / "finished.json").exists():
                say(step.name, f"finished before, in {folder}")
                continue
            differs = changes(folder, decided)
            if only is not None and step.stage not in only:
                raise ValueError(f"{step.name} is not among the stages to run, and is not finished{differs}")
            if differs:
                say(step.name, f"is run anew{differs}")
            start.append((step, folder, decided))
        threads = len(os.sched_getaffinity(0)) // max(1, sum(max(1, step.workers) for step, *_ in start))
        running: list[Running] = []
        try:
            for step, folder, decided in start:
                running.append(self.start(step, folder, decided, max(1, threads)))
            wait(running)
        except BaseException:  # a step has failed, or the driver is told to end
            end(running)
            raise
        self.done |= {step.name: folder for step, folder in zip(steps, folders, strict=True)}
        return folders

    def start(self, step: Step, folder: Path, decided: Mapping[str, Any], threads: int) -> Running:
        """Starts a step in its folder, after whoever is still at work there has ended."""
        folder.mkdir(parents=True, exist_ok=True)
        log, about = folder / "log.txt", folder / "step.json"
        with open(log, "ab") as file:
            wait_for(file.fileno(), step, folder)
            for path in (folder, *folder.glob("jobs/*")):
                (path / "config.yaml").unlink(missing_ok=True)  # would refuse other paths; the key says what matters
                (path / "ended").unlink(missing_ok=True)
            before = json.loads(about.read_text()) if about.exists() else None
            seconds = before["seconds"] + max(0.0, log.stat().st_mtime - before["began"]) if before else 0.0
            began = time.time()
            write_text(about, json.dumps({**decided, "seconds": seconds, "began": began}, indent=1) + "\n")
            env = environment()
            if self.launcher in ("local", "joblib"):
                env = {"OMP_NUM_THREADS": str(threads)} | env
            say(step.name, f"{'goes on' if before else 'starts'}, in {folder}")
            sizes = {path: path.stat().st_size for path in logs(folder)}
            process = subprocess.Popen(
                [*self.command, "-m", *step_overrides(step), *self.placed(step, folder)],
                cwd=self.root, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        return Running(step, folder, process, began, sizes, dict(sizes))

    def placed(self, step: Step, folder: Path) -> Iterator[str]:
        """Overrides that say where a step works and who starts its jobs."""
        yield override("hydra.sweep.dir", str(folder))
        if step.workers:
            yield override("stage.out", str(folder))
            yield "hydra.sweep.subdir='jobs/${hydra.job.num}'"
        else:
            yield "hydra.sweep.subdir=."
        if step.workers > 1:
            yield f"stage.worker=range(0,{step.workers})"
        if self.launcher == "joblib" or (self.launcher == "local" and step.workers > 1):
            yield from ("hydra/launcher=joblib", f"hydra.launcher.n_jobs={max(1, step.workers)}")
            yield "++hydra.job.env_set.LOCAL_RANK='${hydra.job.num}'"  # each its own GPU
        elif self.launcher != "local":
            yield f"hydra/launcher={self.launcher}"
        for key, value in {**self.resources.get("all", {}), **self.resources.get(step.stage, {})}.items():
            yield override(f"hydra.launcher.{key}", value)


# Starting, watching, ending ---------------------------------------------------------------------------------------


def wait_for(file: int, step: Step, folder: Path) -> None:
    """Waits for an earlier attempt, telling what it prints; then has the lock on the log, which whoever writes it inherits."""
    told: dict[Path, int] | None = None
    while True:
        jobs: list[str] = []
        if free(file) and not (jobs := queued(folder)):
            return
        if told is None:
            who = f" (job {', '.join(jobs)})" if jobs else ""
            say(step.name, f"is still at work from an earlier start{who}; waits for its end")
            told = {path: path.stat().st_size for path in logs(folder)}
        tell(step, folder, told)
        time.sleep(10 * POLL if jobs else POLL)


def queued(folder: Path) -> list[str]:
    """Slurm's numbers of the jobs of a step that have not ended. ValueError where they cannot be asked for."""
    ours = {path.name.partition("_")[0] for path in folder.glob(".submitit/*")}
    if not ours:
        return []
    try:
        done = subprocess.run(
            ["squeue", "--me", "--noheader", "--format=%F"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", "") or error
        raise ValueError(
            f"{folder}: whether its jobs {sorted(ours)} have ended can't be asked for: squeue: {told}"
        ) from None
    return sorted(ours & set(done.stdout.split()))


def wait(running: list[Running]) -> None:
    """Tells what the steps print until all have ended well; ValueError at the first that did not."""
    left = list(running)
    while left:
        for one in list(left):
            code = one.process.poll()
            tell(one.step, one.folder, one.told, whole=code is not None)
            if code is None:
                continue
            missing = [name for name in one.step.needs if not (one.folder / name).exists()]
            if code or missing:
                reason = error_of(one) if code else f"its jobs ended well, but left no {', '.join(missing)}"
                raise ValueError(f"{one.step.name} failed (its log: {one.folder / 'log.txt'}):\n{reason}")
            finish(one)
            left.remove(one)
        time.sleep(POLL)


def finish(one: Running) -> None:
    seconds = json.loads((one.folder / "step.json").read_text())["seconds"] + time.time() - one.began
    content = {"name": one.step.name, "seconds": round(seconds, 1), "output": digest(one.folder / one.step.output)}
    write_text(one.folder / "finished.json", json.dumps(content, indent=1) + "\n")
    say(one.step.name, f"finished after {seconds:.0f} s")


def end(running: Sequence[Running]) -> None:
    """Tells those still at work to stop and waits until they have: the processes that a step's own has left behind, too."""
    left = [one for one in running if one.process.poll() is None]
    for one in left:
        say(one.step.name, "is told to stop")
        kill(one, signal.SIGTERM)
        if jobs := queued(one.folder):
            subprocess.run(["scancel", *jobs], check=False)
    for one in left:
        until = time.monotonic() + PATIENCE
        with open(one.folder / "log.txt", "ab") as file:
            while not free(file.fileno()):
                if time.monotonic() > until:
                    kill(one, signal.SIGKILL)
                tell(one.step, one.folder, one.told)
                time.sleep(POLL)
        while queued(one.folder) and time.monotonic() < until:
            time.sleep(10 * POLL)
        one.process.wait()
        tell(one.step, one.folder, one.told, whole=True)


def kill(one: Running, number: int) -> None:
    """Sends a signal to the process of a step and to all that it has started here."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(one.process.pid, number)


def free(log: int) -> bool:
    """Takes the lock on a log, which those who write it inherit; False where one of them is left."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# What steps print -------------------------------------------------------------------------------------------------


def say(name: str, text: str) -> None:
    announce(f"{name:>18} | {text}")


def announce(*lines: str) -> None:
    """Prints; where nobody reads any more the work goes on, and the logs have what is lost."""
    with contextlib.suppress(BrokenPipeError):
        print(*lines, sep="\n", flush=True)


def logs(folder: Path) -> list[Path]:
    """What a step's process and, on a cluster, its jobs print."""
    return [
        folder / "log.txt",
        *sorted(folder.glob(".submitit/*/*_log.out")),
        *sorted(folder.glob(".submitit/*/*_log.err")),
    ]


def tell(step: Step, folder: Path, told: dict[Path, int], whole: bool = False) -> None:
    """Says the lines that came since `told`, which is moved on; `whole`: nothing more comes, so a line without end is one."""
    for path in logs(folder):
        with open(path, "rb") as file:
            file.seek(told.setdefault(path, 0))
            new = file.read()
        new = new if whole else new[: new.rfind(b"\n") + 1]
        told[path] += len(new)
        for line in new.decode(errors="replace").splitlines():
            if line.strip() and not line.startswith(UNTOLD):
                say(step.name, line)


def error_of(one: Running) -> str:
    """A step's own error: what it told as one, else the last lines before Hydra's account of it."""
    text = "".join(path.read_bytes()[one.before.get(path, 0) :].decode(errors="replace") for path in logs(one.folder))
    lines = text.partition("Error executing job with overrides")[0].splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[starts[0] :] if starts else [line for line in lines if line.strip()][-15:])

"""Steps: commands that each leave a folder; run once for what decides their result, side by side where they may be.

A step is a Hydra multirun of this program in a process of its own. Its key is a hash of what decides its result: its config
(without paths, loggers, callbacks and numbers of workers), the fingerprints of its data, and those of the weights and records it
uses. It works in FOLDER = <pipeline folder>/<name>/<key>:

    step.json       what decides, in full, so that another key can say what differs; when this attempt began, seconds before it
    log.txt         what all attempts printed; whoever still writes it holds a lock on it
    finished.json   nothing is left to do: seconds, and the fingerprint of what the step leaves to others

A finished step is skipped. One that was cut off is started again in its folder and goes on from what lies there: a training run
from its checkpoint, a pass over shards with those that are missing. Nothing is ever overwritten: what differs has another folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from blip.datamodules.index import open_index
from blip.datamodules.locations import expand
from blip.datamodules.sources import index_of
from blip.main import CONF, check, environment, leaves, replace

COMMAND = (sys.executable, "-c", "from blip.main import main; main()")
# What a result does not depend on.
NO_MATTER = (
    *("paths", "logger", "callbacks", "expected", "name"),
    *("trainer.accelerator", "trainer.log_every_n_steps", "trainer.profiler"),
    *("data.num_workers", "data.prefetch", "data.allow_other_data"),
    *("stage.out", "stage.worker", "stage.num_workers", "stage.prefetch", "stage.device", "stage.cache_gb"),
)
BY_FINGERPRINT = ("stage.shards", "stage.index")  # wherever they lie
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


@dataclass(frozen=True)
class Step:
    """One step.

    stage: what is run, a file of conf/stage; name: of this step and its folder, where a stage is run more than once
    overrides: of the command line, as `run.py` takes them
    uses: key of the config -> what lies there: weights, or the folder (or folders) of another step
    workers: 0 for a run in the folder itself; else so many jobs share the work on one output (`stage.out`, `stage.worker`)
    output: what the step leaves to others, in its folder; needs: the files without which it is not finished
    """

    stage: str
    name: str
    overrides: tuple[str, ...]
    uses: Mapping[str, Path | Sequence[Path]] = field(default_factory=dict)
    workers: int = 0
    output: str = "checkpoints"
    needs: tuple[str, ...] = ("checkpoints/last.ckpt", "metrics.json", "ended")


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
            replace(about, json.dumps({**decided, "seconds": seconds, "began": began}, indent=1) + "\n")
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


# What decides a step's result -------------------------------------------------------------------------------------


def decided_by(step: Step, root: Path) -> dict[str, dict[str, Any]]:
    """{"config": leaves by dotted name, "data": fingerprints by source, "uses": fingerprints by key of the config}."""
    cfg = composed(step_overrides(step), root)
    data = data_of(cfg)
    cfg.paths = {name: f"<{name}>" for name in cfg.paths}
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    if plain.get("stage"):  # of the rest nothing is used
        plain = {key: plain[key] for key in ("stage", "seed")}
    apart = tuple(f"{key}." for key in (*NO_MATTER, *BY_FINGERPRINT, *step.uses))
    config = {key: value for key, value in leaves(plain) if not f"{key}.".startswith(apart)}
    uses = {
        key: "+".join(fingerprint(path) for path in ([what] if isinstance(what, Path) else what))
        for key, what in step.uses.items()
    }
    return {"config": config, "data": data, "uses": uses}


def composed(overrides: Sequence[str], root: Path) -> DictConfig:
    """The config of a command that is started in `root`. ValueError for an override that can't be."""
    check(list(overrides))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", list(overrides))
    for node, key in ((cfg, "name"), *((cfg.paths, key) for key in cfg.paths)):  # what only Hydra's own start knows
        if "${hydra:" in str(OmegaConf.to_container(node, resolve=False)[key]):  # type: ignore[call-overload,index]
            node[key] = str(root)
    return cfg


def step_overrides(step: Step) -> list[str]:
    used = {k: str(v) if isinstance(v, Path) else [str(path) for path in v] for k, v in step.uses.items()}
    return [*step.overrides, *(override(key, value) for key, value in used.items())]


def override(key: str, value: Any) -> str:
    """KEY=VALUE of Hydra's grammar for any plain value; a key that may not be there yet is added."""
    return f"++{key}={_quoted(value)}"


def _quoted(value: Any) -> str:
    if isinstance(value, str):
        # a backslash says itself, but before a quotation mark
        return "'" + re.sub(r"(\\*)('|$)", lambda at: 2 * at[1] + (r"\'" if at[2] else ""), value) + "'"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_quoted(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_quoted(v) for v in value) + "]"
    return json.dumps(value)


def data_of(cfg: DictConfig) -> dict[str, str]:
    """Fingerprint of each source and held-out set (drawn and indexed first where that is missing); of a pass, of its shards."""
    if cfg.get("stage"):
        shards = cfg.stage.shards
        patterns = [shards] if isinstance(shards, str) else list(shards)
        locations = list(dict.fromkeys(location for pattern in patterns for location in expand(pattern)))
        return {"shards": open_index(locations, cfg.stage.get("index")).fingerprint}
    data: Any = OmegaConf.to_container(cfg.data, resolve=True)
    for source in data["sources"]:
        source.pop("view", None)  # a view is of records, which the step says that it uses
    module = instantiate(data, _convert_="all")
    module.prepare_data()
    found = {f"source {s.get('name', n)}": index_of(s, module.kind) for n, s in enumerate(module.sources)}
    for stage, sets in (("val", module.val), ("test", module.test)):
        found |= {f"{stage} {name}": index_of(spec, module.kind) for name, spec in sets.items()}
    return {name: index.fingerprint for name, index in found.items()}


def fingerprint(path: Path) -> str:
    """Of what a finished step left, as written there; of any other file or folder, of its bytes. ValueError where nothing is."""
    for folder in (path, *path.parents):
        if (folder / "finished.json").exists():
            output = json.loads((folder / "finished.json").read_text())["output"]
            return output if path == folder else f"{output} {path.relative_to(folder)}"
    if not path.exists():
        raise ValueError(f"{path}: there is nothing; name weights that exist")
    return digest(path)


def digest(path: Path) -> str:
    """Of the bytes of a file, or of the names and bytes of all files of a folder."""
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        with open(file, "rb") as content:
            total.update(f"{file.relative_to(path)}\0".encode() + hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:16]


def key_of(decided: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:12]


def changes(folder: Path, decided: Mapping[str, Mapping[str, Any]]) -> str:
    """What differs from the latest other folder of this step, in words; empty where there is none."""
    others = [path for path in folder.parent.glob("*/step.json") if path.parent != folder]
    if not others or (folder / "step.json").exists():
        return ""
    latest = max(others, key=lambda path: path.stat().st_mtime)
    before = json.loads(latest.read_text())
    lines = []
    for part in ("config", "data", "uses"):
        old, new = before[part], decided[part]
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                lines.append(f"    {part} {key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}")
    more = [f"    and {len(lines) - 12} more"] if len(lines) > 12 else []
    return f"; what is there ({latest.parent}) was made from other things:\n" + "\n".join(lines[:12] + more)


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
    replace(one.folder / "finished.json", json.dumps(content, indent=1) + "\n")
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

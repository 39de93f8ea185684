"""One command, one run: composes the config, decides the run folder once, and starts the run from the config saved there.

    python run.py [overrides]              composes, saves RUN/config.yaml and becomes `python -m blip.main RUN/config.yaml`
    python run.py resume=RUN [overrides]   the same, from the config that RUN holds
    python run.py -m [overrides]           one such process for each job
    python -m blip.main RUN/config.yaml    the run itself: what further ranks, restarts and requeues start, too

The first three import no torch, so that help and mistakes are answered at once, and no job inherits another's state.
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that takes time to import
    from blip import signals

    signals.listen()

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from blip import signals
from blip.files import own, write_text
from blip.overrides import CONF, PACKAGE, check, leaves

MODES = ("fit", "validate", "test", "predict")
# Warnings of libraries that nobody can act on: their own affairs, and what is meant to be as it is.
QUIET = (
    *("LeafSpec", "broadcast_buffers", "anonymous"),
    "`on_after_batch_transfer`",  # the task normalises, and only it
    "`self.log.*sync_dist=True",  # every rank computes the same numbers
    "Total length of `list` across ranks is zero",  # no validation set
    "custom batch sampler",
    "smaller than the logging interval",
    "The `srun` command is available",  # who starts a run without it means to
)
# What a run that is continued may change; with data.allow_other_data=true its data, too.
MAY_CHANGE = (
    *("trainer", "logger", "callbacks", "paths", "mode", "ckpt", "start", "expected"),
    *("data.num_workers", "data.prefetch", "data.allow_other_data"),
    *("stage.worker", "stage.num_workers", "stage.prefetch", "stage.device", "stage.cache_gb"),
)


def main() -> None:
    arguments = sys.argv[1:]
    if len(arguments) == 1 and arguments[0].endswith("config.yaml") and "=" not in arguments[0]:
        run(Path(arguments[0]))
        return
    flags = get_args_parser().parse_args(arguments)
    if flags.multirun:  # this process is none of the runs
        signals.release()
    resume = [text for text in flags.overrides if text.startswith("resume=")]
    try:
        if resume:
            if flags.multirun or len(resume) > 1:
                raise ValueError("resume= continues one run, without --multirun")
            rest = [text for text in flags.overrides if text not in resume]
            become(reopen(Path(resume[0].removeprefix("resume=")), rest))
        if flags.config_name is None and flags.config_path is None and flags.config_dir is None:
            check(flags.overrides)
    except ValueError as error:
        sys.exit(f"error: {error}")
    hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    if decided:
        become(decided[0])


# Before the run: the config and its folder ------------------------------------------------------------------------

decided: list[Path] = []  # the folder of a single run, left by Hydra's job for `main`


def job(cfg: DictConfig) -> None:
    """What Hydra calls with the composed config, once for a run and once for each job of a multirun."""
    try:
        folder = record(cfg, Path(HydraConfig.get().runtime.output_dir))
    except ValueError as error:
        sys.exit(f"error: {error}")
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        signals.carry_out(command(folder), environment())
        (folder / "ended").touch()  # to its end, and not cut off before that and queued again
    else:
        decided.append(folder)


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "blip.main", str(folder / "config.yaml")]


def environment() -> dict[str, str]:
    """This process's, in which `-m blip.main` finds this very package from any working directory."""
    path = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def become(folder: Path) -> None:
    """Replaces this process by the run, so that signals sent to it reach the run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command(folder), environment())


def record(cfg: DictConfig, folder: Path) -> Path:
    """Saves the config in the run folder and returns the folder. A folder with another model or data is refused."""
    if cfg.mode not in MODES:
        raise ValueError(f"mode={cfg.mode} is none of {', '.join(MODES)}")
    cfg = self_contained(cfg)
    path = folder / "config.yaml"
    if path.exists():
        refuse_changes(OmegaConf.load(path), cfg, folder)
    write_text(path, OmegaConf.to_yaml(cfg), own(path))  # tasks of srun are started side by side
    return folder


def self_contained(cfg: DictConfig) -> DictConfig:
    """The config with all that comes from outside it (time, environment, Hydra) replaced by its value.

    References from one key to another stay, so that what is changed in a continued run is changed everywhere.
    """
    plain = OmegaConf.to_container(cfg, resolve=False)
    for path, value in leaves(plain):
        if isinstance(value, str) and re.search(r"\$\{[\w.]+:", value):
            OmegaConf.update(cfg, path, OmegaConf.select(cfg, path))
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ValueError(f"{', '.join(missing)}: no value yet; say {missing[0]}=VALUE")
    OmegaConf.to_container(cfg, resolve=True)  # tells now of what refers to nothing
    return cfg


def reopen(folder: Path, overrides: list[str]) -> Path:
    """Applies overrides to the config that a run folder holds and saves it there; returns the folder."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"resume={folder}: there is no config.yaml; a run folder is what a run prints when it begins and as its last line"
        )
    folder = folder.resolve()
    said = folder / ".hydra" / "overrides.yaml"
    saved = OmegaConf.load(said)
    first: list[str] = OmegaConf.to_container(saved, resolve=False)  # type: ignore[assignment]  # an override may hold ${...}
    check(first + overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        before, after = compose("config", first), compose("config", first + overrides)
    refuse_changes(before, after, folder)
    cfg = load(folder / "config.yaml")
    for key in may_change(after):
        if (value := OmegaConf.select(after, key)) != OmegaConf.select(before, key):
            OmegaConf.update(cfg, key, value, merge=False)
    cfg.paths.run = str(folder)
    record(cfg, folder)
    write_text(said, OmegaConf.to_yaml(first + overrides))  # so that the next to continue keeps what this one said
    return folder


def may_change(cfg: Any) -> tuple[str, ...]:
    if cfg.get("pipeline"):
        return (*MAY_CHANGE, "pipeline")
    return (*MAY_CHANGE, "data") if OmegaConf.select(cfg, "data.allow_other_data") else MAY_CHANGE


def load(path: Path) -> DictConfig:
    cfg = OmegaConf.load(path)
    assert isinstance(cfg, DictConfig)
    return cfg


def refuse_changes(before: Any, after: Any, folder: Path) -> None:
    """ValueError with the list of what differs, except where a continued run may differ."""
    if before.get("pipeline") and after.get("pipeline"):
        return  # its steps see to it, each for itself
    old, new = (dict(leaves(OmegaConf.to_container(c, resolve=False))) for c in (before, after))
    free = tuple(f"{key}." for key in may_change(after))
    other = [
        f"    {key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if not f"{key}.".startswith(free) and old.get(key) != new.get(key)
    ]
    if other:
        raise ValueError(
            f"{folder} holds a run with another config:\n" + "\n".join(other) + "\n"
            f"  A run that is continued may change {', '.join(MAY_CHANGE)}. Else start a new one (another hydra.run.dir)."
        )


# The run ----------------------------------------------------------------------------------------------------------


def run(config: Path) -> None:
    """Executes; an error that says what to do ends the run with its text alone, how it arose lies in the run folder."""
    trace = config.resolve().with_name("traceback.txt")
    trace.unlink(missing_ok=True)  # of a start before
    try:
        execute(config)
    except (ValueError, OSError, InstantiationException) as error:
        told = error.__cause__ if isinstance(error, InstantiationException) else error
        if not isinstance(told, ValueError | OSError):
            raise
        with contextlib.suppress(OSError):  # the disk may be full
            trace.write_text(traceback.format_exc())
        sys.exit(f"error: {told}\n  How it arose: {trace}")


def execute(config: Path) -> None:
    """Runs what a saved config says; everything that the run writes lies in the folder of that config."""
    import blip._torchvision  # noqa: F401

    # isort: split
    import lightning as L
    from hydra.utils import instantiate
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in QUIET:
        warnings.filterwarnings("ignore", message=f".*{message}")
    folder = config.resolve().parent
    cfg = load(config)
    cfg.paths.run = str(folder)  # the folder may have been moved
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    for part in ("pipeline", "stage"):
        if cfg.get(part):  # what a stage trains is said by the other groups
            instantiate(cfg[part], _convert_="all").run(folder)
            print(folder, flush=True)
            return

    datamodule = instantiate(cfg.data, _convert_="all")
    datamodule.prepare_data()
    task = instantiate(cfg.task, tokenizer=datamodule.tokenizer.to_json(), _convert_="all")
    task.config_yaml = OmegaConf.to_yaml(cfg, resolve=True)
    # callbacks.preemption has the job queued again
    slurm = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    trainer = instantiate(
        cfg.trainer,
        plugins=[*(instantiate(node, _convert_="all") for node in cfg.trainer.plugins or ()), *slurm],
        callbacks=[instantiate(node, _convert_="all") for node in (cfg.callbacks or {}).values() if node],
        logger=[instantiate(node, _convert_="all") for node in (cfg.logger or {}).values() if node],
        default_root_dir=str(folder),
        _convert_="all",
    )
    if trainer.is_global_zero:
        write_text(folder / "versions.json", json.dumps(versions(), indent=2) + "\n")

    last = folder / "checkpoints" / "last.ckpt"
    if not (cfg.mode == "fit" and last.exists()):
        for report in load_weights(task, cfg, last):
            if trainer.is_global_zero:
                logging.getLogger(__name__).info("%s", report)
    if cfg.mode == "fit":
        if trainer.is_global_zero:
            told = f"goes on from {last.name}" if last.exists() else "begins at step 0"
            logging.getLogger(__name__).info("run folder: %s (%s)", folder, told)
        try:
            trainer.fit(task, datamodule=datamodule, ckpt_path=last if last.exists() else None, weights_only=True)
        except signals.Stop as stop:
            signals.ignore()  # it ends already
            close_logs()
            if trainer.is_global_zero:
                queued = signals.requeue() if stop.number in signals.WARNINGS else None
                kept = f"what is done until then is in {last}" if last.exists() else "no checkpoint was due yet"
                then = queued or f"go on with resume={folder}"
                print(f"stopped at step {trainer.global_step}; {kept}; {then}", flush=True)
            part_ranks()  # none ends before the job is queued again
            raise
        best = folder / "checkpoints" / "best.ckpt"
        if best.exists():
            task.load_weights(best)
        if datamodule.test_names:
            trainer.test(task, datamodule=datamodule, verbose=False)
    elif cfg.mode == "validate":
        trainer.validate(task, datamodule=datamodule, verbose=False)
    elif cfg.mode == "test":
        trainer.test(task, datamodule=datamodule, verbose=False)
    else:
        batches = trainer.predict(task, datamodule=datamodule)
        write_predictions(trainer, batches, folder / "predictions.jsonl")
    part_ranks()
    close_logs()
    if trainer.is_global_zero:
        print(folder, flush=True)


def part_ranks() -> None:
    """Waits for the other ranks and leaves them: threads of gloo may not outlive the interpreter, which would abort."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def close_logs() -> None:
    """Until all is written; W&B ends with lines of its own, and ours are the last."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def load_weights(task: Any, cfg: DictConfig, last: Path) -> list[Any]:
    """What a run begins with or measures: `ckpt`, in a new run else what `start` names, in others else `last`.

    Returns a report for each source, whose text says what came from it.
    """
    if cfg.ckpt is not None or cfg.mode != "fit":
        path = last if cfg.ckpt is None else Path(cfg.ckpt)
        if not path.exists():
            raise ValueError(
                f"{path}: there is no checkpoint. Name one by ckpt=PATH, or a run that has one by resume=RUN_FOLDER"
            )
        return task.load_weights(path)
    if cfg.start.text is not None or cfg.start.image is not None:
        return task.start_from(cfg.start.text, cfg.start.image, cfg.start.lm_head)
    return []


def write_predictions(trainer: Any, batches: Any, path: Path) -> None:
    """One JSON object a line, of all ranks.

    In the order of the data on one rank, and on several where a picture gives one row (rank r has every world-size-th picture).
    """
    import torch.distributed as dist

    rows = [row for batch in batches for row in batch]
    if trainer.world_size > 1:
        parts: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(parts, rows)
        rows = [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]
    if trainer.is_global_zero:
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        logging.getLogger(__name__).info("%d rows in %s", len(rows), path.name)


def versions() -> dict[str, str | None]:
    """What the run runs on: Python, libraries, and the commit of this code where it is a checkout."""
    command = ["git", "-C", str(PACKAGE), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # no git here
        commit = ""
    names = ("torch", "torchvision", "lightning", "hydra-core", "timm", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found, "commit": commit or None}


if __name__ == "__main__":
    main()

"""A run that is killed and continued is, bit for bit, the run that was not: losses, metrics, weights, order of the pairs.

The model is tiny but nothing is left out: dropout, augmentation, queue, momentum, drawn negatives, accumulated gradients, phases,
an epoch whose last step has half its micro-batches. Runs are processes of their own, killed by SIGKILL at steps drawn from a seed;
most are forked from a server that has imported the libraries once, one goes through the command line.
"""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from blip.datamodules.shapes import write_world
from blip.main import execute, record, reopen
from blip.overrides import CONF
from tests.recording import samples

ROOT = CONF.parent
SIZES = {"train": 102, "web": 0, "val": 6, "test": 12, "reserved": 6}
PATIENCE = 600  # seconds, for machines that are busy
STEPS, EPOCH = 32, 13  # batches of 4: 25 an epoch, two a step, the last alone
RUN = [
    "~experiment",  # what a recipe decides is said here, so that recipes may change
    "name=resume",
    "data=shapes_easy_first",
    "model=tiny",
    "optimizer=muon",
    "schedule=cosine",
    "trainer=cpu",
    "trainer.precision=32-true",
    f"trainer.max_steps={STEPS}",
    "trainer.accumulate_grad_batches=2",
    "trainer.gradient_clip_val=1.0",
    "trainer.val_check_interval=15",
    "trainer.check_val_every_n_epoch=null",
    "trainer.log_every_n_steps=1",
    "data.world_seed=3",
    f"data.sizes={{{', '.join(f'{k}: {v}' for k, v in SIZES.items())}}}",
    "data.image_size=32",
    "data.batch_size=4",
    "data.eval_batch_size=4",
    "data.augment={scale: [0.5, 1.0], flip: true, randaugment: true, released_autocontrast: false}",
    "model.vit.patch_size=8",
    "model.vit.width=32",
    "model.vit.depth=2",
    "model.vit.heads=2",
    "model.vit.drop_path=0.1",
    "model.med.width=32",
    "model.med.depth=2",
    "model.med.heads=2",
    "model.med.mlp_width=64",
    "model.med.dropout=0.1",
    "model.med.attention_dropout=0.1",
    "model.embed_width=16",
    "task.rules=[{match: '(qkv|fc1|fc2)\\.weight', muon: true, lr: 2.0}, {match: temperature, weight_decay: 0.0}]",
    "task.objectives.itm_start=0.2",
    "task.objectives.queue_size=22",
    "task.objectives.queue_start=0.1",
    "task.objectives.alpha_end=0.5",
    "task.objectives.momentum_dropout=true",
    "task.objectives.momentum_ramp=true",
    "task.evaluators.retrieval.top_k=4",
    "task.evaluators.caption.decoding.max_length=8",
    "callbacks.gallery=null",
    "callbacks.checkpoint.every_steps=3",
    "+callbacks.samples={_target_: tests.recording.Samples, folder: '${paths.run}', stop_after: null}",
]


# The runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("data") / "shapes", seed=3, sizes=SIZES)


def recorded(folder: Path, world: Path, *overrides: str) -> Path:
    """A run folder as `run.py` leaves it before the run itself starts."""
    overrides = (*RUN, *overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", list(overrides))
    cfg.paths = {"root": str(ROOT), "data": str(world.parent), "runs": str(folder.parent), "run": str(folder)}
    record(cfg, folder)
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(list(overrides)))
    return folder


def child(config: Path) -> None:
    """A run in a process of its own; what it prints goes beside its config."""
    log = os.open(config.with_name("log.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    torch.multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as in a run by `run.py`
    execute(config)


@pytest.fixture(scope="module")
def start() -> Callable[[Path], Any]:
    """Starts the run of a folder by a fork of a server that has imported what a run needs and computed nothing."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["blip._torchvision", "blip.main", "blip.tasks.pretrain", "blip.datamodules.shapes"])

    def begin(folder: Path) -> Any:
        process = server.Process(target=child, args=(folder / "config.yaml",))
        process.start()
        return process

    return begin


def finish(process: Any, folder: Path, code: int = 0) -> Path:
    process.join(PATIENCE)
    assert process.exitcode == code, (folder / "log.txt").read_text()[-3000:]
    return folder


def reached(folder: Path, start: int, step: int, alive: Callable[[], bool]) -> None:
    """Returns once the run of a folder, in the start of that number, is at work on an optimizer step."""
    deadline, log = time.monotonic() + PATIENCE, folder / f"samples-{start}.jsonl"
    while time.monotonic() < deadline:
        whole = log.read_text().rpartition("\n")[0].splitlines() if log.exists() else []
        if whole and json.loads(whole[-1])["step"] >= step:
            return
        assert alive(), f"the run ended before step {step}"
        time.sleep(0.002)
    raise AssertionError(f"the run did not come to step {step}")


def result(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but times and rates."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("run/")} for row in csv.DictReader(file)]
    metrics = json.loads((folder / "metrics.json").read_text())
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return {
        "losses": rows,
        "metrics": {k: v for k, v in metrics.items() if not k.startswith("run/")},
        "weights": digest(saved["state_dict"]),
        "optimizer": digest(saved["optimizer_states"]),
        "place": (saved["global_step"], saved["epoch"], saved["ShapesDataModule"]),
        "samples": samples(folder),
    }


def digest(state: Any) -> str:
    """A hash over all tensors and numbers of nested dicts and lists, with their names, types and shapes."""
    total = hashlib.sha256()

    def add(name: str, node: Any) -> None:
        if isinstance(node, dict | list | tuple):
            for key, value in node.items() if isinstance(node, dict) else enumerate(node):
                add(f"{name}.{key}", value)
        elif isinstance(node, torch.Tensor):
            total.update(f"{name} {node.dtype} {tuple(node.shape)}".encode() + node.contiguous().numpy().tobytes())
        else:
            total.update(f"{name} {node!r}".encode())

    add("", state)
    return total.hexdigest()


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for part in one:
        assert one[part] == other[part], part


@pytest.fixture(scope="module")
def whole(world: Path, start: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stopped."""
    folder = recorded(tmp_path_factory.mktemp("runs") / "whole", world)
    return finish(start(folder), folder)


# What they must show ----------------------------------------------------------------------------------------------


def test_the_run_that_nobody_stopped_has_all_in_it_that_could_differ(whole: Path) -> None:
    found = result(whole)
    assert len([row for row in found["losses"] if row["train/loss"]]) == STEPS
    assert {"train/itc", "train/itm", "train/lm"} <= found["metrics"].keys()
    assert {"val/retrieval/i2t_r1", "test/retrieval/t2i_r1", "test/retrieval_reserved/t2i_r1"} <= found[
        "metrics"
    ].keys()
    assert found["place"][:2] == (STEPS, 2)
    assert [row["micro_batch"] for row in found["samples"][23:27]] == [1, 0, 0, 1]  # 25 micro-batches, then epoch 1
    assert len({row["image"] for row in found["samples"]}) == len(found["samples"])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_killed_at_random_steps_it_ends_as_if_it_was_not(
    whole: Path, world: Path, start: Callable[[Path], Any], tmp_path: Path, workers: int
) -> None:
    folder = recorded(tmp_path / "run", world, f"data.num_workers={workers}")
    kills = sorted(random.Random(workers).sample(range(1, STEPS - 1), 2))
    for number, step in enumerate(kills):
        process = start(folder)
        reached(folder, number, step, process.is_alive)
        process.kill()
        finish(process, folder, -signal.SIGKILL)
    finish(start(folder), folder)
    assert_same(result(folder), result(whole))


def test_killed_and_continued_from_the_command_line(whole: Path, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    env = os.environ | {"OMP_NUM_THREADS": "1", "BLIP_DATA": str(world.parent)}
    command = [sys.executable, str(ROOT / "run.py")]
    step = random.Random("shell").randrange(STEPS // 2, STEPS - 1)
    with open(tmp_path / "log.txt", "w") as log:
        run = subprocess.Popen(
            [*command, *RUN, f"hydra.run.dir={folder}"], cwd=tmp_path, env=env, stdout=log, stderr=log
        )
        reached(folder, 0, step, lambda: run.poll() is None)
        run.kill()
        assert run.wait(60) == -signal.SIGKILL
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] < STEPS
    done = subprocess.run(
        [*command, f"resume={folder}"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == str(folder)
    assert_same(result(folder), result(whole))


@pytest.mark.parametrize("step", [EPOCH, EPOCH - 1])
def test_cut_off_where_an_epoch_ends_it_goes_on_in_the_next(
    whole: Path, world: Path, start: Callable[[Path], Any], tmp_path: Path, step: int
) -> None:
    folder = recorded(
        tmp_path / "run", world, "callbacks.checkpoint.every_steps=1", f"callbacks.samples.stop_after={step}"
    )
    finish(start(folder), folder, 1)
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
    reopen(folder, ["callbacks.samples.stop_after=null"])
    finish(start(folder), folder)
    assert_same(result(folder), result(whole))

"""Training by slurm/train.sbatch on two nodes: pre-empted at any time, one rank slower, it ends as if it had not been."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from blip.overrides import CONF
from tests.recording import samples
from tests.slurm.conftest import Cluster, until

ROOT = CONF.parent
SIZES = {"train": 102, "web": 0, "val": 6, "test": 12, "reserved": 6}
RUN = [
    "debug=smoke",
    "data=shapes",
    "trainer=ddp_sim",
    "trainer.max_steps=16",
    "trainer.val_check_interval=12",
    "trainer.log_every_n_steps=1",
    "trainer.limit_test_batches=0",
    "logger=wandb",
    "callbacks.gallery=null",
    "callbacks.curves.folder=${paths.run}",
    "callbacks.checkpoint.every_steps=1000",
    "data.world_seed=3",
    f"data.sizes={{{', '.join(f'{k}: {v}' for k, v in SIZES.items())}}}",
    "data.image_size=32",
    "data.batch_size=2",
    "data.eval_batch_size=4",
    "data.num_workers=1",
    "model.vit.patch_size=8",
    *(f"model.{part}.{size}" for part in ("vit", "med") for size in ("width=32", "depth=2", "heads=2")),
    "model.med.mlp_width=64",
    "model.embed_width=16",
    "+callbacks.samples={_target_: tests.recording.Samples, folder: '${paths.run}'}",
]
SLOW = "+callbacks.slow={_target_: tests.recording.Slow, rank: 1, seconds: 0.3}"


def submitted(cluster: Cluster, run: Path, *overrides: str) -> str:
    """The number of the job that trains in a folder."""
    said = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={run}.txt"]
    cluster.env |= {"RUN": str(run), "PYTHON": sys.executable, "BLIP_DATA": str(run.parent / "data")}
    command = ["sbatch", "--parsable", f"--chdir={ROOT}", *said, "slurm/train.sbatch"]
    os.chdir(ROOT)
    return cluster.ask(*command, *RUN, f"data.folder={run.parent}/data/shapes", *overrides).strip()


def result(run: Path) -> dict[str, Any]:
    """All that a run leaves but its times."""
    with open(run / "metrics.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("run/")} for row in csv.DictReader(file)]
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    metrics = json.loads((run / "metrics.json").read_text())
    return {
        "rows": rows,
        "metrics": {k: v for k, v in metrics.items() if not k.startswith("run/")},
        "pairs": [samples(run, rank) for rank in range(2)],
        "place": (saved["global_step"], saved["epoch"], saved["ShapesDataModule"]),
        "weights": {name: tensor.tolist() for name, tensor in saved["state_dict"].items()},
    }


def test_a_run_that_is_pre_empted_is_queued_again_and_ends_as_one_that_is_not(cluster: Cluster, tmp_path: Path) -> None:
    whole = submitted(cluster, tmp_path / "whole")
    assert cluster.ended(whole)["JobState"] == "COMPLETED", (tmp_path / "whole.txt").read_text()[-3000:]

    run, log = tmp_path / "run", tmp_path / "run.txt"
    job = submitted(cluster, run, SLOW)
    until((run / "config.yaml").exists)  # now the ranks import
    cluster.ask("scancel", "--signal=USR1", job)
    until(lambda: cluster.job(job)["Restarts"] == "1")
    until(lambda: steps(run) >= 4, lambda: log.read_text()[-3000:])
    cluster.ask("scancel", "--signal=USR1", job)
    ended = cluster.ended(job)
    said = log.read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), said[-3000:]

    assert said.count(f"job {job} is queued again") == 2
    assert said.count("begins at step 0") == said.count("goes on from last.ckpt") == 1
    stopped = int(said.partition("stopped at step ")[2].partition(";")[0])
    assert 4 <= stopped < 16
    assert os.listdir(run / "checkpoints") == ["last.ckpt"]
    ids = {folder.name.rpartition("-")[2] for folder in run.glob("wandb/offline-run-*")}
    assert len(list(run.glob("wandb/offline-run-*"))) == 2
    assert len(ids) == 1
    found, expected = result(run), result(tmp_path / "whole")
    for part in expected:
        assert found[part] == expected[part], part


def steps(run: Path) -> int:
    """Optimizer steps that a run has begun."""
    return max((row["step"] + 1 for row in samples(run, 1)), default=0)


def test_on_a_job_that_slurm_itself_queues_again_nothing_is_lost_either(cluster: Cluster, tmp_path: Path) -> None:
    """An operator's `scontrol requeue`, or pre-emption by a job of higher priority: SIGTERM, and SIGKILL after KillWait."""
    run = tmp_path / "run"
    job = submitted(cluster, run, SLOW, "trainer.max_steps=8", "logger=csv")
    until(lambda: steps(run) >= 2, lambda: (tmp_path / "run.txt").read_text()[-3000:])
    cluster.ask("scontrol", "requeue", job)
    assert cluster.ended(job)["JobState"] == "COMPLETED"
    said = (tmp_path / "run.txt").read_text()
    assert "stopped at step" in said
    assert "is queued again" not in said
    assert "goes on from last.ckpt" in said
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8


@pytest.fixture(autouse=True)
def where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)

"""`pipeline.launcher=slurm`: every stage is a job; one that is ended by its time limit is queued again, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from blip.capfilt.generate import Captioner
from blip.capfilt.passes import Pass
from blip.overrides import CONF
from tests.slurm.conftest import Cluster, until

ROOT = CONF.parent
CAUGHT = "{_target_: tests.slurm.slow.Wait, step: 4}"
WAITING = "stage.captioners.captioner._target_=tests.slurm.slow.Captioner"


def time_is_up(cluster: Cluster, job: str) -> None:
    """Slurm finds (it looks every 30 s) that a job has to be warned of the end of its time; started again it has more.

    Its limit is more than a minute off, so that it may answer slowly, and less than the two minutes before which it is warned.
    """
    about = cluster.job(job)
    hours, minutes, _ = map(int, about["RunTime"].split(":"))
    cluster.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    until(lambda: cluster.job(job)["Restarts"] != about["Restarts"])
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=30")


def jobs_of(step: Path) -> list[str]:
    """Slurm's numbers of the jobs that a step has started, of an array with their place in it."""
    names = sorted(path.name for path in step.glob(".submitit/*") if path.name[0].isdigit())
    return [name for name in names if "_" in name] or names


def test_all_stages_run_as_jobs_and_those_whose_time_is_up_go_on_later(cluster: Cluster, tmp_path: Path) -> None:
    folder, log = tmp_path / "runs" / "smoke", tmp_path / "log.txt"
    said = [
        "pipeline=capfilt", "debug=smoke", "pipeline.launcher=slurm", "pipeline.jobs={generate: 2, filter: 2}",
        "+pipeline.resources.all={cpus_per_task: 1, timeout_min: 30, signal_delay_s: 120}",
        f"+pipeline.overrides.pretrain=['+callbacks.caught={CAUGHT}']",
        f"+pipeline.overrides.generate=['{WAITING}','stage.batch_size=2']",
        "callbacks.gallery=null", "callbacks.curves=null", f"paths.data={tmp_path}/data", f"paths.runs={tmp_path}/runs",
    ]  # fmt: skip
    with open(log, "w") as file:
        driver = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *said], cwd=tmp_path, env=cluster.env, stdout=file, stderr=file
        )

    def at_work(pattern: str, what: str) -> Path:
        """The folder of a step, once such a file is in it."""
        until(lambda: list(folder.glob(f"{pattern}/{what}")) or driver.poll() is not None, log.read_text)
        assert driver.poll() is None, log.read_text()[-3000:]
        return next(folder.glob(pattern))

    pretrain = at_work("pretrain/*", "metrics.csv")
    (job,) = jobs_of(pretrain)
    time_is_up(cluster, job)
    generate = at_work("generate/*", "records/*.parquet")
    array = jobs_of(generate)
    time_is_up(cluster, array[0])
    until(lambda: driver.poll() is not None, log.read_text)
    assert driver.returncode == 0, log.read_text()[-3000:]

    assert [job.partition("_")[2] for job in array] == ["0", "1"]
    assert len(jobs_of(next(folder.glob("filter/*")))) == 2
    told = log.read_text()
    assert "stopped at step 5" in told
    assert f"run folder: {pretrain} (goes on from last.ckpt)" in told
    steps = {about["stage"]: about for about in json.loads((folder / "summary.json").read_text())}
    assert list(steps) == ["pretrain", "finetune_captioner", "finetune_filter", "generate", "filter", "repretrain"]
    assert (steps["filter"]["texts/web"], steps["filter"]["texts/synthetic"]) == (30, 30)

    (captioner,) = folder.glob("finetune_captioner/*/checkpoints/last.ckpt")
    undisturbed = Pass(
        f"{tmp_path}/data/shapes_smoke/web/*.tar", captioners={"captioner": Captioner(captioner)}, batch_size=2
    )
    undisturbed.run(tmp_path / "undisturbed")
    assert records(generate) == records(tmp_path / "undisturbed")


def records(folder: Path) -> dict[str, list[tuple]]:
    """shard -> (picture, text) of every record, in their order."""
    tables = {path.name: pq.read_table(path, columns=["key", "text"]) for path in folder.glob("records/*.parquet")}
    assert len(tables) == 3
    return {name: list(zip(*table.to_pydict().values(), strict=True)) for name, table in sorted(tables.items())}

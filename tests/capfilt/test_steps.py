"""Steps: run once for what decides their result, side by side, ended and continued; a stand-in leaves what stages would."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from blip.capfilt.keys import NO_MATTER, Step, decided_by, fingerprint, override
from blip.capfilt.steps import Steps
from blip.datamodules.shapes import write_world
from blip.main import MAY_CHANGE
from blip.overrides import CONF
from tests.capfilt.stage_standin import until

ROOT = CONF.parent
STANDIN = (sys.executable, str(Path(__file__).with_name("stage_standin.py")))


@pytest.fixture(autouse=True)
def decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides is what the step says, for no config is composed; tests of `decided_by` have it by its name."""

    def said(step: Step, root: Path) -> dict[str, Any]:
        config = dict(text.split("=", 1) for text in step.overrides)
        return {"config": config, "data": {}, "uses": {key: fingerprint(path) for key, path in step.uses.items()}}  # type: ignore[arg-type]

    monkeypatch.setattr("blip.capfilt.steps.decided_by", said)
    monkeypatch.setattr("blip.capfilt.steps.POLL", 0.02)


def doing(what: str, name: str = "pretrain", *overrides: str, **uses: Path) -> Step:
    return Step(name, name, (f"do={what}", *overrides), uses)


def runner(folder: Path, **options: Any) -> Steps:
    return Steps(folder, ROOT, command=STANDIN, **options)


def attempts(folder: Path) -> int:
    return len((folder / "attempts.txt").read_text().splitlines())


# Once for what decides --------------------------------------------------------------------------------------------


def test_a_finished_step_is_not_run_again(tmp_path: Path) -> None:
    (folder,) = runner(tmp_path).run(doing("finish"))
    assert runner(tmp_path).run(doing("finish")) == [folder]
    assert attempts(folder) == 1
    assert json.loads((folder / "finished.json").read_text())["seconds"] >= 0


def test_what_differs_is_told_and_run_beside_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (first,) = runner(tmp_path).run(doing("finish", "pretrain", "lr=1", "leave=a"))
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    (second,) = runner(tmp_path).run(doing("finish", "pretrain", "lr=2", "leave=a"))
    assert second != first
    told = capsys.readouterr().out
    assert f"what is there ({first}) was made from other things:\n    config lr: 1 -> 2" in told
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    assert runner(tmp_path).run(doing("finish", "pretrain", "lr=1", "leave=a")) == [
        first
    ]  # and is still there to be had
    assert attempts(first) == 1


def test_a_step_is_run_anew_where_other_weights_were_left_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for weights in ("a", "b", "a"):
        (made,) = runner(tmp_path).run(doing("finish", "pretrain", f"leave={weights}"))
        found += runner(tmp_path).run(doing("finish", "captioner", ckpt=made / "checkpoints" / "last.ckpt"))
    assert found[0] == found[2] != found[1]
    assert "captioner | is run anew" in (told := capsys.readouterr().out)
    assert "    uses ckpt: " in told


def test_a_step_that_is_not_asked_for_must_be_finished(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pretrain is not among the stages to run, and is not finished$"):
        runner(tmp_path).run(doing("finish"), only=["filter"])
    runner(tmp_path).run(doing("finish", "pretrain", "lr=1"))
    runner(tmp_path).run(doing("finish", "pretrain", "lr=1"), only=["filter"])
    with pytest.raises(ValueError, match=r"not finished; what is there \(.*\n    config lr: 1 -> 2"):
        runner(tmp_path).run(doing("finish", "pretrain", "lr=2"), only=["filter"])


# Failures ---------------------------------------------------------------------------------------------------------


def test_a_failure_is_told_in_the_stage_s_own_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"^filter failed \(its log: (.*)/log.txt\):\n") as caught:
        runner(tmp_path).run(doing("fail", "filter"))
    assert str(caught.value).split("\n", 1)[1] == "error: the shard is broken\n  fetch it anew"
    assert not list(tmp_path.rglob("finished.json"))
    assert capsys.readouterr().out.count("filter | ") == 2  # that it starts, and its line of progress


def test_of_an_error_that_nobody_expected_the_last_lines_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"begins to crash\n  a detail\nKilled$"):
        runner(tmp_path).run(doing("crash"))


def test_errors_of_an_earlier_attempt_are_not_told_again(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="pretrain failed") as caught:
            runner(tmp_path).run(doing("fail"))
    assert str(caught.value).count("broken") == 1


@pytest.mark.parametrize(
    ("what", "absent"), [("nothing", "checkpoints/last.ckpt, metrics.json, ended"), ("cut", "ended")]
)
def test_jobs_that_end_well_but_leave_something_out_are_an_error(tmp_path: Path, what: str, absent: str) -> None:
    with pytest.raises(ValueError, match=rf"its jobs ended well, but left no {absent}$"):
        runner(tmp_path).run(doing(what))
    assert not list(tmp_path.rglob("finished.json"))


def test_what_runs_beside_a_failure_is_ended_with_its_work_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="filter failed"):
        runner(tmp_path).run(doing("wait", "captioner"), doing("fail", "filter", "after=waits"))
    (folder,) = tmp_path.glob("captioner/*")
    assert (folder / "saved").exists()
    assert not (folder / "finished.json").exists()


# Side by side -----------------------------------------------------------------------------------------------------


def test_steps_of_one_call_run_side_by_side_and_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    folders = runner(tmp_path).run(doing("meet", "captioner"), doing("meet", "filter"))  # each waits for the other
    assert [(folder / "attempts.txt").read_text().split()[1] for folder in folders] == ["3", "3"]


@pytest.mark.parametrize(
    ("launcher", "workers", "told"),
    [
        ("local", 0, {"hydra.sweep.subdir": "."}),
        ("local", 1, {"hydra.sweep.subdir": "'jobs/${hydra.job.num}'"}),
        ("local", 3, {"hydra/launcher": "joblib", "hydra.launcher.n_jobs": "3", "stage.worker": "range(0,3)"}),
        ("joblib", 0, {"hydra/launcher": "joblib", "hydra.launcher.n_jobs": "1"}),
        ("slurm", 3, {"hydra/launcher": "slurm", "stage.worker": "range(0,3)", "hydra.launcher.gres": "'gpu:1'"}),
        ("slurm", 0, {"hydra/launcher": "slurm", "hydra.launcher.partition": "'long'", "hydra.launcher.nodes": "2"}),
    ],
)
def test_jobs_are_given_to_the_launcher_with_their_resources(
    tmp_path: Path, launcher: str, workers: int, told: dict[str, str]
) -> None:
    stage = "generate" if workers else "pretrain"
    resources = {
        "all": {"partition": "short"},
        "pretrain": {"partition": "long", "nodes": 2},
        "generate": {"gres": "gpu:1"},
    }
    step = Step(stage, stage, ("do=finish",), workers=workers)
    (folder,) = runner(tmp_path, launcher=launcher, resources=resources if launcher == "slurm" else None).run(step)
    said = json.loads((folder / "overrides.json").read_text())
    assert told.items() <= said.items()
    assert said["hydra.sweep.dir"] == f"'{folder}'"
    assert said.get("stage.out") == (f"'{folder}'" if workers else None)
    assert ("stage.worker" in said) == (workers > 1)


def test_a_launcher_that_is_none_is_told_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pipeline\.launcher=slrm is none of local, basic, joblib, .*slurm"):
        Steps(tmp_path, ROOT, "slrm", command=STANDIN)


# Ended and continued ----------------------------------------------------------------------------------------------

DRIVER = """
import sys
from pathlib import Path
from blip import signals
from blip.capfilt import steps
from blip.capfilt.keys import Step
signals.listen()
steps.decided_by = lambda step, root: {"config": {}, "data": {}, "uses": {}}
folder, root, *standin = sys.argv[1:]
two = [Step(name, name, ("do=wait",)) for name in ("captioner", "filter")]
steps.Steps(Path(folder), Path(root), command=standin).run(*two)
"""


def driver(folder: Path) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), str(ROOT), *STANDIN], env=env, stdout=subprocess.PIPE, text=True
    )


def both(folder: Path, name: str) -> bool:
    return len(list(folder.glob(f"*/*/{name}"))) == 2


def test_after_kill_9_of_the_driver_another_waits_for_what_is_still_at_work_and_goes_on_there(tmp_path: Path) -> None:
    first = driver(tmp_path)
    until(lambda: both(tmp_path, "waits"))
    first.kill()
    first.wait()
    second = driver(tmp_path)
    assert second.stdout is not None
    told = ""
    while "captioner | is still at work from an earlier start" not in told:
        told += (line := second.stdout.readline())
        assert line, told
    assert all(attempts(path.parent) == 1 for path in tmp_path.glob("*/*/attempts.txt"))
    (tmp_path / "go").touch()
    assert second.wait(60) == 0
    assert both(tmp_path, "finished.json")
    assert all(attempts(path.parent) == 2 for path in tmp_path.glob("*/*/attempts.txt"))


def test_a_driver_that_is_told_to_end_ends_what_it_started_and_waits_until_that_has_saved(tmp_path: Path) -> None:
    process = driver(tmp_path)
    until(lambda: both(tmp_path, "waits"))
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert both(tmp_path, "saved")
    assert "filter | is told to stop" in told
    for path in tmp_path.glob("*/*/attempts.txt"):
        assert not Path(f"/proc/{path.read_text().split()[0]}").exists()


def test_jobs_that_an_earlier_driver_has_left_in_slurm_s_queue_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    queue, programs = tmp_path / "queue", tmp_path / "bin"
    programs.mkdir()
    queue.write_text("17\n99\n")
    # who asks finds it for the last time
    (programs / "squeue").write_text(f"#!/bin/sh\ncat {queue}\necho 99 > {queue}\n")
    (programs / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="failed"):
        runner(tmp_path).run(doing("fail"))
    (folder,) = tmp_path.glob("pretrain/*")
    (folder / ".submitit" / "17_0").mkdir(parents=True)
    (folder / ".submitit" / "17_0" / "17_0_0_log.out").write_text("step 3\n")
    with pytest.raises(ValueError, match="failed"):
        runner(tmp_path).run(doing("fail"))
    assert "pretrain | is still at work from an earlier start (job 17)" in capsys.readouterr().out
    assert queue.read_text() == "99\n"


# What decides -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"train": 30, "web": 30, "val": 6, "test": 6, "reserved": 6}
    return write_world(tmp_path_factory.mktemp("data") / "shapes", 0, sizes).parent


def keys(data: Path, *overrides: str, **uses: Path) -> dict[str, dict[str, Any]]:
    sizes = "data.sizes={train: 30, web: 30, val: 6, test: 6, reserved: 6}"
    step = Step("pretrain", "pretrain", ("stage=pretrain", f"paths.data={data}", sizes, *overrides), uses)
    return decided_by(step, ROOT)


def test_a_key_is_of_what_decides_the_result_and_not_of_places_and_workers(world: Path, tmp_path: Path) -> None:
    first = keys(world)
    assert first["config"]["optimizer.lr"] == 1e-3
    assert {"source human", "source web", "val main", "test reserved"} <= first["data"].keys()
    moved = shutil.copytree(world, tmp_path / "moved")
    for same in (keys(world, "data.num_workers=3", "callbacks.gallery=null", "logger=wandb"), keys(moved)):
        assert same == first
    assert keys(world, "optimizer.lr=2e-3")["config"] != first["config"]
    web = moved / "shapes" / "web"
    (web / "1-00000.tar").write_bytes((web / "2-00000.tar").read_bytes())
    for index in web.glob("*.index"):  # which would tell that a shard has changed
        index.unlink()
    changed = keys(moved)
    assert {key for key in changed["data"] if changed["data"][key] != first["data"][key]} == {"source web"}


def test_weights_count_by_their_bytes_and_not_by_their_name(world: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in "abc")
    first.write_text("one")
    second.write_text("one")
    third.write_text("two")
    assert keys(world, ckpt=first) == keys(world, ckpt=second) != keys(world, ckpt=third)
    with pytest.raises(ValueError, match=r"nowhere: there is nothing; name weights that exist"):
        keys(world, ckpt=Path("nowhere"))


def test_a_mistake_in_a_stage_s_overrides_is_told_with_the_nearest_name(world: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)optimizer.lrr=1.*Nearest: optimizer.lr"):
        keys(world, "optimizer.lrr=1")


def test_all_that_no_key_counts_may_change_in_a_folder_that_is_continued() -> None:
    settled = {"name", "stage.out", "stage.worker"}  # by the step's folder and the job's number
    assert all(key.startswith(MAY_CHANGE) for key in NO_MATTER if key not in settled)


@pytest.mark.parametrize(
    "value", ["a b", "it's", "C:\\x", "x\\", "\\'", "{1..3}", 3, 0.5, 1e-7, True, None, [], ["x,y", 1], {"records": "/a b", "share": None}]
)  # fmt: skip
def test_an_override_is_read_by_hydra_as_it_was_meant(value: Any) -> None:
    (parsed,) = OverridesParser.create().parse_overrides([override("data.view", value)])
    assert parsed.value() == value
    assert not parsed.is_sweep_override()

"""The way of a run: composed, recorded, executed, cut off, continued; with a stand-in for model and data unless it says so."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from blip.main import execute, main, record, reopen, versions
from blip.overrides import CONF, check
from tests import standin

ROOT = CONF.parent
SMALL = [
    "trainer=cpu",
    "trainer.precision=32-true",
    "trainer.max_steps=25",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=10",
    "trainer.check_val_every_n_epoch=null",
    "callbacks.checkpoint.every_steps=5",
    "callbacks.gallery.count=1",
]
STANDIN = {"model": {}, "data": {"_target_": "tests.standin.Data"}, "task": {"_target_": "tests.standin.Task"}}


def recorded(folder: Path, *overrides: str, **nodes: dict[str, Any]) -> Path:
    """A run folder that holds the config of the small run, as `run.py` leaves it before it starts the run."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*SMALL, *overrides])
    for key, node in (STANDIN | nodes).items():
        cfg[key] = node
    cfg.name = "test"
    cfg.paths = {"root": str(folder), "data": str(folder), "runs": str(folder), "run": str(folder)}
    record(cfg, folder)
    hydra = folder / ".hydra"
    hydra.mkdir(exist_ok=True)
    (hydra / "overrides.yaml").write_text(OmegaConf.to_yaml([*SMALL, *overrides]))
    return folder


def run(folder: Path, stop_at: int = -1) -> Path:
    """Executes the recorded run; `stop_at` cuts it off before that batch."""
    standin.Task.stop_at = stop_at
    try:
        execute(folder / "config.yaml")
    except InterruptedError:
        assert stop_at >= 0
    finally:
        standin.Task.stop_at = -1
    return folder


def result(folder: Path) -> tuple[Any, Any, Any]:
    """All that a run leaves but its times: rows of the log, metrics, state of the model, of the optimizer and of the stream."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("run/")} for row in csv.DictReader(file)]
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics = {k: v for k, v in metrics.items() if not k.startswith("run/")}
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    state = {k: v.tolist() for k, v in saved["state_dict"].items()}
    moments = [v.tolist() for entry in saved["optimizer_states"][0]["state"].values() for v in entry.values()]
    return rows, metrics, (state, moments, saved["Data"], saved["global_step"], saved["epoch"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(recorded(tmp_path_factory.mktemp("finished")))


def test_a_run_leaves_its_config_checkpoint_numbers_and_pictures(finished: Path) -> None:
    for name in ("config.yaml", "versions.json", "metrics.csv", "curves.png", "contact_sheet.png"):
        assert (finished / name).stat().st_size > 0, name
    assert [p.name for p in (finished / "checkpoints").iterdir()] == ["last.ckpt"]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert {"train/loss", "val/zero/distance", "test/zero/distance"} <= metrics.keys()
    assert metrics["run/pairs_per_s"] > 0
    assert 0 <= metrics["run/data_wait"] <= 1
    assert metrics["run/mfu"] > 0
    assert json.loads((finished / "versions.json").read_text())["torch"] == torch.__version__


def test_a_checkpoint_holds_the_config_and_the_tokenizer_as_text(finished: Path) -> None:
    saved = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["tokenizer"] == "{}"
    assert OmegaConf.create(saved["config"]).trainer.max_steps == 25


def test_the_last_line_printed_is_the_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(recorded(tmp_path, "trainer.max_steps=1", "callbacks.gallery=null"))
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path)


# Batches 10 and 20 end an epoch of 10 and bring a validation; every fifth is saved; 25 is the end.
@pytest.mark.parametrize("stop_at", [3, 5, 10, 11, 20, 24])
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(finished: Path, tmp_path: Path, stop_at: int) -> None:
    run(recorded(tmp_path, "callbacks.gallery=null"), stop_at)
    assert (tmp_path / "checkpoints" / "last.ckpt").exists() == (stop_at >= 5)
    assert not (tmp_path / "curves.png").exists()
    run(reopen(tmp_path, []))
    assert result(tmp_path) == result(finished)


@pytest.mark.parametrize("length", ["max_steps=20", "max_epochs=2"])
def test_a_run_without_validation_ends_with_its_last_step_on_the_disk(tmp_path: Path, length: str) -> None:
    data = {"_target_": "tests.standin.Data", "validated": False}
    off = ["trainer.val_check_interval=null", "callbacks.checkpoint.every_steps=1000", "callbacks.gallery=null"]
    run(recorded(tmp_path, "trainer.max_steps=-1", f"trainer.{length}", *off, data=data))
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 20


def test_a_run_that_is_told_to_stop_saves_its_step_and_says_how_to_go_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path, "callbacks.gallery=null")
    learn = standin.Task.training_step

    def told_to_stop(task: standin.Task, batch: standin.Batch, batch_idx: int) -> torch.Tensor:
        if task.global_step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(task, batch, batch_idx)

    monkeypatch.setattr(standin.Task, "training_step", told_to_stop)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path)
    assert ended.value.code == 143
    assert f"stopped at step 8; what is done until then is in {tmp_path}" in capsys.readouterr().out
    monkeypatch.undo()
    run(reopen(tmp_path, []))
    assert result(tmp_path) == result(finished)


def test_a_full_disk_ends_the_run_with_one_error_and_it_goes_on_from_the_checkpoint_before(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(tmp_path, "callbacks.gallery=null")
    fsync, checkpoints = os.fsync, list[str]()

    def full(file: int) -> None:
        name = os.readlink(f"/proc/self/fd/{file}")
        checkpoints.extend([name] * (".ckpt" in name))
        if len(checkpoints) == 2:  # the first is on the disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the checkpoint before it is kept") as caught:
        run(tmp_path)
    monkeypatch.undo()
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5
    run(reopen(tmp_path, []))
    assert result(tmp_path) == result(finished)


def test_with_accumulated_gradients_a_run_is_saved_and_continued_at_optimizer_steps(tmp_path: Path) -> None:
    options = ["trainer.accumulate_grad_batches=2", "trainer.max_steps=9", "callbacks.checkpoint.every_steps=2"]
    options += ["callbacks.gallery=null", "callbacks.curves=null", "trainer.val_check_interval=4"]
    whole = run(recorded(tmp_path / "whole", *options))
    cut = run(recorded(tmp_path / "cut", *options), stop_at=7)  # step 3 is made, micro-batch 7 is under way
    saved = torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert saved["Data"] == {"epoch": 0, "pairs": 8}
    run(reopen(cut, []))
    assert result(cut)[1:] == result(whole)[1:]


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(finished: Path, tmp_path: Path) -> None:
    short = run(recorded(tmp_path, "trainer.max_steps=13", "callbacks.gallery=null"))
    run(reopen(short, ["trainer.max_steps=25"]))
    rows = [row for row in result(tmp_path)[0] if not row["test/zero/distance"]]
    assert [{k: v for k, v in r.items() if "test" not in k} for r in rows] == [
        {k: v for k, v in r.items() if "test" not in k} for r in result(finished)[0] if not r["test/zero/distance"]
    ]
    assert result(tmp_path)[2] == result(finished)[2]


def test_a_finished_run_that_is_started_again_only_tests_again(finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "moved"
    shutil.copytree(finished, again)
    run(reopen(again, ["callbacks.gallery=null"]))
    assert result(again)[1:] == result(finished)[1:]
    assert len(result(again)[0]) == len(result(finished)[0])


def test_a_run_whose_overrides_name_other_keys_is_continued(tmp_path: Path) -> None:
    recorded(tmp_path, "callbacks.curves.folder=${paths.run}/drawn")
    assert OmegaConf.load(reopen(tmp_path, []) / "config.yaml").callbacks.curves.folder == f"{tmp_path}/drawn"


@pytest.mark.parametrize(
    ("override", "told"),
    [("model=base", "model.vit.width: 128 -> 768"), ("data.batch_size=7", r"data.batch_size: \d+ -> 7")],
)
def test_another_model_or_data_is_refused_with_the_difference(finished: Path, override: str, told: str) -> None:
    before = (finished / "config.yaml").read_text()
    with pytest.raises(ValueError, match=told):
        reopen(finished, [override])
    assert (finished / "config.yaml").read_text() == before


def test_other_data_is_taken_where_it_is_allowed(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    reopen(tmp_path / "run", ["data.num_workers=3"])  # the order of the pairs does not depend on it
    reopen(tmp_path / "run", ["data.batch_size=7", "data.allow_other_data=true"])
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").data.batch_size == 7


def test_what_one_continuation_said_the_next_keeps(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    reopen(tmp_path / "run", ["trainer.max_steps=30"])
    reopen(tmp_path / "run", ["trainer.log_every_n_steps=7"])
    trainer = OmegaConf.load(tmp_path / "run" / "config.yaml").trainer
    assert (trainer.max_steps, trainer.log_every_n_steps) == (30, 7)


def test_a_machine_without_git_runs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert versions()["commit"] is None


def test_the_same_folder_takes_the_same_command_only(tmp_path: Path) -> None:
    recorded(tmp_path)
    recorded(tmp_path, "trainer.log_every_n_steps=2")
    with pytest.raises(ValueError, match=r"data.batch_size: absent -> 4"):
        recorded(tmp_path, data={"_target_": "tests.standin.Data", "batch_size": 4})
    with pytest.raises(ValueError, match="seed: 42 -> 1"):
        recorded(tmp_path, "seed=1")


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("modl.vit.width=3", "model.vit.width"),
        ("lr=3", "optimizer.lr"),
        ("experiment=dmo", "experiment=demo"),
        ("trainer.max_step=1,2", "trainer.max_steps"),
    ],
)
def test_an_unknown_override_is_answered_with_the_nearest_name(override: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s){override.split('=')[0]}.*Nearest:.*{nearest}"):
        check(["seed=1", override])


def test_an_unknown_mode_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode=tset is none of fit"):
        recorded(tmp_path, "mode=tset")


def test_measuring_takes_weights_from_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    weights = f"ckpt={finished}/checkpoints/last.ckpt"
    folder = run(recorded(tmp_path, "mode=test", weights, "callbacks.gallery=null"))
    measured = json.loads((folder / "metrics.json").read_text())
    assert measured == {"test/zero/distance": result(finished)[1]["test/zero/distance"]}
    recorded(tmp_path, "mode=predict", weights)
    run(folder)
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [row["position"] for row in rows] == [1, 2, 3, 4]
    recorded(tmp_path, "mode=validate", weights)
    run(folder)
    assert (folder / "contact_sheet.png").exists()


def test_a_run_begins_with_the_weights_it_is_given_and_says_so(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = ["trainer.max_steps=1", "callbacks.gallery=null"]
    given = {"task": STANDIN["task"] | {"lr": 0.0}}
    with caplog.at_level("INFO"):
        started = run(recorded(tmp_path / "a", *small, "start.text=bert", "start.image=vit", **given))
        filled = run(recorded(tmp_path / "b", *small, f"ckpt={finished}/checkpoints/last.ckpt", **given))
    assert "words of bert, pictures of vit, with head" in caplog.messages
    assert "all of last.ckpt" in caplog.messages
    saved = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (started, filled, finished)]
    first, second, source = (content["state_dict"]["layer.weight"] for content in saved)
    assert torch.equal(first, torch.ones_like(first))
    assert torch.equal(second, source)
    caplog.clear()
    run(reopen(started, ["trainer.max_steps=2"]))  # what was begun goes on with its own
    assert not any("words of bert" in message for message in caplog.messages)


def test_measuring_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no checkpoint"):
        run(recorded(tmp_path, "mode=test"))


def test_an_error_of_the_user_ends_the_run_with_its_text_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(tmp_path, "mode=test")
    monkeypatch.setattr(sys, "argv", ["blip", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit, match=r"^error: .*there is no checkpoint"):
        main()
    assert "Traceback" in (tmp_path / "traceback.txt").read_text()


def test_weights_and_biases_gets_what_the_csv_gets_without_a_network(tmp_path: Path) -> None:
    run(recorded(tmp_path, "logger=wandb", "trainer.max_steps=1", "callbacks.gallery=null"))
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"train/loss" in log.read_bytes()
    assert "train/loss" in (tmp_path / "metrics.csv").read_text()


# Through the shell -------------------------------------------------------------------------------------------------


def shell(*arguments: str, cwd: Path = ROOT, python: tuple[str, ...] = ("run.py",), check: bool = True) -> str:
    """What the command printed; its errors are shown when it fails."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *(str(ROOT / part) if part == "run.py" else part for part in python), *arguments],
        cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout if check else done.stderr


def test_help_is_told_without_importing_torch() -> None:
    code = "import sys; from blip.main import main; main(); sys.exit('torch' in sys.modules)"
    assert "resume=RUN_FOLDER" in shell("--help", python=("-c", code))


def test_a_mistake_ends_the_command_with_one_line() -> None:
    told = shell("optimizer.lrr=1", check=False)
    assert told.startswith("error: optimizer.lrr=1")
    assert "Traceback" not in told


def test_a_word_where_a_number_belongs_is_told_with_the_number_that_stands_there() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.lr=high: optimizer\.lr is a number, here 0\.001"):
        check(["optimizer.lr=high"])
    check(["trainer.devices=auto", "optimizer.lr=1e-4", "trainer.max_steps=${data.batch_size}", "model.vit.stem=patch"])


def test_jobs_of_a_multirun_with_two_ranks_start_from_their_saved_configs(tmp_path: Path) -> None:
    # The stand-in comes in by a config of its own, since the command line can't replace whole nodes.
    (tmp_path / "task").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "task" / "standin.yaml").write_text("_target_: tests.standin.Task\n")
    (tmp_path / "data" / "standin.yaml").write_text("_target_: tests.standin.Data\n")
    (tmp_path / "experiment").mkdir()
    few = {"max_steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None, "log_every_n_steps": 1}
    (tmp_path / "experiment" / "standin.yaml").write_text(
        "# @package _global_\n" + OmegaConf.to_yaml({"model": None, "trainer": few, "callbacks": {"gallery": None}})
    )
    printed = shell(
        "-m", "--config-dir", str(tmp_path), "experiment=standin", "task=standin", "data=standin", "trainer=ddp_sim",
        "seed=1", cwd=tmp_path,
    )  # fmt: skip
    (folder,) = (tmp_path / "runs" / "standin" / "multirun").glob("*/0")
    assert printed.splitlines()[-1] == str(folder)
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert saved["Data"] == {"epoch": 0, "pairs": 16}  # 4 steps of 2 ranks of 2
    assert OmegaConf.load(folder / "config.yaml").seed == 1
    assert "test/zero/distance" in json.loads((folder / "metrics.json").read_text())


def test_the_real_model_learns_tests_and_predicts_in_the_smoke_run(tmp_path: Path) -> None:
    smoke = ["debug=smoke", f"paths.data={tmp_path}/data", "trainer.max_steps=4", "trainer.val_check_interval=4"]
    printed = shell(*smoke, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    folder = tmp_path / "run"
    assert printed.splitlines()[-1] == str(folder)
    for name in ("curves.png", "contact_sheet.png", "checkpoints/last.ckpt"):
        assert (folder / name).stat().st_size > 0, name
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in ("retrieval/i2t_r1", "retrieval/t2i_r1_itc", "retrieval_reserved/i2t_r1", "caption/attributes"):
        assert 0 <= metrics[f"test/{name}"] <= 100
    assert metrics["test/retrieval/chance_r1"] == pytest.approx(100 / 24)
    assert {"val/retrieval/i2t_r1", "train/itc", "run/pairs_per_s", "run/data_wait", "run/mfu"} <= metrics.keys()
    run(reopen(folder, ["mode=predict"]))
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in rows}) == 24
    assert all(len(row["references"]) == 5 and isinstance(row["caption"], str) for row in rows)

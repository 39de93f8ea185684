"""A run that is told to end, wherever that finds it, goes on as if it had not been: same weights, same numbers, same pairs."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from blip import signals
from blip.main import execute, record, reopen
from blip.overrides import CONF

OPTIONS = [
    "trainer=cpu",
    "trainer.max_steps=25",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=10",
    "trainer.check_val_every_n_epoch=null",
    "callbacks.checkpoint.every_steps=1000",
    "callbacks.gallery=null",
    "callbacks.curves=null",
]
STANDIN = {"model": {}, "data": {"_target_": "tests.standin.Data"}, "task": {"_target_": "tests.standin.Task"}}
TOLD = "+callbacks.told={{_target_: tests.recording.Told, number: {}, step: {}, rank: {}, validating: {}}}"


def told(step: int, number: int = signal.SIGUSR1, rank: int = 0, validating: bool = False) -> str:
    return TOLD.format(int(number), step, rank, str(validating).lower())


def recorded(folder: Path, *overrides: str) -> Path:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*OPTIONS, *overrides])
    for key, node in STANDIN.items():
        cfg[key] = node
    cfg.name = "test"
    cfg.paths = {"root": str(folder), "data": str(folder), "runs": str(folder), "run": str(folder)}
    record(cfg, folder)
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml([*OPTIONS, *overrides]))
    return folder


def result(folder: Path) -> tuple[Any, ...]:
    """All that a run leaves but its times."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("run/")} for row in csv.DictReader(file)]
    metrics = json.loads((folder / "metrics.json").read_text())
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    weights = {name: value.tolist() for name, value in saved["state_dict"].items()}
    moments = [v.tolist() for entry in saved["optimizer_states"][0]["state"].values() for v in entry.values()]
    values = {k: v for k, v in metrics.items() if not k.startswith("run/")}
    return rows, values, weights, moments, saved["Data"], saved["global_step"], saved["epoch"]


def step_saved(folder: Path) -> int | None:
    path = folder / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["global_step"] if path.exists() else None


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Signals are handled after a test as before it."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signals.told.clear()
    signals.attended = False


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """What the run leaves that nobody told anything."""
    folder = recorded(tmp_path_factory.mktemp("whole"))
    execute(folder / "config.yaml")
    return result(folder)


# One rank, wherever the signal finds it ---------------------------------------------------------------------------


# Steps 10 and 20 end an epoch of 10 and bring a validation.
@pytest.mark.parametrize(
    ("step", "validating", "saved"),
    [(0, False, 1), (3, False, 4), (9, False, 10), (10, True, 10), (10, False, 11)],
)
def test_a_run_that_is_told_saves_its_step_and_ends_as_one_that_was_not(
    whole: tuple[Any, ...], tmp_path: Path, step: int, validating: bool, saved: int
) -> None:
    recorded(tmp_path, told(step, validating=validating))
    with pytest.raises(SystemExit) as ended:
        execute(tmp_path / "config.yaml")
    assert ended.value.code == 128 + signal.SIGUSR1
    assert step_saved(tmp_path) == saved
    assert os.listdir(tmp_path / "checkpoints") == ["last.ckpt"]
    execute(reopen(tmp_path, ["callbacks.told=null"]) / "config.yaml")
    assert result(tmp_path) == whole


def test_a_run_that_is_told_in_its_last_step_has_only_the_tests_to_come(whole: tuple[Any, ...], tmp_path: Path) -> None:
    recorded(tmp_path, told(24))
    with pytest.raises(signals.Stop):
        execute(tmp_path / "config.yaml")
    assert step_saved(tmp_path) == 25
    assert not any(name.startswith("test/") for name in json.loads((tmp_path / "metrics.json").read_text()))
    execute(tmp_path / "config.yaml")
    assert result(tmp_path)[1:] == whole[1:]


def test_a_run_that_is_told_in_its_last_validation_makes_it_again(tmp_path: Path) -> None:
    options = ["trainer.max_steps=20", "callbacks.checkpoint.every_steps=15"]
    execute(recorded(tmp_path / "whole", *options) / "config.yaml")
    with pytest.raises(signals.Stop):
        execute(recorded(tmp_path / "run", *options, told(20, validating=True)) / "config.yaml")
    assert step_saved(tmp_path / "run") == 15
    execute(reopen(tmp_path / "run", ["callbacks.told=null"]) / "config.yaml")
    assert result(tmp_path / "run")[1:] == result(tmp_path / "whole")[1:]


def test_a_run_that_is_told_in_a_validation_twice_loses_nothing(whole: tuple[Any, ...], tmp_path: Path) -> None:
    recorded(tmp_path, told(10, validating=True))
    for _ in range(2):  # the second in the validation with which it goes on
        with pytest.raises(signals.Stop):
            execute(tmp_path / "config.yaml")
    assert step_saved(tmp_path) == 10
    execute(reopen(tmp_path, ["callbacks.told=null"]) / "config.yaml")
    assert result(tmp_path) == whole


def test_with_accumulated_gradients_it_stops_at_an_optimizer_step(tmp_path: Path) -> None:
    options = ["trainer.accumulate_grad_batches=3", "trainer.max_steps=6", "trainer.val_check_interval=null"]
    execute(recorded(tmp_path / "whole", *options) / "config.yaml")
    with pytest.raises(signals.Stop):
        execute(recorded(tmp_path / "run", *options, told(1, signal.SIGTERM)) / "config.yaml")
    assert step_saved(tmp_path / "run") == 2
    execute(reopen(tmp_path / "run", ["callbacks.told=null"]) / "config.yaml")
    assert result(tmp_path / "run")[2:] == result(tmp_path / "whole")[2:]


# Two ranks --------------------------------------------------------------------------------------------------------


def rank_of_two(config: Path, rank: int, port: int) -> None:
    """One of two ranks, in a process of its own; what it prints goes beside its config."""
    log = os.open(config.with_name(f"log-{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    signals.listen()
    execute(config)


@pytest.fixture(scope="module")
def ranks() -> Callable[[Path], list[int | None]]:
    """Runs a folder on two ranks, forked from a server that has imported what they need; gives how they ended."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["blip._torchvision", "blip.main", "lightning", "tests.standin"])

    def run(folder: Path) -> list[int | None]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        both = [server.Process(target=rank_of_two, args=(folder / "config.yaml", r, port)) for r in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join(300)
            if process.is_alive():  # they wait for each other
                process.kill()
        return [process.exitcode for process in both]

    return run


TWO = ["trainer=ddp_sim", "trainer.max_steps=12", "trainer.val_check_interval=4"]


@pytest.fixture(scope="module")
def whole_of_two(ranks: Callable[[Path], list[int | None]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = recorded(tmp_path_factory.mktemp("runs") / "whole", *TWO)
    assert ranks(folder) == [0, 0], (folder / "log-0.txt").read_text()[-3000:]
    return folder


# Either rank is the one that is told, and either the slower; one time both are told, at different steps.
@pytest.mark.parametrize(
    ("signals_", "slow", "saved"),
    [
        ([told(5, rank=1)], 0, 6),
        ([told(3, signal.SIGTERM), told(5, rank=1).replace("told", "too", 1)], 1, 4),
        ([told(4, rank=1, validating=True)], 0, 4),
    ],
    ids=["one", "both", "validation"],
)
def test_two_ranks_stop_at_the_same_step_and_end_as_if_they_had_not(
    ranks: Callable[[Path], list[int | None]],
    whole_of_two: Path,
    tmp_path: Path,
    signals_: list[str],
    slow: int,
    saved: int,
) -> None:
    slower = f"+callbacks.slow={{_target_: tests.recording.Slow, rank: {slow}, seconds: 0.02}}"
    recorded(tmp_path, *TWO, slower, *signals_)
    ended = ranks(tmp_path)
    assert ended[0] == ended[1] != 0, (tmp_path / "log-0.txt").read_text()[-3000:]
    assert step_saved(tmp_path) == saved
    gone = ["callbacks.told=null", *(["callbacks.too=null"] if len(signals_) > 1 else [])]
    assert ranks(reopen(tmp_path, gone)) == [0, 0], (tmp_path / "log-0.txt").read_text()[-3000:]
    assert result(tmp_path) == result(whole_of_two)

"""The sweeps' command lines, built as W&B's agent builds them, are ones that `run.py` takes."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from blip.overrides import CONF, check

ROOT = CONF.parent
SWEEPS = sorted((ROOT / "sweep").glob("*.yaml"))


def command_lines(sweep: dict[str, Any]) -> list[list[str]]:
    """A command for each value of each parameter, and for both ends of a range."""
    choices = {}
    for name, spec in sweep["parameters"].items():
        choices[name] = [spec["value"]] if "value" in spec else spec.get("values") or [spec["min"], spec["max"]]
    lines = []
    for values in itertools.product(*choices.values()):
        drawn = {name: {"value": value} for name, value in zip(choices, values, strict=True)}
        parts: dict[str, list[str]] = create_sweep_command_args({"args": drawn})
        parts |= {"env": ["/usr/bin/env"], "program": [sweep["program"]], "interpreter": [sys.executable]}
        line: list[str] = []
        for item in create_sweep_command(sweep["command"]):
            line += parts[item[2:-1]] if item.startswith("${") else [item]
        lines.append(line)
    return lines


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_command_line_of_a_sweep_composes(path: Path) -> None:
    sweep = yaml.safe_load(path.read_text())
    for line in command_lines(sweep):
        assert line[:3] == ["/usr/bin/env", "python", "run.py"]
        check(line[3:])


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_scores_what_a_run_writes_and_draws_numbers(path: Path) -> None:
    sweep = yaml.safe_load(path.read_text())
    stage, task, _ = sweep["metric"]["name"].split("/")
    assert (stage, task) in {("test", "retrieval"), ("test", "caption"), ("val", "retrieval"), ("val", "caption")}
    for spec in sweep["parameters"].values():
        for value in (spec.get("min"), spec.get("max"), *spec.get("values", ())):
            assert value is None or isinstance(value, int | float)


def test_the_command_line_of_a_sweep_runs_through_the_shell() -> None:
    line = command_lines(yaml.safe_load(SWEEPS[0].read_text()))[0]
    line[1] = sys.executable
    done = subprocess.run([*line, "--cfg", "job"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["logger"]["wandb"]["offline"] is False

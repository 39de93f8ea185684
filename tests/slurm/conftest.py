"""A Slurm of two nodes on this machine, for as long as the tests of this folder run (`make slurm`); skipped where it is not installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SETUP = Path(__file__).with_name("setup.sh")
DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch")
SYSTEM = "/usr/local/sbin:/usr/sbin:/sbin"
PATIENCE = 900  # seconds, for machines that are busy


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == SETUP.parent:
            item.add_marker(pytest.mark.slurm)


@dataclass
class Cluster:
    env: dict[str, str]  # of whoever talks to it

    def ask(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, Restarts, ..."""
        return dict(
            pair.split("=", 1) for pair in self.ask("scontrol", "show", "job", "-o", number).split() if "=" in pair
        )

    def ended(self, number: str) -> dict[str, str]:
        """The same once the job has ended."""
        until(lambda: self.job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"))
        return self.job(number)


def until(condition: Callable[[], Any], told: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    path = f"{os.environ['PATH']}:{SYSTEM}"
    if missing := [name for name in DAEMONS if not shutil.which(name, path=path)]:
        pytest.skip(f"Slurm is not installed ({', '.join(missing)}): tests/slurm/setup.sh says how")
    if "slurm" not in request.config.getoption("markexpr"):
        pytest.skip("takes minutes of waiting for Slurm's clocks: make slurm")
    folder = tempfile.mkdtemp(prefix="slurm-", dir="/tmp")  # a socket's path may not be long
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "WANDB"))}
    env |= {"PATH": f"{folder}/bin:{path}", "SLURM_CONF": f"{folder}/slurm.conf", "PORT": str(port), "CPUS": "4"}
    env |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    started = subprocess.run([str(SETUP), "start", folder], env=env, capture_output=True, text=True, check=False)
    try:
        assert started.returncode == 0, started.stderr
        yield Cluster(env)
    finally:
        subprocess.run([str(SETUP), "stop", folder], env=env, check=False)
        shutil.rmtree(folder, ignore_errors=True)

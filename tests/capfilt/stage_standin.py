"""In place of `run.py`: leaves in a step's folder what a stage would, as the overrides that the driver gives it say.

do=finish            counts its attempts, leaves a checkpoint and metrics
do=fail              tells an error as a stage does, with Hydra's account of it; after=NAME: when another step has left that
do=crash             dies of an error that nobody expected
do=nothing           ends well and leaves nothing; do=cut: as a run that Slurm will start again
do=meet              waits for the other of two, then finishes
do=wait              waits until there is a file `go`, then finishes; told to end, it saves and ends later than its parent
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    said = {key.lstrip("+"): value for key, _, value in (text.partition("=") for text in sys.argv[2:])}
    folder = Path(said["hydra.sweep.dir"].strip("'"))
    (folder / "overrides.json").write_text(json.dumps(said))
    with open(folder / "attempts.txt", "a") as file:
        file.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\n")
    print(f"begins to {said['do']}\n  a detail", flush=True)
    if "after" in said:
        until(lambda: list(folder.parents[1].glob(f"*/*/{said['after']}")))
    if said["do"] in ("fail", "crash"):
        print("error: the shard is broken\n  fetch it anew" if said["do"] == "fail" else "Killed", flush=True)
        print("Error executing job with overrides: []\nTraceback (most recent call last):", flush=True)
        sys.exit(1)
    if said["do"] == "meet":
        (folder.parents[1] / f"{folder.parent.name} is there").touch()
        until(lambda: len(list(folder.parents[1].glob("* is there"))) == 2)
    if said["do"] == "wait":
        if os.fork():  # the parent dies of a signal, the child goes on writing its checkpoint
            os.wait()
            sys.exit()
        signal.signal(signal.SIGTERM, lambda *_: save(folder))
        (folder / "waits").touch()
        until(lambda: (folder.parents[1] / "go").exists())
    if said["do"] != "nothing":
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / "last.ckpt").write_text(said.get("leave", "weights"))
        (folder / "metrics.json").write_text("{}")
        if said["do"] != "cut":
            (folder / "ended").touch()
    print("ends", flush=True)


def save(folder: Path) -> None:
    until(lambda: os.getppid() == 1 or not Path(f"/proc/{os.getppid()}").exists())
    (folder / "saved").touch()
    sys.exit(143)


def until(so: Any, seconds: float = 120) -> None:
    for _ in range(int(50 * seconds)):
        if so():
            return
        time.sleep(0.02)
    sys.exit("waited in vain")


if __name__ == "__main__":
    main()

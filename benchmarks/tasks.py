"""Every task fine-tuned on the embedded world, beside chance and beside the same recipe on blank pictures.

    python -m benchmarks.tasks CHECKPOINT [--tasks vqa nlvr ...] [--seeds 0 1 2] [--out FOLDER] [--jobs N] [--json FILE]

CHECKPOINT is the demo's (`python run.py`, its checkpoints/last.ckpt). Each task runs its recipe `experiment=shapes_TASK` for
each seed twice: as it is, and trained and tested on grey pictures (`data.blank=true`), which shows what words alone tell.
Video is zero-shot: the model fine-tuned for pictures is only tested. A run that is finished in FOLDER is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Entry:
    """A task: its metrics, what guessing gives (percent), and the task whose model it tests where it trains none."""

    metrics: tuple[str, ...]
    chance: str
    model: str | None = None


TASKS = {
    "caption": Entry(("test/caption/attributes",), "none"),
    "retrieval": Entry(("test/retrieval/i2t_r1", "test/retrieval/t2i_r1"), "test/retrieval/chance_r1"),
    "vqa": Entry(("test/vqa/accuracy",), "test/vqa/chance"),
    "nlvr": Entry(("test/nlvr/accuracy",), "test/nlvr/chance"),
    "visdial": Entry(("test/visdial/r1", "test/visdial/mrr"), "test/visdial/chance_r1"),
    "video_retrieval": Entry(
        ("test/video_retrieval/t2v_r1", "test/video_retrieval/v2t_r1"), "test/video_retrieval/chance_r1", "retrieval"
    ),
    "video_qa": Entry(("test/video_qa/accuracy",), "test/video_qa/chance", "vqa"),
}


@dataclass(frozen=True)
class Run:
    """One training (or test) of the table."""

    task: str
    seed: int
    blank: bool
    folder: Path

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.json"

    def command(self, weights: Path) -> list[str]:
        return [
            *(sys.executable, str(ROOT / "run.py"), f"experiment=shapes_{self.task}", f"ckpt={weights}"),
            *(f"seed={self.seed}", f"data.blank={str(self.blank).lower()}", f"hydra.run.dir={self.folder}"),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    checkpoint, out = options.checkpoint.resolve(), options.out.resolve()
    if not checkpoint.is_file():
        parser.error(f"{checkpoint}: there is no checkpoint; `python run.py` makes one")

    def run(job: Run) -> None:
        if job.metrics.exists() and TASKS[job.task].metrics[0] in json.loads(job.metrics.read_text()):
            return
        trained = TASKS[job.task].model
        weights = (
            checkpoint if trained is None else _folder(out, trained, job.seed, job.blank) / "checkpoints/last.ckpt"
        )
        job.folder.mkdir(parents=True, exist_ok=True)
        print(f"{job.task} seed {job.seed}{' blank' * job.blank}", flush=True)
        with open(job.folder / "log.txt", "w") as log:
            code = subprocess.run(
                job.command(weights), stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
            ).returncode
        if code:
            raise RuntimeError(f"{job.task} seed {job.seed}: exit status {code}, see {job.folder / 'log.txt'}")

    jobs = [
        Run(task, seed, blank, _folder(out, task, seed, blank))
        for task in options.tasks
        for seed in options.seeds
        for blank in (False, True)
    ]
    with ThreadPoolExecutor(options.jobs) as pool:  # those that train before those that only test
        for trains in (True, False):
            list(pool.map(run, [job for job in jobs if (TASKS[job.task].model is None) == trains]))

    rows = [row for task in options.tasks for row in table(task, [job for job in jobs if job.task == task])]
    for row in rows:
        print(
            f"{row['name']:28} {row['value']:6.1f} ± {row['error']:.1f}   blank {row['peer_value']:6.1f} ± {row['peer_error']:.1f}   "
            f"chance {row['chance'] if row['chance'] is not None else '-'}"
        )
    if options.json:
        head = {
            "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "date": date.today().isoformat(),
        }
        options.json.write_text(json.dumps({"head": head, "rows": rows}, indent=2) + "\n")


def _folder(out: Path, task: str, seed: int, blank: bool) -> Path:
    return out / f"{task}_{'blank' if blank else 'seeing'}_{seed}"


def table(task: str, jobs: list[Run]) -> list[dict]:
    """A row for each metric: mean and standard error over seeds, seeing and blank."""
    measured = {job: json.loads(job.metrics.read_text()) for job in jobs}
    rows = []
    for metric in TASKS[task].metrics:
        seeing = [values[metric] for job, values in measured.items() if not job.blank]
        blank = [values[metric] for job, values in measured.items() if job.blank]
        chance = TASKS[task].chance
        value, peer = statistics.fmean(seeing), statistics.fmean(blank)
        rows.append(
            {
                "name": f"{task} {metric.rsplit('/', 1)[-1]}",
                "value": value,
                "error": _error(seeing),
                "unit": "percent",
                "peer": "the same recipe, trained and tested on blank pictures",
                "peer_value": peer,
                "peer_error": _error(blank),
                "ratio": value / peer if peer else None,
                "chance": float(chance) if chance.isdigit() else next(iter(measured.values())).get(chance),
                "seeds": len(seeing),
            }
        )
    return rows


def _error(values: list[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


if __name__ == "__main__":
    main()

"""What CapFilt gains on the embedded world's web, half of which is noise: three seeds, each a whole pipeline of its own.

    python -m benchmarks.capfilt_gain [--seeds 0 1 2] [--out FOLDER] [--steps 900] [--jobs 2] [--json FILE]

For each seed `python run.py pipeline=capfilt` is run: a model trained on the unfiltered web, its captioner and its filter, what they
make of the web, and a new model trained on that. Then once more with `pipeline.control=true`: the control of Table 12, as many texts
of the web, not cleaned. The three models of a seed are trained for the same number of steps from the same random weights, and are
compared seed by seed on held-out scenes: retrieval and captions, also of reserved combinations. --steps of pre-training are fewer
than the pipeline's own, so that nine of them and all that lies between take less than an hour on two cores.
Two pipelines side by side, a thread each, are the best use of two cores. What is finished in FOLDER is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import report
from blip.capfilt.steps import override

ROOT = Path(__file__).resolve().parents[1]
METRICS = {
    "retrieval: text by picture, R@1": "retrieval/i2t_r1",
    "retrieval: picture by text, R@1": "retrieval/t2i_r1",
    "captions: attributes, F1": "caption/attributes",
}
SETS = {"held out": "", "reserved combinations": "_reserved"}
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # of Student's distribution, by degrees of freedom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/capfilt_gain"))
    parser.add_argument("--steps", type=int, default=900, help="of each pre-training (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=2, help="pipelines side by side, a thread each (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    out = options.out.resolve()
    data = "the embedded world: 3,000 clean scenes, a web of 30,000 pairs, half of them noise"
    head = report.begin(f"{data}; {options.steps} steps of 64 a model, seeds {options.seeds}, a thread each")

    def run(seed: int, control: bool) -> None:
        if control:  # it needs what the pipeline of its seed made
            cleaned[seed].result()
        if not models(out, seed, control):
            pipeline(out, seed, control, options.steps)

    with ThreadPoolExecutor(options.jobs) as pool:
        cleaned = {seed: pool.submit(run, seed, False) for seed in options.seeds}
        for one in [pool.submit(run, seed, True) for seed in options.seeds]:
            one.result()

    found = {seed: measured(out, seed) for seed in options.seeds}
    rows = table(found)
    report.end(head, rows, options.json)


def pipeline(out: Path, seed: int, control: bool, steps: int) -> None:
    """One run of the pipeline in the folder of a seed; leaves its summary there under a name of its own, when all is done."""
    folder = out / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "run.py"), "pipeline=capfilt", f"seed={seed}", f"hydra.run.dir={folder}"]
    length = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]
    command += [
        f"pipeline.control={str(control).lower()}",
        override("pipeline.overrides", {"pretrain": length, "repretrain": length}),
    ]
    print(f"seed {seed}{', control' * control}", flush=True)
    name = "control" if control else "capfilt"
    with open(folder / f"{name}.txt", "a") as log:
        code = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        ).returncode
    if code:
        raise RuntimeError(f"seed {seed}: exit status {code}, see {folder / f'{name}.txt'}")
    (folder / "summary.json").replace(folder / f"{name}.json")


def models(out: Path, seed: int, control: bool) -> dict[str, Path]:
    """Stage -> folder of the finished run; empty while it is not."""
    summary = out / f"seed_{seed}" / ("control.json" if control else "capfilt.json")
    return {row["stage"]: Path(row["folder"]) for row in json.loads(summary.read_text())} if summary.exists() else {}


def measured(out: Path, seed: int) -> dict[str, dict[str, float]]:
    """{"capfilt" | "unfiltered" | "control": metrics} of one seed."""
    cleaned, control = models(out, seed, False), models(out, seed, True)
    folders = {"capfilt": cleaned["repretrain"], "unfiltered": cleaned["pretrain"], "control": control["repretrain"]}
    return {name: json.loads((folder / "metrics.json").read_text()) for name, folder in folders.items()}


def table(found: dict[int, dict[str, dict[str, float]]]) -> list[dict]:
    """A row for each metric, set and peer: both means, their difference seed by seed and its 95 % interval."""
    rows = []
    for where, suffix in SETS.items():
        for what, metric in METRICS.items():
            group, name = metric.split("/")
            key = f"test/{group}{suffix}/{name}"
            for peer in ("unfiltered", "control"):
                ours = [runs["capfilt"][key] for runs in found.values()]
                theirs = [runs[peer][key] for runs in found.values()]
                gains = [a - b for a, b in zip(ours, theirs, strict=True)]
                gain, half = statistics.fmean(gains), interval(gains)
                row = report.row(f"{what}, {where}", statistics.fmean(ours), "%", peer, statistics.fmean(theirs))
                rows.append(row | {"gain": round(gain, 2), "interval": [round(gain - half, 2), round(gain + half, 2)]})
                print(
                    f"{row['name']}: {row['value']:.1f} against {row['peer_value']:.1f} ({peer}), gain {gain:+.1f} ± {half:.1f}"
                )
    return rows


def interval(differences: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean of few values, by Student's distribution."""
    if len(differences) < 2:
        return float("nan")
    return T95.get(len(differences) - 1, 2.0) * statistics.stdev(differences) / len(differences) ** 0.5


if __name__ == "__main__":
    main()

"""What CapFilt gains on the embedded world's web, half of which is noise, over three seeds.

    python -m benchmarks.capfilt_gain [--out FOLDER] [--json FILE]

Runs `python run.py pipeline=tables 'pipeline.only=[Table 12]'`: a model on the unfiltered web, one on the texts that CapFilt kept and
wrote, and the control of Table 12, on as many texts of the web, not cleaned; each for the same number of steps from the same random
weights. They are compared seed by seed on held-out scenes: retrieval and captions, also of reserved combinations. What is finished in
FOLDER is not run again; by default it is that of `pipeline=tables`, whose rows these are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "TR": "held out: text by picture, R@1",
    "IR": "held out: picture by text, R@1",
    "CIDEr": "held out: captions, CIDEr",
    "TR zs": "reserved combinations: text by picture, R@1",
    "IR zs": "reserved combinations: picture by text, R@1",
    "SPICE zs": "reserved combinations: captions, F1 of attributes",
}
PEERS = {"web": "unfiltered web", "control": "as many texts, not cleaned"}
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # of Student's distribution, by degrees of freedom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "tables")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    out = options.out.resolve()
    head = report.begin("the embedded world: 3,000 clean scenes, a web of 30,000 pairs, half of them noise")
    command = [sys.executable, str(ROOT / "run.py"), "pipeline=tables", f"hydra.run.dir={out}"]
    subprocess.run([*command, "pipeline.only=[Table 12]"], check=True)
    rows = json.loads((out / "tables.json").read_text())["rows"]
    report.end(head, compared(rows), options.json)


def compared(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each column and peer: both means, their difference seed by seed and its 95 % interval."""
    found = []
    for column, name in NAMES.items():
        ours, unit = rows["capfilt"]["cells"][column], "" if column == "CIDEr" else "%"
        for peer, label in PEERS.items():
            theirs = rows[peer]["cells"][column]
            gains = [ours["seeds"][seed] - theirs["seeds"][seed] for seed in ours["seeds"]]
            gain, half = statistics.fmean(gains), interval(gains)
            print(f"{name}: {ours['mean']:.1f}, {label} {theirs['mean']:.1f}, gain {gain:+.1f} ± {half:.1f}")
            row = report.row(name, ours["mean"], unit, label, theirs["mean"])
            found.append(row | {"gain": round(gain, 2), "interval": [round(gain - half, 2), round(gain + half, 2)]})
    return found


def interval(differences: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean of few values, by Student's distribution."""
    return T95.get(len(differences) - 1, 2.0) * statistics.stdev(differences) / len(differences) ** 0.5


if __name__ == "__main__":
    main()

"""The paper's comparisons of CapFilt in miniature (Tables 1, 2, 3, 4, 12, 13), on the embedded world and over several seeds.

What `pipeline=tables` runs. conf/pipeline/tables.yaml says all of it: the steps that make captioners, filters and records, once for
all seeds; the rows, each a pre-training for every seed, shared by all tables that name it; the tables, with the paper's figures.
Rows are steps (steps.py): what is finished is kept, and the same command goes on.

Two rows are compared seed by seed. An order is claimed where the mean of their differences is more than two standard errors from
zero, else it is undecided. Each is held against the paper's. Leaves tables.json and tables.md in its folder.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from omegaconf import OmegaConf

from blip.capfilt.keys import Step, composed, override
from blip.capfilt.pipeline import PASSES, for_stage, said_to_all, shards_of
from blip.capfilt.steps import COMMAND, Steps
from blip.datamodules.views import SYNTHETIC, View, decide
from blip.files import write_text

HOLDS, REVERSED, UNDECIDED, EQUAL = "as in the paper", "reversed", "undecided", "equal in the paper"
STANDARD_ERRORS = 2.0  # beyond which an order is claimed


@dataclass(frozen=True)
class Job:
    """A step and what must be finished before it.

    uses: key of the config -> name of the job whose weights (of a training) or folder (of a pass) stand there
    view: of a row that reads records, which of their texts are kept
    """

    name: str
    stage: str
    overrides: tuple[str, ...] = ()
    uses: Mapping[str, str] = field(default_factory=dict)
    view: Mapping[str, Any] | None = None

    def step(self, folders: Mapping[str, Path], for_all: Sequence[str], shards: Sequence[str]) -> Step:
        """for_all: overrides that the command line says to every step; shards: of the web, for passes over it."""
        used: dict[str, Any] = {}
        for key, name in self.uses.items():
            weights = folders[name] / "checkpoints" / "last.ckpt"
            used[key] = weights if key == "ckpt" or key.endswith("checkpoint") else folders[name]
        if "stage.synthetic" in used:
            used["stage.synthetic"] = [used["stage.synthetic"]]
        overrides = (f"stage={self.stage}", *for_stage(self.stage, for_all), *self.overrides)
        if self.stage in PASSES:
            overrides += (override("stage.shards", list(shards)),)
            return Step(self.stage, self.name, overrides, used, 1, "records", ("manifest.json",))
        return Step(self.stage, self.name, overrides, used)


class Tables:
    """Trains the rows of the tables and compares them; its options stand in conf/pipeline/tables.yaml.

    root: working directory of the steps; seeds: of every row; side_by_side: so many steps run at once, with a share of the cores each
    training: overrides of every row; web: position of the noisy source among those of the rows
    view: which texts of records are kept, but for what a row says
    steps, rows: name -> {stage, overrides, uses, view} as in `Job`; a row that uses a row uses that of its own seed
    tables: name -> {title, rows: {row -> {label, paper: a figure for each column, noise: the paper's noise ratio}}}; only: names of
    those to make, None makes all
    columns: name -> metric; launcher, resources: see `Steps`
    """

    def __init__(
        self,
        root: str,
        seeds: Sequence[int],
        side_by_side: int,
        training: Sequence[str],
        web: int,
        view: Mapping[str, Any],
        steps: Mapping[str, Mapping[str, Any]],
        rows: Mapping[str, Mapping[str, Any]],
        tables: Mapping[str, Mapping[str, Any]],
        only: Sequence[str] | None,
        columns: Mapping[str, str],
        launcher: str,
        resources: Mapping[str, Mapping[str, Any]],
        command: Sequence[str] = COMMAND,
    ) -> None:
        if unknown := sorted(set(only or ()) - set(tables)):
            raise ValueError(f"pipeline.only: {', '.join(unknown)} is none of {', '.join(tables)}")
        tables = {name: table for name, table in tables.items() if name in (only or tables)}
        named = {row for table in tables.values() for row in table["rows"]}
        if unknown := sorted(named - set(rows)):
            raise ValueError(f"pipeline.tables: {', '.join(unknown)} is none of pipeline.rows: {', '.join(rows)}")
        if both := sorted(set(steps) & set(rows)):
            raise ValueError(f"pipeline: {', '.join(both)} is both a step and a row; each needs a name of its own")
        if len(set(seeds)) < 2:
            raise ValueError(f"pipeline.seeds={list(seeds)}: a spread needs at least two")
        for name, table in tables.items():
            for row, said in table["rows"].items():
                if len(said["paper"]) != len(columns):
                    raise ValueError(f"{name}, {row}: {len(said['paper'])} figures for {len(columns)} columns")
        self.root, self.seeds, self.side_by_side, self.web = Path(root), list(seeds), side_by_side, web
        self.tables, self.columns, self.rows = tables, dict(columns), [row for row in rows if row in named]
        self.launcher, self.resources, self.command = launcher, resources, command
        trained = [row_job(row, rows, seed, training, web, view) for seed in self.seeds for row in self.rows]
        made = {name: Job(name, **_lists(said)) for name, said in steps.items()}
        needed = {name for job in trained for name in job.uses.values()}
        while more := {n for name in needed & set(made) for n in made[name].uses.values()} - needed:
            needed |= more
        self.jobs = [job for name, job in made.items() if name in needed] + trained

    def run(self, folder: Path) -> None:
        """Runs what is not finished, then writes tables.json and tables.md in `folder`."""
        steps = Steps(folder, self.root, self.launcher, self.resources, self.command)
        self.work(steps, said_to_all(folder))
        found = {row: {seed: measured(steps.done[f"{row}_{seed}"]) for seed in self.seeds} for row in self.rows}
        noise = {
            job.name.removesuffix(f"_{self.seeds[0]}"): noise_ratio(steps.done[name], job.view)
            for job in self.jobs
            if job.view is not None and job.name.endswith(f"_{self.seeds[0]}")
            for name in job.uses.values()
            if (steps.done[name] / "records").is_dir()
        }
        result = compared(self.tables, self.columns, found, noise)
        write_text(folder / "tables.json", json.dumps(result, indent=1) + "\n")
        write_text(folder / "tables.md", "\n".join(told(result)) + "\n")
        print("\n".join(told(result)), flush=True)

    def work(self, steps: Steps, for_all: Sequence[str] = ()) -> None:
        """All jobs, as many side by side as said, each after those that it uses. for_all: overrides of every step."""
        left = list(self.jobs)
        while left:
            ready = [job for job in left if all(name in steps.done for name in job.uses.values())][: self.side_by_side]
            if not ready:
                raise ValueError(
                    f"pipeline: {', '.join(job.name for job in left)} use what is none of the steps and rows"
                )
            shards = self.shards(for_all) if any(job.stage in PASSES for job in ready) else []
            steps.run(*(job.step(steps.done, for_all, shards) for job in ready))
            left = [job for job in left if job not in ready]

    def shards(self, for_all: Sequence[str]) -> list[str]:
        """The web that the rows read, which is what passes go over."""
        source = composed(["stage=repretrain", *for_all], self.root).data.sources[self.web]
        return shards_of(OmegaConf.to_container(source, resolve=True))  # type: ignore[arg-type]


def row_job(
    row: str,
    rows: Mapping[str, Mapping[str, Any]],
    seed: int,
    training: Sequence[str],
    web: int,
    view: Mapping[str, Any],
) -> Job:
    """The pre-training of a row with a seed. ValueError where its view is none."""
    said = _lists(rows[row])
    source = f"data.sources.{web}.view"
    uses = {
        (f"{source}.records" if key == "records" else key): f"{name}_{seed}" if name in rows else name
        for key, name in said.get("uses", {}).items()
    }
    overrides = [*training, *said.get("overrides", ()), f"seed={seed}", f"name={row}_{seed}"]
    if "records" not in said.get("uses", {}):
        return Job(f"{row}_{seed}", said["stage"], tuple(overrides), uses)
    chosen = {**view, **said.get("view", {})}
    View.of({**chosen, "records": row})  # a mistake is told before hours of training
    return Job(f"{row}_{seed}", said["stage"], (*overrides, override(source, chosen)), uses, chosen)


def _lists(said: Mapping[str, Any]) -> dict[str, Any]:
    return {**said, **({"overrides": tuple(said["overrides"])} if "overrides" in said else {})}


# What was measured ------------------------------------------------------------------------------------------------


def measured(folder: Path) -> dict[str, float]:
    """Metrics of a finished row, and `seconds`, all it took."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return metrics | {"seconds": json.loads((folder / "finished.json").read_text())["seconds"]}


def noise_ratio(records: Path, view: Mapping[str, Any]) -> float | None:
    """Percent of the synthetic texts that a filter rejects (the paper's noise ratio); None where none is judged."""
    chosen = View.of({**view, "records": records, "sources": [SYNTHETIC], "control": False})
    if not chosen.scores:
        return None
    texts = kept = 0
    for path in sorted((records / "records").rglob("*.parquet")):
        table = pq.read_table(path)
        texts += sum(source == SYNTHETIC for source in table["source"].to_pylist())
        kept += int(decide(table, chosen).sum())
    return 100 * (1 - kept / texts) if texts else None


@dataclass(frozen=True)
class Order:
    """Of two rows in one column: mean and standard error of `first` minus `second` over seeds, and how it stands to the paper's."""

    column: str
    first: str
    second: str
    difference: float
    error: float
    paper: float
    verdict: str


def order(column: str, first: str, second: str, ours: Iterable[tuple[float, float]], paper: float) -> Order:
    """Compares the pairs (first, second) of each seed. paper: the paper's difference."""
    differences = [a - b for a, b in ours]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    if abs(mean) <= STANDARD_ERRORS * error or mean == 0:
        verdict = UNDECIDED
    elif abs(paper) < 1e-9:
        verdict = EQUAL
    else:
        verdict = HOLDS if (mean > 0) == (paper > 0) else REVERSED
    return Order(column, first, second, mean, error, round(paper, 2), verdict)


def compared(
    tables: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, str],
    found: Mapping[str, Mapping[int, Mapping[str, float]]],
    noise: Mapping[str, float | None],
) -> dict[str, Any]:
    """All that tables.json says. found: row -> seed -> metrics; noise: row -> its noise ratio in percent."""
    result: dict[str, Any] = {"columns": dict(columns), "rows": {}, "tables": {}}
    for row, seeds in found.items():
        cells = {}
        for column, metric in columns.items():
            values = [metrics[metric] for metrics in seeds.values()]
            error = statistics.stdev(values) / len(values) ** 0.5
            cells[column] = {
                "mean": statistics.fmean(values),
                "error": error,
                "seeds": dict(zip(seeds, values, strict=True)),
            }
        seconds = max(metrics["seconds"] for metrics in seeds.values())
        result["rows"][row] = {"cells": cells, "noise": noise.get(row), "seconds": seconds}
    for name, table in tables.items():
        papers = {row: dict(zip(columns, said["paper"], strict=True)) for row, said in table["rows"].items()}
        orders = [
            order(
                column,
                *(second, first),  # the later row of a table is what the paper proposes
                [(found[second][seed][metric], found[first][seed][metric]) for seed in found[first]],
                papers[second][column] - papers[first][column],
            )
            for first, second in combinations(table["rows"], 2)
            for column, metric in columns.items()
        ]
        result["tables"][name] = {
            "title": table["title"],
            "rows": {row: dict(said) for row, said in table["rows"].items()},
            "orders": [vars(one) for one in orders],
        }
    return result


# Telling ----------------------------------------------------------------------------------------------------------


def told(result: Mapping[str, Any]) -> list[str]:
    """tables.md, line by line."""
    columns, rows = result["columns"], result["rows"]
    orders = [one for table in result["tables"].values() for one in table["orders"]]
    count = {v: sum(one["verdict"] == v for one in orders) for v in (HOLDS, REVERSED, UNDECIDED, EQUAL)}
    seeds = {len(row["cells"][column]["seeds"]) for row in rows.values() for column in columns}
    longest = max(rows, key=lambda row: rows[row]["seconds"])
    lines = [
        "# The paper's tables in miniature",
        "",
        f"Pre-training on the embedded world, {'/'.join(map(str, sorted(seeds)))} seeds a row, mean ± standard error; nothing is fine-tuned. "
        f"The longest row took {rows[longest]['seconds']:.0f} s ({longest}). Columns, by the paper's names:",
        "",
        *(f"- {column}: `{metric}`" for column, metric in columns.items()),
        "",
        f"Of {len(orders)} orders of two rows in a column {count[HOLDS]} are as in the paper, {count[REVERSED]} reversed, "
        f"{count[UNDECIDED]} undecided (within two standard errors of the differences, seed by seed), and {count[EQUAL]} are "
        "claimed here and equal in the paper.",
    ]
    for name, table in result["tables"].items():
        label = {row: said["label"] for row, said in table["rows"].items()}
        noise = any(said.get("noise") is not None for said in table["rows"].values())
        head = ["", *(["noise ratio"] if noise else []), *columns]
        lines += ["", f"## {name}: {table['title']}", "", _line(head), _line(["---"] * len(head))]
        for row, said in table["rows"].items():
            ours, ratio = rows[row]["cells"], rows[row]["noise"]
            cells = [f"{ours[c]['mean']:.1f} ± {ours[c]['error']:.1f}" for c in columns]
            lines.append(_line([label[row], *([_percent(ratio)] if noise else []), *cells]))
            paper = [f"{value:.1f}" for value in said["paper"]]
            lines.append(_line([f"*{label[row]}, paper*", *([_percent(said.get("noise"))] if noise else []), *paper]))
        lines += ["", _line(["difference", *columns]), _line(["---"] * (len(columns) + 1))]
        for first, second in combinations(table["rows"], 2):
            cells = [
                f"{one['difference']:+.1f} ± {one['error']:.1f} {one['verdict']}"
                for column in columns
                for one in table["orders"]
                if (one["column"], one["first"], one["second"]) == (column, second, first)
            ]
            lines.append(_line([f"{label[second]} over {label[first]}", *cells]))
        lines += ["", *_differs(table, label)]
    return lines


def _differs(table: Mapping[str, Any], label: Mapping[str, str]) -> list[str]:
    """What differs from the paper, in words."""
    against = [one for one in table["orders"] if one["verdict"] == REVERSED]
    if not against:
        return ["No order that is claimed here is the reverse of the paper's."]
    return ["Differs from the paper:"] + [
        f"- {one['column']}: {label[one['first']]} over {label[one['second']]} is {one['difference']:+.1f} ± {one['error']:.1f} here, "
        f"{one['paper']:+.1f} in the paper"
        for one in against
    ]


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.0f} %"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

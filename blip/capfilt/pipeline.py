"""CapFilt (paper, section 3.3): from a small clean set and a large noisy one to a cleaner one and a better model.

    pretrain -> finetune_captioner, finetune_filter (or finetune_shared: Table 4) -> generate -> filter (or generate_filter, both in
    one pass) -> repretrain

What `pipeline=capfilt` runs: the driver, an ordinary process that starts every stage as a step (steps.py) and waits for it. What a
stage trains on, and how long, is said in conf/stage/NAME.yaml; here is what goes from one to the next.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Generator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from blip.capfilt.keys import Step, composed, override
from blip.capfilt.report import write_report
from blip.capfilt.steps import COMMAND, Steps, announce
from blip.datamodules.locations import expand
from blip.datamodules.views import View
from blip.files import write_text

PASSES = ("generate", "filter", "generate_filter")
STAGES = ("pretrain", "finetune_captioner", "finetune_filter", "finetune_shared", *PASSES, "repretrain")
# Of what a command line says: what is the driver's own, and what is also for passes over shards, which train nothing.
FOR_DRIVER = ("pipeline", "name=", "hydra.", "hydra/", "stage", "resume")
FOR_PASSES = ("seed=", "paths.")
SHOWN = ("/i2t_r1", "/t2i_r1", "/cider", "/attributes")  # of the metrics of pre-trained models


class CapFilt:
    """The driver of CapFilt's stages; its options stand in conf/pipeline/capfilt.yaml.

    root: working directory of the steps; weights: a model in place of the first stage; captioner, filter: in place of a fine-tuned
    stages: those to run (default: all), the others must be finished; rounds: how often the web is captioned and filtered
    shared: one model is captioner and filter; fused: one pass generates and filters
    control: re-train on as many texts, not cleaned; continuing: re-train the first model
    web: the source of `repretrain` that is captioned and filtered; view: which of its texts are kept
    launcher, resources: see `Steps`; jobs: pass -> how many side by side; overrides: stage -> overrides of it alone
    """

    def __init__(
        self,
        root: str,
        stages: Sequence[str] | None,
        rounds: int,
        weights: str | None,
        captioner: str | None,
        filter: str | None,
        shared: bool,
        fused: bool,
        control: bool,
        continuing: bool,
        web: str,
        view: Mapping[str, Any],
        launcher: str,
        jobs: Mapping[str, int],
        resources: Mapping[str, Mapping[str, Any]],
        overrides: Mapping[str, Sequence[str]],
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.tune: dict[str, set[str]] = {"finetune_captioner": {"captioner"}, "finetune_filter": {"filter"}}
        if shared:
            self.tune = {"finetune_shared": {"captioner", "filter"}}
        self.passes = ("generate_filter",) if fused else ("generate", "filter")
        known = ["pretrain", *self.tune, *self.passes, "repretrain"]
        allowed = {"stages": (stages or (), known), "overrides": (overrides, STAGES), "jobs": (jobs, PASSES)}
        for what, (names, there_are) in (allowed | {"resources": (resources, ("all", *STAGES))}).items():
            if unknown := sorted(set(names) - set(there_are)):
                raise ValueError(f"pipeline.{what}: {', '.join(unknown)} is none of {', '.join(there_are)}")
        try:
            View.of({**view, "records": root})  # a rule that cannot be is told before anything is trained
        except ValueError as error:
            raise ValueError(f"pipeline.view: {error}") from None
        if rounds < 1:
            raise ValueError(f"pipeline.rounds={rounds}: at least 1")
        self.root, self.rounds, self.weights = Path(root), rounds, weights
        self.given = {role: path for role, path in (("captioner", captioner), ("filter", filter)) if path}
        needless = {"pretrain"} if weights else set()
        needless |= {name for name, roles in self.tune.items() if roles.issubset(self.given)}
        self.stages = [stage for stage in known if stage in (stages or known) and stage not in needless]
        self.control, self.continuing, self.web, self.view = control, continuing, web, dict(view)
        self.launcher, self.jobs, self.resources, self.command = launcher, jobs, resources, command
        self.overrides = {stage: tuple(said) for stage, said in overrides.items()}
        self.for_all: tuple[str, ...] = ()

    def run(self, folder: Path) -> None:
        """Runs what is not finished; leaves summary.json and the report in `folder`."""
        self.for_all = said_to_all(folder)
        steps = Steps(folder, self.root, self.launcher, self.resources, self.command)
        try:
            with FileLock(folder / "driver.lock", timeout=0):
                self.go(steps)
        except Timeout:
            raise ValueError(f"{folder}: another driver is at work there; wait for it, or end it first") from None
        except ValueError as error:
            raise ValueError(f"{error}\n  When that is mended, go on with: python run.py resume={folder}") from None
        except (SystemExit, KeyboardInterrupt) as stopped:
            announce(f"stopped; what is done until then is kept; go on with: python run.py resume={folder}")
            sys.exit(stopped.code if isinstance(stopped, SystemExit) else 130)

    def go(self, steps: Steps) -> None:
        """Runs group after group until no stage that was asked for is left."""
        rounds = {stage: 1 if stage == "pretrain" else self.rounds for stage in self.stages}
        plan, asked = self.plan(), list[Step]()
        with contextlib.suppress(StopIteration):
            group = next(plan)
            while True:
                folders = steps.run(*group, only=self.stages)
                asked += group
                for step in group:
                    if step.stage in rounds:
                        rounds[step.stage] -= 1
                if not any(rounds.values()):
                    break
                group = plan.send(folders)
        self.conclude([(step, steps.done[step.name]) for step in asked], steps.folder)

    def conclude(self, done: Sequence[tuple[Step, Path]], out: Path) -> None:
        """Writes a report for each filter step and the summary, and prints the latter."""
        rows = [row(step, folder) for step, folder in done]
        for at, (step, folder) in enumerate(done):
            if step.stage == self.passes[-1]:
                report = out / f"report{step.name.removeprefix(step.stage)}.html"
                view = View(records=str(folder), **self.view)
                numbers = write_report(report, view, title=f"CapFilt: {out.name}", costs=rows[:at])
                rows[at] |= {"kept": numbers["all/kept"], "report": str(report)}
        write_text(out / "summary.json", json.dumps(rows, indent=1) + "\n")
        announce(*table(rows), *gains(rows), *(about["report"] for about in rows if "report" in about))

    def plan(self) -> Generator[list[Step], list[Path], None]:
        """The steps in their order, those together that may run side by side; gets the folders of each group back."""
        pretrained = Path(self.weights) if self.weights else weights_in((yield [self.training("pretrain", 1)])[0])
        model = pretrained
        for number in range(1, self.rounds + 1):
            models = {role: Path(path) for role, path in self.given.items()}
            tune = {name: roles for name, roles in self.tune.items() if not roles.issubset(models)}
            if tune:
                folders = yield [self.training(name, number, {"ckpt": model}) for name in tune]
                for roles, folder in zip(tune.values(), folders, strict=True):
                    models = dict.fromkeys(roles, weights_in(folder)) | models
            captioner = {"stage.captioners.captioner.checkpoint": models["captioner"]}
            judge: dict[str, Any] = {"stage.scorers.filter.checkpoint": models["filter"]}
            if self.passes == ("generate_filter",):
                (records,) = yield [self.over_shards("generate_filter", number, captioner | judge)]
            else:
                (synthetic,) = yield [self.over_shards("generate", number, captioner)]
                (records,) = yield [self.over_shards("filter", number, {"stage.synthetic": [synthetic]} | judge)]
            kept = {f"data.sources.{self.web_source[0]}.view.records": records}
            again = self.training("repretrain", number, kept | ({"ckpt": pretrained} if self.continuing else {}))
            model = weights_in((yield [again])[0])

    def training(self, stage: str, number: int, uses: Mapping[str, Any] | None = None) -> Step:
        view: list[str] = []
        if stage == "repretrain":
            kept = {**self.view, "control": True} if self.control else self.view
            view = [override(f"data.sources.{self.web_source[0]}.view", kept)]
        return Step(stage, named(stage, number), (*self.said(stage), *view), uses or {})

    def over_shards(self, stage: str, number: int, uses: Mapping[str, Any]) -> Step:
        """A pass over the shards of the web."""
        shards = override("stage.shards", shards_of(self.web_source[1]))
        workers = max(1, self.jobs.get(stage, 1))
        return Step(
            stage, named(stage, number), (*self.said(stage), shards), uses, workers, "records", ("manifest.json",)
        )

    def said(self, stage: str) -> tuple[str, ...]:
        """Overrides of a stage: what it is, what the command line says to all, what the pipeline's config says to it alone.

        An experiment that is said to a stage takes the place of conf/stage.
        """
        own = tuple(self.overrides.get(stage, ()))
        what = () if any(text.startswith("experiment=") for text in own) else (f"stage={stage}",)
        return (*what, *for_stage(stage, self.for_all), *own)

    @cached_property
    def web_source(self) -> tuple[int, Mapping[str, Any]]:
        """(position, source) of the web among what `repretrain` reads. ValueError where there is none of that name."""
        cfg = composed(self.said("repretrain"), self.root)
        sources: Any = OmegaConf.to_container(cfg.data.sources, resolve=True)
        for at, source in enumerate(sources):
            if source["name"] == self.web:
                return at, source
        names = ", ".join(source["name"] for source in sources)
        raise ValueError(f"pipeline.web={self.web}: the sources of repretrain are {names}")


def said_to_all(folder: Path) -> tuple[str, ...]:
    """What the command line of a driver says to all of its steps."""
    said = folder / ".hydra" / "overrides.yaml"
    if not said.exists():
        return ()
    return tuple(text for text in map(str, OmegaConf.load(said)) if not text.lstrip("+~").startswith(FOR_DRIVER))


def for_stage(stage: str, said: Sequence[str]) -> tuple[str, ...]:
    """Of what is said to all, what is for a stage: a pass over shards trains nothing."""
    return tuple(text for text in said if stage not in PASSES or text.lstrip("+").startswith(FOR_PASSES))


def named(stage: str, number: int) -> str:
    """What a stage is called in a round; the first has no number."""
    return stage if number == 1 else f"{stage}_{number}"


def shards_of(source: Mapping[str, Any]) -> list[str]:
    """Patterns of the shards of a source; of one that names them in phases alone, the shards themselves, each once."""
    if source.get("shards"):
        return [source["shards"]] if isinstance(source["shards"], str) else list(source["shards"])
    said = [phase["shards"] for phase in source["phases"]]
    patterns = [pattern for one in said for pattern in ([one] if isinstance(one, str) else one)]
    return list(dict.fromkeys(shard for pattern in patterns for shard in expand(pattern)))


def weights_in(folder: Path) -> Path:
    """The weights that a training step leaves to others: the best, where it looked for them, else the last."""
    best = folder / "checkpoints" / "best.ckpt"
    return best if best.exists() else folder / "checkpoints" / "last.ckpt"


def row(step: Step, folder: Path) -> dict[str, Any]:
    """What the summary says of a finished step: seconds; of a pass pictures, texts and broken pictures; of a training step pairs seen,
    metrics and weights.
    """
    about = {"stage": step.name, "seconds": json.loads((folder / "finished.json").read_text())["seconds"]}
    if step.workers:
        manifest = json.loads((folder / "manifest.json").read_text())
        about |= {"pictures": manifest["pictures"], "broken": sum(manifest["broken"].values())}
        about |= {f"texts/{source}": count for source, count in manifest["rows"].items()}
    else:
        config = json.loads((folder / "step.json").read_text())["config"]
        keys = ("max_steps", "accumulate_grad_batches", "num_nodes", "devices")
        counts = [config.get(f"trainer.{key}") for key in keys]
        if all(isinstance(count, int) and count > 0 for count in counts):
            about["pairs"] = math.prod(counts) * config["data.batch_size"]
        about["metrics"] = json.loads((folder / "metrics.json").read_text())
        about["weights"] = str(weights_in(folder))
    return about | {"folder": str(folder)}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The summary in lines of text."""
    lines = [f"{'stage':>18} {'seconds':>9} {'in':>18} {'out':>16}"]
    for about in rows:
        texts = sum(count for key, count in about.items() if key.startswith("texts/"))
        came, left = (f"{about['pairs']:,} pairs" if "pairs" in about else ""), ""
        if "kept" in about:
            came, left = f"{texts:,} texts", f"{about['kept']:,} kept"
        elif "pictures" in about:
            came, left = f"{about['pictures']:,} pictures", f"{texts:,} texts"
        lines.append(f"{about['stage']:>18} {about['seconds']:9,.0f} {came:>18} {left:>16}")
    return lines


def gains(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the pre-trained models are worth, a column each, and where the last one lies, in lines of text."""
    models = [about for about in rows if "weights" in about and not about["stage"].startswith("finetune")]
    if not models:
        return []
    shared = set.intersection(*({*about["metrics"]} for about in models))
    shown = [
        name for name in models[0]["metrics"] if name in shared and name.startswith("test/") and name.endswith(SHOWN)
    ]
    head = [f"{'':40}" + "".join(f"{about['stage']:>16}" for about in models)] if shown else []
    lines = [f"{name:>40}" + "".join(f"{about['metrics'][name]:16.2f}" for about in models) for name in shown]
    return [*head, *lines, f"{models[-1]['stage']}: {models[-1]['weights']}"]

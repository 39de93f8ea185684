"""CapFilt's driver: which steps there are, what goes from one to the next, and the whole of it at the smallest size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from blip.capfilt.keys import Step, composed
from blip.capfilt.pipeline import CapFilt
from blip.capfilt.steps import Steps
from blip.main import record, refuse_changes, reopen
from blip.overrides import CONF
from tests.capfilt.stage_standin import until

ROOT = CONF.parent
OPTIONS: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(CONF / "pipeline" / "capfilt.yaml").pipeline)  # type: ignore[assignment]


class Noted(Steps):
    """Steps that are only noted; `absent` is not finished."""

    def __init__(self, folder: Path, absent: str = "") -> None:
        super().__init__(folder, ROOT)
        self.groups: list[list[Step]] = []
        self.absent = absent

    def run(self, *steps: Step, only: Any = None) -> list[Path]:
        self.groups.append(list(steps))
        self.done |= {step.name: self.folder / step.name for step in steps}
        return [self.folder / step.name for step in steps]

    @property
    def names(self) -> list[str]:
        return [" + ".join(step.name for step in group) for group in self.groups]

    def step(self, name: str) -> Step:
        return next(step for group in self.groups for step in group if step.name == name)

    def uses(self, name: str) -> dict[str, str]:
        """key -> what is used, seen from the pipeline's folder."""

        def seen(what: Any) -> str:
            return str(what.relative_to(self.folder)) if isinstance(what, Path) else " ".join(map(seen, what))

        return {key: seen(what) for key, what in self.step(name).uses.items()}


def capfilt(**options: Any) -> CapFilt:
    made = CapFilt(
        **{key: value for key, value in OPTIONS.items() if key != "_target_"} | {"root": str(ROOT)} | options
    )
    made.__dict__["web_source"] = (1, {"name": "web", "shards": "/web/*.tar"})
    return made


def planned(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Noted:
    """The steps of a pipeline whose steps all end well."""
    monkeypatch.setattr(CapFilt, "conclude", lambda *_: None)
    steps = Noted(folder)
    capfilt(**options).go(steps)
    return steps


# Which steps, with what -------------------------------------------------------------------------------------------


def test_the_stages_follow_each_other_as_in_the_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = planned(tmp_path, monkeypatch)
    last = "checkpoints/last.ckpt"
    assert steps.names == ["pretrain", "finetune_captioner + finetune_filter", "generate", "filter", "repretrain"]
    assert steps.uses("pretrain") == {}
    assert steps.uses("finetune_captioner") == steps.uses("finetune_filter") == {"ckpt": f"pretrain/{last}"}
    assert steps.uses("generate") == {"stage.captioners.captioner.checkpoint": f"finetune_captioner/{last}"}
    assert steps.uses("filter") == {
        "stage.synthetic": "generate",
        "stage.scorers.filter.checkpoint": f"finetune_filter/{last}",
    }
    assert steps.uses("repretrain") == {"data.sources.1.view.records": "filter"}  # a new model
    assert "++stage.shards=['/web/*.tar']" in steps.step("generate").overrides
    assert "++data.sources.1.view={threshold:" in steps.step("repretrain").overrides[-1]


def test_a_second_round_starts_from_the_model_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = planned(tmp_path, monkeypatch, rounds=2)
    assert steps.names[5:] == ["finetune_captioner_2 + finetune_filter_2", "generate_2", "filter_2", "repretrain_2"]
    assert steps.uses("finetune_filter_2") == {"ckpt": "repretrain/checkpoints/last.ckpt"}
    assert steps.uses("filter_2")["stage.synthetic"] == "generate_2"
    assert steps.uses("repretrain_2") == {"data.sources.1.view.records": "filter_2"}


def test_one_model_may_be_captioner_and_filter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = planned(tmp_path, monkeypatch, shared=True)
    assert steps.names == ["pretrain", "finetune_shared", "generate", "filter", "repretrain"]
    (captioner,) = steps.uses("generate").values()
    assert (
        captioner == steps.uses("filter")["stage.scorers.filter.checkpoint"] == "finetune_shared/checkpoints/last.ckpt"
    )


def test_generate_and_filter_may_be_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = planned(tmp_path, monkeypatch, fused=True, rounds=2)
    first = ["pretrain", "finetune_captioner + finetune_filter", "generate_filter", "repretrain"]
    assert steps.names == [*first, "finetune_captioner_2 + finetune_filter_2", "generate_filter_2", "repretrain_2"]
    assert steps.uses("generate_filter") == {
        "stage.captioners.captioner.checkpoint": "finetune_captioner/checkpoints/last.ckpt",
        "stage.scorers.filter.checkpoint": "finetune_filter/checkpoints/last.ckpt",
    }
    assert steps.uses("repretrain_2") == {"data.sources.1.view.records": "generate_filter_2"}


def test_models_that_exist_take_the_place_of_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: str(tmp_path / f"{name}.ckpt") for name in ("weights", "captioner", "filter")}
    assert planned(tmp_path, monkeypatch, **given).names == ["generate", "filter", "repretrain"]
    steps = planned(tmp_path, monkeypatch, weights=given["weights"], filter=given["filter"])
    assert steps.names == ["finetune_captioner", "generate", "filter", "repretrain"]
    assert steps.uses("finetune_captioner") == {"ckpt": "weights.ckpt"}
    assert steps.uses("filter")["stage.scorers.filter.checkpoint"] == "filter.ckpt"


def test_the_best_weights_are_handed_on_where_a_stage_looked_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "finetune_captioner" / "checkpoints").mkdir(parents=True)
    (tmp_path / "finetune_captioner" / "checkpoints" / "best.ckpt").touch()
    steps = planned(tmp_path, monkeypatch)
    assert [Path(path).name for path in steps.uses("generate").values()] == ["best.ckpt"]


def test_the_model_is_trained_on_and_the_control_is_one_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = planned(tmp_path, monkeypatch, continuing=True, control=True, view={"share": 0.5})
    assert steps.uses("repretrain")["ckpt"] == "pretrain/checkpoints/last.ckpt"
    assert steps.step("repretrain").overrides[-1] == "++data.sources.1.view={share:0.5,control:true}"


def test_nothing_is_run_beyond_the_last_stage_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert planned(tmp_path, monkeypatch, stages=["pretrain"]).names == ["pretrain"]
    assert planned(tmp_path, monkeypatch, stages=["generate", "filter"]).names[-1] == "filter"
    assert planned(tmp_path, monkeypatch, stages=["filter"], rounds=2).names[-1] == "filter_2"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"stages": ["fliter"]},
            "pipeline.stages: fliter is none of pretrain, finetune_captioner, finetune_filter, gen",
        ),
        ({"stages": ["finetune_filter"], "shared": True}, "finetune_filter is none of pretrain, finetune_shared"),
        ({"stages": ["filter"], "fused": True}, "filter is none of .* generate_filter, repretrain"),
        ({"overrides": {"captioner": []}}, "pipeline.overrides: captioner is none of"),
        ({"jobs": {"generat": 8}}, "pipeline.jobs: generat is none of generate, filter"),
        ({"resources": {"gnerate": {}}}, "pipeline.resources: gnerate is none of all, pretrain"),
        ({"view": {"threshold": 0.5, "share": 0.5}}, "share"),
        ({"view": {"treshold": 0.5}}, "pipeline.view: .*unknown"),
        ({"rounds": 0}, "pipeline.rounds=0: at least 1"),
    ],
)
def test_mistakes_are_told_before_anything_is_run(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        capfilt(**options)


def test_what_the_command_line_says_goes_to_every_stage_it_concerns(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    said = [
        "pipeline=capfilt",
        "pipeline.rounds=2",
        "name=x",
        "hydra.run.dir=y",
        "seed=3",
        "debug=smoke",
        "trainer=gpu",
    ]
    (tmp_path / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(said))
    pipeline = capfilt(overrides={"generate": ["stage.batch_size=8"], "pretrain": ["experiment=pretrain_14m_vit_b"]})
    pipeline.go = lambda steps: None  # type: ignore[method-assign]
    pipeline.run(tmp_path)
    assert pipeline.said("repretrain") == ("stage=repretrain", "seed=3", "debug=smoke", "trainer=gpu")
    assert pipeline.said("generate") == ("stage=generate", "seed=3", "stage.batch_size=8")
    assert pipeline.said("pretrain") == ("seed=3", "debug=smoke", "trainer=gpu", "experiment=pretrain_14m_vit_b")


def test_an_error_of_a_step_and_a_signal_end_the_driver_with_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(error: BaseException) -> CapFilt:
        def go(steps: Steps) -> None:
            raise error

        pipeline = capfilt()
        pipeline.go = go  # type: ignore[method-assign]
        return pipeline

    with pytest.raises(ValueError, match=rf"^filter failed\n  .* go on with: python run.py resume={tmp_path}$"):
        ends(ValueError("filter failed")).run(tmp_path)
    with pytest.raises(SystemExit) as ended:
        ends(SystemExit(143)).run(tmp_path)
    assert ended.value.code == 143
    assert f"go on with: python run.py resume={tmp_path}" in capsys.readouterr().out


def test_two_drivers_do_not_work_in_one_folder(tmp_path: Path) -> None:
    pipeline, other = capfilt(), capfilt()
    pipeline.go = lambda steps: other.run(tmp_path)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="another driver is at work there"):
        pipeline.run(tmp_path)


# Configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "stage").glob("*.yaml")))
def test_every_stage_is_a_config_by_itself_and_tells_its_command(name: str) -> None:
    cfg = composed([f"stage={name}"], ROOT)
    assert cfg.name == name
    assert f"python run.py stage={name}" in (CONF / "stage" / f"{name}.yaml").read_text()
    trains = not cfg.get("stage")
    assert trains == (name.startswith("finetune") or name in ("pretrain", "repretrain"))
    if trains:
        assert composed([f"stage={name}", "debug=smoke"], ROOT).trainer.max_steps == 12
        assert [source.name for source in cfg.data.sources] == ["human", "web"][: 2 if "pretrain" in name else 1]


@pytest.mark.parametrize("name", ["capfilt", "capfilt_14m"])
def test_every_stage_of_a_pipeline_composes_with_what_the_pipeline_says_to_it(name: str, tmp_path: Path) -> None:
    cfg = composed([f"pipeline={name}"], ROOT)
    options: Any = OmegaConf.to_container(cfg.pipeline, resolve=True)
    options.pop("_target_")
    for things in (1, 2, 3):  # the shards of a source are looked for
        shard = tmp_path / "shapes" / "web" / f"{things}-00000.tar"
        shard.parent.mkdir(parents=True, exist_ok=True)
        shard.touch()
    pipeline = CapFilt(**options)
    pipeline.for_all = (f"paths.data={tmp_path}",)
    plan = pipeline.plan()
    group = next(plan)
    for _ in range(4):
        for step in group:
            of_step = composed([*step.overrides, *(f"++{key}=x" for key in step.uses)], ROOT)
            assert ("stage" in of_step and bool(of_step.stage)) == (step.workers > 0)
        group = plan.send([tmp_path / step.name for step in group])
    (again,) = group
    sources = composed([*again.overrides, "++data.sources.0.index=null"], ROOT).data.sources
    assert [source.name for source in sources if "view" in source] == [pipeline.web]


def test_a_pipeline_s_folder_takes_other_options_but_no_run_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    said = ["pipeline=capfilt", f"paths.data={tmp_path}"]
    (tmp_path / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(said))
    cfg = composed(said, ROOT)
    cfg.name = "capfilt"
    record(cfg, tmp_path)
    reopen(tmp_path, ["pipeline.view.threshold=0.9", "seed=3"])
    assert OmegaConf.load(tmp_path / "config.yaml").pipeline.view.threshold == 0.9
    assert list(OmegaConf.load(tmp_path / ".hydra" / "overrides.yaml")) == [
        *said,
        "pipeline.view.threshold=0.9",
        "seed=3",
    ]
    with pytest.raises(ValueError, match="holds a run with another config"):
        refuse_changes(OmegaConf.load(tmp_path / "config.yaml"), composed(["stage=pretrain"], ROOT), tmp_path)


# The whole --------------------------------------------------------------------------------------------------------


def test_the_whole_pipeline_goes_on_after_kill_9_of_its_driver(tmp_path: Path) -> None:
    small = ["trainer.max_steps=2", "trainer.val_check_interval=2", "callbacks.gallery=null", "callbacks.curves=null"]
    small += [f"paths.data={tmp_path}/data", f"paths.runs={tmp_path}/runs"]
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "pipeline=capfilt",
        "debug=smoke",
        "pipeline.jobs.generate=2",
        *small,
    ]
    folder = tmp_path / "runs" / "smoke"
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    first = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    until(lambda: list(folder.glob("finetune_*/*/step.json")) or first.poll() is not None, 600)
    assert first.poll() is None, first.communicate()[0]
    os.kill(first.pid, signal.SIGKILL)
    told = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr[-3000:]

    assert told.stdout.splitlines()[-1] == str(folder)
    assert "pretrain | finished before" in told.stdout
    summary = {about["stage"]: about for about in json.loads((folder / "summary.json").read_text())}
    assert list(summary) == ["pretrain", "finetune_captioner", "finetune_filter", "generate", "filter", "repretrain"]
    assert summary["generate"]["pictures"] == summary["generate"]["texts/synthetic"] == 30
    assert (summary["filter"]["texts/web"], summary["filter"]["texts/synthetic"]) == (30, 30)
    assert summary["filter"]["kept"] == 30  # the half that debug=smoke keeps
    assert (folder / "report.html").stat().st_size > 10_000
    assert Path(summary["repretrain"]["weights"]).is_file()
    worth = next(line for line in told.stdout.splitlines() if "test/retrieval/i2t_r1 " in line)
    of = [summary[stage]["metrics"]["test/retrieval/i2t_r1"] for stage in ("pretrain", "repretrain")]
    assert worth.split()[1:] == [f"{value:.2f}" for value in of]
    assert sorted(path.name for path in Path(summary["generate"]["folder"]).glob("jobs/*")) == ["0", "1"]

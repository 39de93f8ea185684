"""The miniature tables: rows that tables share are trained once, orders are claimed only where the seeds agree, the paper's are known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from blip.capfilt.keys import Step, composed, step_overrides
from blip.capfilt.steps import Steps
from blip.capfilt.tables import EQUAL, HOLDS, REVERSED, UNDECIDED, Tables, compared, order, told
from blip.datamodules.views import View
from blip.overrides import CONF

OPTIONS: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(CONF / "pipeline" / "tables.yaml"))["pipeline"]  # type: ignore
COLUMNS = {"TR": "test/retrieval/i2t_r1", "SPICE": "test/caption/attributes"}
TABLES = {
    "Table 1": {
        "title": "one",
        "rows": {"web": {"label": "none", "paper": [50.0, 13.0]}, "capfilt": {"label": "both", "paper": [60.0, 14.0]}},
    },
    "Table 9": {
        "title": "two",
        "rows": {"web": {"label": "none", "paper": [50.0, 13.0]}, "other": {"label": "other", "paper": [50.0, 12.0]}},
    },
}


def the_tables(tmp_path: Path, **changed: Any) -> Tables:
    options = {key: value for key, value in OPTIONS.items() if key != "_target_"}
    made = Tables(**{**options, "root": str(tmp_path), **changed})
    made.shards = lambda for_all: ["/web/*.tar"]  # type: ignore[method-assign]
    return made


class Recorded(Steps):
    """Steps that only note who was to run, and with whom."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, folder)
        self.groups: list[list[Step]] = []

    def run(self, *steps: Step, only: Any = None) -> list[Path]:
        self.groups.append(list(steps))
        self.done |= {step.name: self.folder / step.name for step in steps}
        return list(self.done.values())


def test_a_table_by_itself_trains_its_rows_and_makes_what_these_use(tmp_path: Path):
    steps = Recorded(tmp_path)
    the_tables(tmp_path, only=["Table 3", "Table 4"], seeds=[0, 1]).work(steps)
    names = {step.name for group in steps.groups for step in group}
    rows = {f"{row}_{n}" for row in ("all", "all_but_ca", "web", "none", "one_model", "capfilt") for n in (0, 1)}
    assert names - rows == set(OPTIONS["steps"]) - {"beam_search", "by_beam"}
    with pytest.raises(ValueError, match=r"pipeline.only: Table 5 is none of Table 1"):
        the_tables(tmp_path, only=["Table 5"])


def test_a_view_that_says_nonsense_is_refused_before_anything_is_trained(tmp_path: Path):
    with pytest.raises(ValueError, match="one of them, not both"):
        the_tables(tmp_path, view={**OPTIONS["view"], "share": 0.5})
    rows = OPTIONS["rows"] | {"capfilt": {**OPTIONS["rows"]["capfilt"], "view": {"treshold": 0.5}}}
    with pytest.raises(ValueError, match=r"view: unknown \['treshold'\]"):
        the_tables(tmp_path, rows=rows)


def test_rows_that_tables_share_are_trained_once_for_each_seed(tmp_path: Path):
    steps = Recorded(tmp_path)
    the_tables(tmp_path).work(steps)
    names = [step.name for group in steps.groups for step in group]
    rows = {row for table in OPTIONS["tables"].values() for row in table["rows"]}
    assert len(names) == len(set(names))
    assert {name for name in names if name not in OPTIONS["steps"]} == {f"{row}_{n}" for row in rows for n in (0, 1, 2)}


def test_what_a_job_uses_is_finished_before_it_starts(tmp_path: Path):
    steps = Recorded(tmp_path)
    the_tables(tmp_path).work(steps)
    finished: set[Path] = set()
    for group in steps.groups:
        for step in group:
            for used in step.uses.values():
                for path in [used] if isinstance(used, Path) else used:
                    assert path in finished or path.parents[1] in finished, step.name
        finished |= {tmp_path / step.name for step in group}
    assert max(map(len, steps.groups)) == OPTIONS["side_by_side"]


def test_a_row_that_goes_on_starts_from_the_model_of_its_own_seed(tmp_path: Path):
    steps = Recorded(tmp_path)
    the_tables(tmp_path).work(steps)
    one = {step.name: step for group in steps.groups for step in group}["continued_2"]
    assert one.uses["ckpt"] == tmp_path / "web_2" / "checkpoints" / "last.ckpt"
    assert "seed=2" in one.overrides


def test_jobs_that_wait_for_nothing_there_is_are_named(tmp_path: Path):
    steps = OPTIONS["steps"] | {"captioner": {"stage": "finetune_captioner", "uses": {"ckpt": "pretraind"}}}
    with pytest.raises(ValueError, match="captioner"):
        the_tables(tmp_path, steps=steps).work(Recorded(tmp_path))


def test_what_the_command_line_says_is_said_to_every_step_but_its_own_settings_win(tmp_path: Path):
    steps = Recorded(tmp_path)
    the_tables(tmp_path, seeds=[0, 1]).work(
        steps, ("paths.data=/elsewhere", "trainer.max_steps=7", "data.num_workers=1")
    )
    one = {step.name: step.overrides for group in steps.groups for step in group}
    assert one["nucleus"] == ("stage=generate", "paths.data=/elsewhere", "++stage.shards=['/web/*.tar']")
    assert {"paths.data=/elsewhere", "data.num_workers=1"} < set(one["web_0"])
    row = one["web_0"]
    assert row.index("trainer.max_steps=7") < row.index(
        next(text for text in row if text.startswith("trainer.max_steps=2"))
    )


def test_every_step_and_row_is_a_config_that_can_be(tmp_path: Path):
    steps = Recorded(tmp_path)
    the_tables(tmp_path, seeds=[0, 1]).work(steps)
    made = {
        step.name: composed(step_overrides(step), tmp_path)
        for group in steps.groups
        for step in group
        if "_1" not in step.name
    }
    assert made["filtered_0"].data.sources[1].view == {
        **OPTIONS["view"],
        "sources": ["web"],
        "records": str(tmp_path / "by_nucleus"),
    }
    assert View.of(made["captioned_0"].data.sources[1].view).scores == ()
    assert made["none_0"].model.med.share == "none"
    assert made["by_beam"].stage.synthetic == [str(tmp_path / "beam_search")]
    assert len(made["web_0"].task.evaluators.caption.scores) == 2
    assert len({(made[f"{row}_0"].trainer.max_steps, made[f"{row}_0"].name[-2:]) for row in OPTIONS["rows"]}) == 1


def test_tables_name_rows_that_there_are_and_the_papers_figure_for_every_column(tmp_path: Path):
    with pytest.raises(ValueError, match="capfilt"):
        the_tables(tmp_path, rows={"web": {"stage": "pretrain"}})
    with pytest.raises(ValueError, match="figures for 1 columns"):
        the_tables(tmp_path, columns={"TR": "test/retrieval/i2t_r1"})


@pytest.mark.parametrize(
    ("differences", "paper", "verdict"),
    [
        ((3.0, 4.0, 5.0), 1.0, HOLDS),
        ((3.0, 4.0, 5.0), -1.0, REVERSED),
        ((3.0, 4.0, 5.0), 0.0, EQUAL),
        ((-3.0, 4.0, 5.0), 1.0, UNDECIDED),
        ((0.0, 0.0, 0.0), 1.0, UNDECIDED),
        ((2.0, 2.0, 2.0), 1.0, HOLDS),
    ],
)
def test_an_order_is_claimed_beyond_two_standard_errors_of_the_paired_differences(differences, paper, verdict):
    far_apart = [(10.0 * n + d, 10.0 * n) for n, d in enumerate(differences)]  # seeds differ by far more than rows do
    assert order("TR", "capfilt", "web", far_apart, paper).verdict == verdict


def results() -> dict[str, Any]:
    def runs(tr: float, spice: float) -> dict[int, dict[str, float]]:
        return {
            seed: {COLUMNS["TR"]: tr + seed, COLUMNS["SPICE"]: spice + seed, "seconds": 100.0 + tr}
            for seed in (0, 1, 2)
        }

    found = {"web": runs(40, 20), "capfilt": runs(45, 15), "other": runs(30, 20)}
    return compared(TABLES, COLUMNS, found, {"capfilt": 21.0})


def test_the_report_says_where_it_differs_from_the_paper_and_what_is_undecided():
    text = "\n".join(told(results()))
    assert "Of 4 orders of two rows in a column 1 are as in the paper, 1 reversed, 1 undecided" in text
    assert "- SPICE: both over none is -5.0 ± 0.0 here, +1.0 in the paper" in text
    assert "The longest row took 145 s (capfilt)" in text


def test_a_row_has_mean_standard_error_and_every_seed():
    cell = results()["rows"]["web"]["cells"]["TR"]
    assert cell["mean"] == 41
    assert cell["error"] == pytest.approx(1 / 3**0.5)
    assert list(cell["seeds"].values()) == [40, 41, 42]


FAKE = """
import json, sys
from pathlib import Path
said = dict(o.lstrip("+").split("=", 1) for o in sys.argv[2:] if "=" in o)
folder = Path(said["hydra.sweep.dir"].strip("'"))
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
(folder / "checkpoints" / "last.ckpt").write_text(said["name"])
better = 5 * said["name"].startswith("all_but_ca")
names = ("test/retrieval/i2t_r1", "test/retrieval/t2i_r1")
(folder / "metrics.json").write_text(json.dumps({name: int(said["seed"]) + better for name in names}))
(folder / "ended").touch()
with open("started.txt", "a") as log:
    log.write(said["name"] + chr(10))
"""


def test_what_is_finished_is_kept_and_a_row_that_was_lost_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("blip.capfilt.steps.decided_by", lambda step, root: {"config": {"o": list(step.overrides)}})
    (tmp_path / "fake.py").write_text(FAKE)
    table = {
        "title": "sharing",
        "rows": {"all": {"label": "all", "paper": [1, 1]}, "all_but_ca": {"label": "less", "paper": [2, 2]}},
    }

    def go() -> list[str]:
        (tmp_path / "started.txt").write_text("")
        tables = the_tables(
            tmp_path,
            steps={},
            tables={"Table 3": table},
            columns={"TR": "test/retrieval/i2t_r1", "IR": "test/retrieval/t2i_r1"},
            command=(sys.executable, str(tmp_path / "fake.py")),
        )
        tables.run(tmp_path / "tables")
        return sorted((tmp_path / "started.txt").read_text().split())

    assert go() == sorted(f"{row}_{seed}" for row in ("all", "all_but_ca") for seed in (0, 1, 2))
    assert go() == []
    (lost,) = (tmp_path / "tables" / "all_1").glob("*/finished.json")
    lost.unlink()
    assert go() == ["all_1"]
    result = json.loads((tmp_path / "tables" / "tables.json").read_text())
    assert {one["verdict"] for one in result["tables"]["Table 3"]["orders"]} == {HOLDS}

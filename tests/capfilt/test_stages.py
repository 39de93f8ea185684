"""The stages generate, filter and both at once, as the configs make them, with small models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from blip.capfilt import keys, records
from blip.main import execute, record
from blip.overrides import CONF, check
from tests.checkpoints import save
from tests.datamodules.making import write_shards
from tests.test_config import composed, nodes, parameters

PASSES = ("generate", "filter", "generate_filter")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "last.ckpt")


def stage(name: str, folder: Path, *overrides: str) -> Path:
    """The folder of a stage that was run from its saved config."""
    folder.mkdir()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(composed(f"stage={name}", *overrides)))
    execute(folder / "config.yaml")
    return folder


def test_generate_and_filter_by_themselves_are_the_one_pass(checkpoint: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "web", (5, 2), texts=2)
    data = f"stage.shards={tmp_path}/web/*.tar", "stage.batch_size=3"
    writes, scores = (f"stage.{node}.checkpoint={checkpoint}" for node in ("captioners.captioner", "scorers.filter"))
    generate = stage("generate", tmp_path / "generate", *data, writes, "stage.captioners.captioner.samples=2")
    then = stage("filter", tmp_path / "filter", *data, scores, f"stage.synthetic=[{generate}]")
    both = "stage.captioners.captioner.samples=2", f"stage.out={tmp_path}/out"
    fused = stage("generate_filter", tmp_path / "fused", *data, writes, scores, *both)
    assert [path.name for path in fused.iterdir()] == ["config.yaml"]
    table = records.read(records.files(then))
    assert table.num_rows == 7 * 4
    assert table.equals(records.read(records.files(tmp_path / "out")))
    described = json.loads((tmp_path / "out" / "description.json").read_text())
    assert described["captioners"]["captioner"]["decoding"]["top_p"] == 0.9
    assert described["shards"] == [f"{tmp_path}/web/0000{n}.tar" for n in range(2)]


def test_a_checkpoint_that_is_not_there_is_one_error_that_names_it_and_nothing_is_begun(tmp_path: Path) -> None:
    write_shards(tmp_path / "web", (2,))
    missing = f"stage.captioners.captioner.checkpoint={tmp_path}/none.ckpt"
    with pytest.raises((ValueError, OSError), match=rf"{tmp_path}/none\.ckpt"):
        stage("generate", tmp_path / "out", f"stage.shards={tmp_path}/web/*.tar", missing)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.yaml"]


def test_captioners_and_scorers_beside_the_first_are_added_by_their_group(checkpoint: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "web", (3,))
    options = [f"stage.shards={tmp_path}/web/*.tar", f"stage.out={tmp_path}/out"]
    options += [
        "+captioner@stage.captioners.beams=blip",
        "+scorer@stage.scorers.second=blip",
        "stage.captioners.beams.strategy=beam",
    ]
    nodes = ("captioners.captioner", "captioners.beams", "scorers.filter", "scorers.second")
    stage("generate_filter", tmp_path / "run", *options, *(f"stage.{node}.checkpoint={checkpoint}" for node in nodes))
    rows = records.read(records.files(tmp_path / "out")).to_pylist()
    assert {row["captioner"] for row in rows} == {None, "captioner", "beams"}
    decoding = {row["captioner"]: json.loads(row["decoding"])["strategy"] for row in rows if row["captioner"]}
    assert decoding == {"captioner": "nucleus", "beams": "beam"}
    assert all((row["itm"], row["itc"]) == (row["itm_second"], row["itc_second"]) for row in rows)
    clip = keys.composed(["stage=filter", "+scorer@stage.scorers.clip=clip"], tmp_path).stage.scorers.clip
    assert clip._target_ == "blip.capfilt.filter.ClipScorer"


def test_a_value_that_is_missing_is_one_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stage.captioners.captioner.checkpoint: no value yet"):
        record(keys.composed(["stage=generate"], tmp_path), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PASSES)
def test_every_key_of_a_pass_is_one_that_its_target_takes(name: str) -> None:
    models = (f"stage.{node}.checkpoint=x" for node in ("captioners.captioner", "scorers.filter"))
    overrides = [model for model in models if name == "generate_filter" or ("scorers" in model) == (name == "filter")]
    cfg = composed(f"stage={name}", *overrides)
    assert (
        not {"task", "model", "data", "trainer"} & cfg.keys()
    )  # what only training needs does not stand in the saved config
    found = dict(nodes(OmegaConf.to_container(cfg, resolve=True)))
    assert len(found) == len(overrides) + 1
    for path, node in found.items():
        takes = parameters(node["_target_"]).keys() | {"strategy", "top_p", "samples"}
        assert node.keys() - {"_target_", "_partial_"} <= takes, path


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_tells_its_command_and_can_be_swept(name: str) -> None:
    lines = (CONF / "stage" / f"{name}.yaml").read_text().splitlines()
    assert any(line.startswith(f"#   python run.py stage={name}") for line in lines[1:6])
    check([f"stage={name}", "stage.worker=0,1,2", "stage.out=x", "seed=1,2"])
    assert yaml.safe_load("\n".join(lines))["name"] == name

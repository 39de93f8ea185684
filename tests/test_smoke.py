"""A recipe of each task, as its experiment has it, trains, is tested and predicts on its part of the embedded world."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from blip.main import execute, record, reopen
from blip.overrides import CONF

RECIPES = {
    "coco_caption_129m": "caption/cider",
    "coco_retrieval_129m": "retrieval/mean",
    "vqa_129m": "vqa/accuracy",
    "nlvr2_129m": "nlvr/accuracy",
    "visdial": "visdial/mrr",
    "msrvtt_retrieval": "video_retrieval/t2v_r1",
    "msvd_qa": "video_qa/accuracy",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the small world is drawn, once for all."""
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize(("experiment", "metric"), RECIPES.items())
def test_a_recipe_trains_is_tested_and_predicts(experiment: str, metric: str, data: Path, tmp_path: Path) -> None:
    overrides = [f"experiment={experiment}", "debug=smoke", "trainer.max_steps=2", "trainer.val_check_interval=2"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides)
    cfg.name = "smoke"
    cfg.paths = {
        "root": str(tmp_path),
        "data": str(data),
        "weights": "none",
        "runs": str(tmp_path),
        "run": str(tmp_path),
    }
    record(cfg, tmp_path)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(overrides))
    execute(tmp_path / "config.yaml")
    assert json.loads((tmp_path / "metrics.json").read_text())[f"test/{metric}"] >= 0
    execute(reopen(tmp_path, ["mode=predict"]) / "config.yaml")
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) > 0

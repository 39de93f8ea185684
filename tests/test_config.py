"""Every config composes, and every key of every node is one that its target takes."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from blip.main import self_contained
from blip.modules.blip import BLIPConfig
from blip.modules.med import MEDConfig
from blip.modules.vit import ViTConfig
from blip.overrides import CONF
from blip.tasks.contrastive import ContrastiveObjectives
from blip.tasks.pretrain import Objectives


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str) -> DictConfig:
    """As `run.py` saves it, in a folder that is none."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", list(overrides))
    cfg.name = "test"
    cfg.paths = {name: f"/nowhere/{name}" for name in ("root", "data", "weights", "runs", "run")}
    return self_contained(cfg)


RECIPES = [(f"experiment={name}",) for name in options("experiment")]
RECIPES += [(f"experiment={name}", "debug=smoke") for name in options("experiment")]
SINGLE = [
    (f"{group}={name}",)
    for group in ("data", "schedule", "compile", "trainer", "logger", "debug")
    for name in options(group)
    if name
    not in (
        "pretrain_14m",
        "pretrain_129m",
        "flickr8k",
        "photos",
        "shapes_easy_first",
        "csv",
        "cpu",
        "smoke",
    )  # in recipes
]
SINGLE += [(f"decoding@task.evaluators.caption.decoding={name}",) for name in options("decoding")]


def nodes(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, node) of every node that names a target."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, child in node.items():
            yield from nodes(child, f"{path}.{key}" if path else key)
    elif isinstance(node, list):
        for number, child in enumerate(node):
            yield from nodes(child, f"{path}.{number}")


@cache
def parameters(target: str) -> dict[str, inspect.Parameter]:
    """The named parameters of a target; where it hands on `**kwargs`, those of the classes it is made from, too."""
    thing = get_object(target)
    found: dict[str, inspect.Parameter] = {}
    for function in [c.__init__ for c in thing.__mro__ if "__init__" in vars(c)] if inspect.isclass(thing) else [thing]:
        named = inspect.signature(inspect.unwrap(function)).parameters
        found = {n: p for n, p in named.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} | found
        if not any(p.kind == p.VAR_KEYWORD for p in named.values()):
            break
    return {n: p for n, p in found.items() if n != "self"}


GIVEN = {"task": {"tokenizer"}}  # what blip/main.py adds
BUILT_IN = {"datetime.timedelta": {"minutes"}}  # has no signature
HANDED_ON = {
    "lightning.pytorch.strategies.DDPStrategy": "torch.nn.parallel.DistributedDataParallel",
    "lightning.pytorch.loggers.WandbLogger": "wandb.init",
}
DATACLASSES: dict[str, Any] = {"model": BLIPConfig, "model.vit": ViTConfig, "model.med": MEDConfig}
OBJECTIVES: dict[str, Any] = {
    "blip.tasks.pretrain.PretrainTask": Objectives,
    "blip.tasks.retrieval.RetrievalTask": ContrastiveObjectives,
}
DERIVED = {  # what the task works out: sizes of the vocabulary and of what the text looks at
    "model": {"dec_id", "enc_id"},
    "model.med": {"vocab_size", "look_width"},
}


@pytest.mark.parametrize("overrides", RECIPES + SINGLE, ids=" ".join)
def test_every_key_of_every_node_is_one_that_its_target_takes(overrides: tuple[str, ...]) -> None:
    plain = OmegaConf.to_container(composed(*overrides), resolve=True)
    checked = 0
    for path, node in nodes(plain):
        keys = {key for key in node if key not in ("_target_", "_partial_", "_convert_", "_recursive_")}
        takes = (
            parameters(node["_target_"]).keys() | parameters(HANDED_ON.get(node["_target_"], node["_target_"])).keys()
        )
        takes |= BUILT_IN.get(node["_target_"], set())
        assert keys <= takes, f"{path}: {node['_target_']} takes no {sorted(keys - takes)}"
        if not node.get("_partial_"):
            needed = {n for n, p in parameters(node["_target_"]).items() if p.default is p.empty}
            missing = needed - keys - GIVEN.get(path, set())
            assert not missing, f"{path}: {node['_target_']} needs {sorted(missing)}"
        checked += 1
    assert checked > 5
    for group in ("callbacks", "logger"):
        nameless = [name for name, node in plain[group].items() if node is not None and "_target_" not in node]
        assert not nameless, f"{group}: {nameless} have no _target_"
    objectives = OBJECTIVES.get(plain["task"]["_target_"])
    for path, kind in (DATACLASSES | ({"task.objectives": objectives} if objectives else {})).items():
        node = OmegaConf.select(OmegaConf.create(plain), path)
        named = inspect.signature(kind).parameters
        assert node.keys() <= named.keys(), f"{path}: {kind.__name__} takes no {sorted(node.keys() - named.keys())}"
        missing = {n for n, p in named.items() if p.default is p.empty} - node.keys() - DERIVED.get(path, set())
        assert not missing, f"{path}: {kind.__name__} needs {sorted(missing)}"


@pytest.mark.parametrize("name", options("experiment"))
def test_a_recipe_tells_its_command(name: str) -> None:
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert any(line.startswith(f"#   python run.py experiment={name}") for line in lines[1:5])


@pytest.mark.parametrize("name", [n for n in options("experiment") if n.startswith("pretrain_")])
def test_the_paper_s_recipes_have_the_paper_s_numbers(name: str) -> None:
    cfg = composed(f"experiment={name}")
    large = name.endswith("_l")
    assert (cfg.trainer.max_epochs, cfg.optimizer.weight_decay, cfg.optimizer.lr) == (20, 0.05, 2e-4 if large else 3e-4)
    assert 32 * cfg.data.batch_size == (2400 if large else 2880)
    goals = cfg.task.objectives
    assert (goals.queue_size, goals.momentum, goals.alpha) == (57600, 0.995, 0.4)
    assert goals.alpha_end * cfg.trainer.max_epochs == 2
    assert cfg.schedule.start * cfg.optimizer.lr == pytest.approx(1e-6)
    assert (cfg.model.vit.width, cfg.model.vit.depth) == ((1024, 24) if large else (768, 12))
    assert [s.name for s in cfg.data.sources][:5] == ["coco", "visual_genome", "sbu", "cc3m", "cc12m"]
    assert [s.get("part_of_epoch") for s in cfg.data.sources[5:]] == ([0.2] if "129m" in name else [])


def test_the_wheel_holds_every_package_and_the_configs() -> None:
    project = tomllib.loads((CONF.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = sorted(
        ".".join(path.parent.relative_to(CONF.parent).parts) for path in (CONF.parent / "blip").rglob("__init__.py")
    )
    assert sorted(project["packages"]) == sorted([*folders, "blip.conf"])
    assert project["package-dir"] == {"blip.conf": "conf"}


def test_every_number_in_the_configs_is_read_as_a_number() -> None:
    def values(node: Any) -> Iterator[Any]:
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from values(child)
        yield node

    for path in Path(CONF).rglob("*.yaml"):
        for value in values(yaml.safe_load(path.read_text())):
            if isinstance(value, str) and not value.isdigit():  # YAML takes 1e-4 for a text; "3" is meant as one
                with pytest.raises(ValueError, match="could not convert"):
                    float(value)

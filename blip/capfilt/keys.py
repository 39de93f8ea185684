"""What decides a step's result, and so what it is called: a hash of its config, its data, and the weights and records it uses.

Of the config without paths, loggers, callbacks and numbers of workers; of data, weights and records their fingerprints, wherever
they lie.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from blip.datamodules.index import open_index
from blip.datamodules.locations import expand
from blip.datamodules.sources import index_of
from blip.overrides import CONF, check, leaves

# What a result does not depend on.
NO_MATTER = (
    *("paths", "logger", "callbacks", "expected", "name"),
    *("trainer.accelerator", "trainer.log_every_n_steps", "trainer.profiler"),
    *("data.num_workers", "data.prefetch", "data.allow_other_data"),
    *("stage.out", "stage.worker", "stage.num_workers", "stage.prefetch", "stage.device", "stage.cache_gb"),
)
BY_FINGERPRINT = ("stage.shards", "stage.index")  # wherever they lie


@dataclass(frozen=True)
class Step:
    """One step.

    stage: what is run, a file of conf/stage; name: of this step and its folder, where a stage is run more than once
    overrides: of the command line, as `run.py` takes them
    uses: key of the config -> what lies there: weights, or the folder (or folders) of another step
    workers: 0 for a run in the folder itself; else so many jobs share the work on one output (`stage.out`, `stage.worker`)
    output: what the step leaves to others, in its folder; needs: the files without which it is not finished
    """

    stage: str
    name: str
    overrides: tuple[str, ...]
    uses: Mapping[str, Path | Sequence[Path]] = field(default_factory=dict)
    workers: int = 0
    output: str = "checkpoints"
    needs: tuple[str, ...] = ("checkpoints/last.ckpt", "metrics.json", "ended")


def decided_by(step: Step, root: Path) -> dict[str, dict[str, Any]]:
    """{"config": leaves by dotted name, "data": fingerprints by source, "uses": fingerprints by key of the config}."""
    cfg = composed(step_overrides(step), root)
    data = data_of(cfg)
    cfg.paths = {name: f"<{name}>" for name in cfg.paths}
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    if plain.get("stage"):  # of the rest nothing is used
        plain = {key: plain[key] for key in ("stage", "seed")}
    apart = tuple(f"{key}." for key in (*NO_MATTER, *BY_FINGERPRINT, *step.uses))
    config = {key: value for key, value in leaves(plain) if not f"{key}.".startswith(apart)}
    uses = {
        key: "+".join(fingerprint(path) for path in ([what] if isinstance(what, Path) else what))
        for key, what in step.uses.items()
    }
    return {"config": config, "data": data, "uses": uses}


def composed(overrides: Sequence[str], root: Path) -> DictConfig:
    """The config of a command that is started in `root`. ValueError for an override that can't be."""
    check(list(overrides))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", list(overrides))
    for node, key in ((cfg, "name"), *((cfg.paths, key) for key in cfg.paths)):  # what only Hydra's own start knows
        if "${hydra:" in str(OmegaConf.to_container(node, resolve=False)[key]):  # type: ignore[call-overload,index]
            node[key] = str(root)
    return cfg


def step_overrides(step: Step) -> list[str]:
    used = {k: str(v) if isinstance(v, Path) else [str(path) for path in v] for k, v in step.uses.items()}
    return [*step.overrides, *(override(key, value) for key, value in used.items())]


def override(key: str, value: Any) -> str:
    """KEY=VALUE of Hydra's grammar for any plain value; a key that may not be there yet is added."""
    return f"++{key}={_quoted(value)}"


def _quoted(value: Any) -> str:
    if isinstance(value, str):
        # a backslash says itself, but before a quotation mark
        return "'" + re.sub(r"(\\*)('|$)", lambda at: 2 * at[1] + (r"\'" if at[2] else ""), value) + "'"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_quoted(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_quoted(v) for v in value) + "]"
    return json.dumps(value)


def data_of(cfg: DictConfig) -> dict[str, str]:
    """Fingerprint of each source and held-out set (drawn and indexed first where that is missing); of a pass, of its shards."""
    if cfg.get("stage"):
        shards = cfg.stage.shards
        patterns = [shards] if isinstance(shards, str) else list(shards)
        locations = list(dict.fromkeys(location for pattern in patterns for location in expand(pattern)))
        return {"shards": open_index(locations, cfg.stage.get("index")).fingerprint}
    data: Any = OmegaConf.to_container(cfg.data, resolve=True)
    for source in data["sources"]:
        source.pop("view", None)  # a view is of records, which the step says that it uses
    module = instantiate(data, _convert_="all")
    module.prepare_data()
    found = {f"source {s.get('name', n)}": index_of(s, module.kind) for n, s in enumerate(module.sources)}
    for stage, sets in (("val", module.val), ("test", module.test)):
        found |= {f"{stage} {name}": index_of(spec, module.kind) for name, spec in sets.items()}
    return {name: index.fingerprint for name, index in found.items()}


def fingerprint(path: Path) -> str:
    """Of what a finished step left, as written there; of any other file or folder, of its bytes. ValueError where nothing is."""
    for folder in (path, *path.parents):
        if (folder / "finished.json").exists():
            output = json.loads((folder / "finished.json").read_text())["output"]
            return output if path == folder else f"{output} {path.relative_to(folder)}"
    if not path.exists():
        raise ValueError(f"{path}: there is nothing; name weights that exist")
    return digest(path)


def digest(path: Path) -> str:
    """Of the bytes of a file, or of the names and bytes of all files of a folder."""
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        with open(file, "rb") as content:
            total.update(f"{file.relative_to(path)}\0".encode() + hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:16]


def key_of(decided: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:12]


def changes(folder: Path, decided: Mapping[str, Mapping[str, Any]]) -> str:
    """What differs from the latest other folder of this step, in words; empty where there is none."""
    others = [path for path in folder.parent.glob("*/step.json") if path.parent != folder]
    if not others or (folder / "step.json").exists():
        return ""
    latest = max(others, key=lambda path: path.stat().st_mtime)
    before = json.loads(latest.read_text())
    lines = []
    for part in ("config", "data", "uses"):
        old, new = before[part], decided[part]
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                lines.append(f"    {part} {key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}")
    more = [f"    and {len(lines) - 12} more"] if len(lines) > 12 else []
    return f"; what is there ({latest.parent}) was made from other things:\n" + "\n".join(lines[:12] + more)

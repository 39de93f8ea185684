"""What is said on the command line: composed once beforehand, so that a mistake is told with the names that were meant. No torch."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

PACKAGE = Path(__file__).resolve().parent
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
# In configs: a name that a folder keeps through restarts, of letters and digits.
OmegaConf.register_new_resolver(
    "name_of", lambda folder: hashlib.blake2b(str(folder).encode(), digest_size=8).hexdigest(), replace=True
)


def check(overrides: list[str]) -> None:
    """Composes once; ValueError for the first override that can't be, with the nearest names that exist."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        singles = list(one_of_each(overrides))
        try:
            composed = compose("config", singles)
            for text in singles:
                if number := instead_of_number(text, composed, [s for s in singles if s != text]):
                    raise ValueError(f"{text}: {text.partition('=')[0].lstrip('+')} is a number, here {number}")
            return
        except (HydraException, OmegaConfBaseException) as error:
            problem = str(error)
        sound: list[str] = []
        for text in singles:
            try:
                compose("config", [*sound, text])
                sound.append(text)
            except (HydraException, OmegaConfBaseException) as error:
                near = nearest(text, compose("config", sound))
                hint = f"\n  Nearest: {', '.join(near)}" if near else ""
                raise ValueError(f"{text}: {str(error).splitlines()[0]}{hint}") from None
        raise ValueError(problem)


def instead_of_number(override: str, cfg: DictConfig, others: list[str]) -> int | float | None:
    """The number that an override puts a word in the place of; None where it does not."""
    key = override.partition("=")[0].lstrip("+")
    value = OmegaConf.to_container(cfg, resolve=False)
    before: Any = None
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None  # type: ignore[assignment]
    if isinstance(value, str) and value != "auto" and "${" not in value:
        before = OmegaConf.to_container(compose("config", others), resolve=False)
        for part in key.split("."):
            before = before.get(part) if isinstance(before, dict) else None
    return before if isinstance(before, int | float) and not isinstance(before, bool) else None


def one_of_each(overrides: list[str]) -> Iterator[str]:
    """The overrides, those that sweep over several values with the first of these."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ValueError(str(error)) from None
    for text, override in zip(overrides, parsed, strict=True):
        if not override.is_sweep_override():
            yield text
        elif override.value_type != ValueType.GLOB_CHOICE_SWEEP:
            yield f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"


def choices(group: str) -> list[str]:
    """The options of a group of configs, Hydra's own and those of its plugins included."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return GlobalHydra.instance().config_loader().get_group_options(group)


def nearest(override: str, cfg: DictConfig) -> list[str]:
    """Up to three keys of the config, or options of a group, that the left or right side of an override may have meant."""
    key, _, value = override.lstrip("+~").partition("=")
    loader = GlobalHydra.instance().config_loader()
    if key in loader.list_groups(""):
        return [f"{key}={o}" for o in difflib.get_close_matches(value, loader.get_group_options(key), 3, 0.3)]
    plain = OmegaConf.to_container(cfg, resolve=False)
    known = {*loader.list_groups("")}
    for path, _ in leaves(plain):
        parts = path.split(".")
        known.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    last = key.split(".")[-1]
    same_name = sorted((k for k in known if k.split(".")[-1] == last), key=len)
    return (same_name + difflib.get_close_matches(key, sorted(known - {*same_name}), 3, 0.5))[:3]


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every value below a node of plain dicts and lists; an empty dict or list is a value."""
    if isinstance(node, dict | list) and node:
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, node

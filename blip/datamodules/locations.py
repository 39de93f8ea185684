"""Where shards lie: patterns to locations, local or URLs, and the folder for what is made or fetched."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def shown(url: str) -> str:
    """A URL without its query, for messages."""
    return url.split("?")[0]


def cache_folder() -> Path:
    """Where made and fetched files are kept: $BLIP_CACHE, else `blip` in the user's cache folder."""
    return Path(
        os.environ.get("BLIP_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "blip"
    )


def writable(folder: Path) -> bool:
    """Whether something may be made in a folder. Its mode is asked too: to the superuser os.access allows everything."""
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


def expand(shards: str | Path | Sequence[str | Path]) -> list[str]:
    """Locations of shards, from paths, brace and glob patterns and URLs, in the order given (globs sorted)."""
    locations: list[str] = []
    for pattern in [shards] if isinstance(shards, str | Path) else shards:
        for name in braceexpand(os.path.expanduser(os.fspath(pattern)), escape=False):
            if name.startswith("pipe:") or ("://" in name and not is_url(name)):
                raise ValueError(
                    f"{name}: shards are local files or http(s) URLs; nothing is run or guessed to reach them"
                )
            found = [name] if is_url(name) else sorted(glob.glob(name))
            if not found:
                raise ValueError(f"no shard matches {name} (pattern {pattern}, working folder {os.getcwd()})")
            locations.extend(found if is_url(name) else map(os.path.abspath, found))
    for location in locations:
        if location.split("?")[0].endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
            raise ValueError(f"{location}: compressed, so no pair can be read by its place; unpack it to a plain .tar")
    if len(set(locations)) != len(locations):
        twice = next(name for name in locations if locations.count(name) > 1)
        raise ValueError(f"{twice}: named twice in {shards}")
    return locations


def common_root(locations: Sequence[str]) -> tuple[str, list[str]]:
    """(folder or URL that holds all, names relative to it without what follows a question mark)."""
    plain = [name.split("?")[0] if is_url(name) else name for name in locations]
    root = os.path.commonpath([os.path.dirname(name) for name in plain]) if not is_url(plain[0]) else _url_root(plain)
    return root, [name[len(root) :].lstrip("/") for name in plain]


def _url_root(urls: Sequence[str]) -> str:
    parts = [url.split("/")[:-1] for url in urls]
    shared = next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), min(map(len, parts)))
    if shared < 3:
        raise ValueError(f"{urls[0]} ... {urls[-1]}: shards of one source must come from one server; make two sources")
    return "/".join(parts[0][:shared])

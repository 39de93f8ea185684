"""Folders that are made from a description: drawn once, whole or not at all."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

log = logging.getLogger(__name__)


def drawn(folder: Path, description: dict, draw: Callable[[Path], None]) -> Path:
    """Returns `folder` once it holds what `draw` writes into the folder that it is given, and world.json: the description.

    A folder of the same description is kept. Safe to call from several processes: one draws, the others wait. ValueError
    for a folder of another description, or of something else.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if _is_drawn(folder, description):
            return folder
        started = time.perf_counter()
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            draw(partial)
            (partial / "world.json").write_text(json.dumps(description, indent=2) + "\n")
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        log.info("drew %s in %.0f s", folder, time.perf_counter() - started)
    return folder


def _is_drawn(folder: Path, description: dict) -> bool:
    if not folder.exists() or not any(folder.iterdir()):
        return False
    try:
        found = json.loads((folder / "world.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} holds something else than a world: choose another folder") from None
    if found != description:
        raise ValueError(f"{folder} holds the world {found}, asked for is {description}: remove it or choose another")
    return True

"""What stands beside records: `description.json`, what decides them, and `manifest.json`, what became of all shards.

A folder holds the records of one description. Who comes with another is refused, with what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blip.capfilt import records
from blip.datamodules.views import record_file

NAMED = 20  # broken pictures named for each reason
TOLD = {"hash", "input", "captioners", "shards"}  # by every description


def describe(folder: Path, decides: dict[str, Any], places: dict[str, Any]) -> str:
    """Writes the description where there is none, and returns its hash: of what decides the records, not of where things lie.

    ValueError where the folder has another.
    """
    decides = json.loads(json.dumps(decides))
    told = json.dumps(decides, sort_keys=True).encode()
    key = hashlib.blake2b(told, digest_size=16).hexdigest()
    path = folder / "description.json"
    if not path.is_file():
        _create(path, json.dumps({"hash": key, **decides, **places}, indent=2).encode())
    there = description(folder)
    if there["hash"] != key:
        differ = [f"  {k}: {there.get(k)} there, {decides[k]} now" for k in decides if there.get(k) != decides[k]]
        raise ValueError(
            f"{folder} holds records of another pass; name another folder (stage.out, hydra.run.dir):\n"
            + "\n".join(differ)
        )
    return key


def description(folder: Path) -> dict[str, Any]:
    path = folder / "description.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not the description of a pass ({error})") from None
    if missing := TOLD.difference(told if isinstance(told, dict) else ()):
        raise ValueError(f"{path}: not the description of a pass; it says nothing of {', '.join(sorted(missing))}")
    return told


def complete(folder: Path) -> bool:
    """Whether all shards of the folder's description have their records."""
    return (folder / "manifest.json").is_file()


def sum_up(folder: Path, names: Sequence[str], key: str, left_out: dict[str, int]) -> dict[str, Any]:
    """Writes the manifest of the records of all shards and returns it; the same whoever does so.

    left_out: reason -> records that the index leaves out
    """
    shards = {records.text_of(name): records.about(record_file(folder, name)) for name in names}
    if other := [name for name, about in shards.items() if about["description"] != key]:
        raise ValueError(
            f"{folder}: records of another pass lie there ({other[0]} ...); take them away and start again"
        )
    broken: dict[str, list[str]] = {}
    for name, about in shards.items():
        for record, reason in about["broken"]:
            broken.setdefault(reason, []).append(f"{name}: {record}")

    def by_source(what: str) -> dict[str, int]:
        sources = sorted({source for about in shards.values() for source in about[what]})
        return {source: sum(about[what].get(source, 0) for about in shards.values()) for source in sources}

    pictures, seconds, waited = (sum(about[k] for about in shards.values()) for k in ("pictures", "seconds", "waited"))
    manifest = {
        "description": key,
        "pictures": pictures,
        "in": by_source("in"),
        "rows": by_source("rows"),
        "broken": {reason: len(found) for reason, found in sorted(broken.items())},
        "broken_names": {reason: found[:NAMED] for reason, found in sorted(broken.items())},
        "left_out_by_the_index": left_out,
        "seconds": round(seconds, 3),  # of all workers together
        "pictures_per_s": round(pictures / seconds, 3) if seconds else None,  # of one worker
        "waited_for_data": round(waited / seconds, 4) if seconds else None,  # a share of the seconds
        "shards": {name: {k: about[k] for k in ("pictures", "rows", "seconds")} for name, about in shards.items()},
    }
    path = folder / "manifest.json"
    records.replace(path, json.dumps(manifest, indent=2).encode(), records.partial(folder, "manifest"))
    return manifest


def _create(path: Path, data: bytes) -> None:
    """Puts a file there, whole, where none is; of several that do so at once one is first."""
    partial = records.partial(path.parent, path.stem)
    new = partial.with_suffix(".new")
    records.replace(new, data, partial)
    try:
        os.link(new, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(new, path)
    new.unlink(missing_ok=True)

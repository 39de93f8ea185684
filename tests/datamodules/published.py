"""For the tests of the published layouts: small files of annotations, pictures of given names, and what the shards then hold."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blip.datamodules.layouts.packing import Built
from blip.datamodules.layouts.published import build
from tests.datamodules.making import picture

CLIP = b"\0\0\0\x18ftypisom" + bytes(100)  # what an MP4 begins with


def write(path: Path, content: Any) -> Path:
    """A file of this text, or of this as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def pictures(folder: Path, names: Iterable[str], data: bytes | None = None) -> Path:
    """A folder of files with these names: each another picture, or all these bytes."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number) if data is None else data)
    return folder


def shards(
    layout: str, paths: list[Path], out: Path, split: str | None = None
) -> tuple[Built, dict[str, Any], list[str]]:
    """What `build` tells, the records by key, and the names of the members that are no records."""
    built = build(layout, paths, out, split)
    records, others = dict[str, Any](), list[str]()
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    records[member.name.removesuffix(".json")] = json.load(tar.extractfile(member))  # type: ignore[arg-type]
                else:
                    others.append(member.name)
    return built, records, others

"""Small shards for the tests of the stream: pictures that say which pair they are, and a vocabulary for their captions."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import cv2
import numpy as np

WORDS = ["a", "picture", "of", "number", "text", *map(str, range(1000))]


def picture(number: int, height: int = 12, width: int = 16) -> bytes:
    """A PNG whose colour tells its number (below 256 * 256)."""
    image = np.empty((height, width, 3), np.uint8)
    image[:] = number % 256, number // 256, 128
    return cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()


def pair(number: int, texts: int = 1, prefix: str = "") -> dict[str, bytes]:
    """Members of pair `number`: a picture, and a txt (one text) or a json (several)."""
    key = f"{prefix}{number:05d}"
    captions = [f"a picture of number {number} text {i}" for i in range(texts)]
    if texts == 1:
        return {f"{key}.png": picture(number), f"{key}.txt": captions[0].encode()}
    return {f"{key}.png": picture(number), f"{key}.json": json.dumps({"captions": captions}).encode()}


def tar_of(members: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def write_shards(folder: Path, sizes: Iterable[int], texts: int = 1, first: int = 0) -> list[Path]:
    """Shards 00000.tar, 00001.tar, ... of so many pairs each, numbered through from `first`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard, size in enumerate(sizes):
        members = {k: v for n in range(first, first + size) for k, v in pair(n, texts).items()}
        paths.append(folder / f"{shard:05d}.tar")
        paths[-1].write_bytes(tar_of(members))
        first += size
    return paths


def write_vocabulary(path: Path) -> Path:
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return path

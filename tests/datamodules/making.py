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


def clip(number: int, frames: int = 20, codec: str = "mpeg4", container: str = "mp4") -> bytes:
    """A clip of 48 x 32 whose frame i is grey of level 8 i + number."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(frames):
            image = np.full((32, 48, 3), (8 * i + number) % 256, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    return file.getvalue()


def record(number: int, kind: str, entries: int = 2) -> dict[str, bytes]:
    """Members of record `number` of a kind: what is asked or said names its number and its own."""
    key, told = f"{number:05d}", [f"number {number} text {i}" for i in range(entries)]
    pictures = {f"{key}.png": picture(number)}
    if kind in ("clips", "clip_questions"):
        pictures = {f"{key}.mp4": clip(number)}
    if kind == "statements":
        pictures = {f"{key}.0.png": picture(number), f"{key}.1.png": picture(number + 500)}
        lists: dict = {"statements": [{"id": t, "sentence": t, "label": i % 2 == 0} for i, t in enumerate(told)]}
    elif kind == "rounds":
        options = {"options": [str(n) for n in range(6)], "answer_index": number % 6, "answer": str(number % 6)}
        lists = {"caption": f"picture {number}", "rounds": [{"question": t} | options for t in told]}
    elif kind in ("questions", "clip_questions"):
        asked = [{"id": 10 * number + i, "question": t, "answers": [str(number), "text"]} for i, t in enumerate(told)]
        lists = {"questions": asked}
    else:
        lists = {"captions": told}
    return pictures | {f"{key}.json": json.dumps(lists).encode()}


def write_records(folder: Path, sizes: Iterable[int], kind: str, entries: int = 2) -> list[Path]:
    """As `write_shards`, of any kind of records."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, first = [], 0
    for shard, size in enumerate(sizes):
        paths.append(folder / f"{shard:05d}.tar")
        members = {k: v for n in range(first, first + size) for k, v in record(n, kind, entries).items()}
        paths[-1].write_bytes(tar_of(members))
        first += size
    return paths


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

"""The file of an index: magic, length of the header, header (JSON), arrays at multiples of 64, opened by `memmap`."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from blip.datamodules.records import PAIRS
from blip.files import own, whole

MAGIC = b"BLIP index 1\n"


def fingerprint(arrays: dict[str, np.ndarray], records: str) -> str:
    """Digest of what the shards hold and of which rows it gives; neither places nor times are in it."""
    digest = hashlib.blake2b(MAGIC, digest_size=16)
    if records != PAIRS.name:  # which are what an index was of before it could be of anything else
        digest.update(records.encode())
    for name in ("names", "digests", "shard_starts", "text_starts", "pictures", "key_starts", "keys", "texts"):
        if name in arrays:  # texts are in the index of a view alone
            digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
    return digest.hexdigest()


def write(path: Path, arrays: dict[str, np.ndarray], report: dict[str, Any]) -> None:
    """Writes the index whole or not at all."""
    table, at = {}, 0
    for name, array in arrays.items():
        table[name] = [at, np.lib.format.dtype_to_descr(array.dtype), len(array)]
        at += -(-array.nbytes // 64) * 64
    head = json.dumps(
        {"fingerprint": fingerprint(arrays, report["records"]), "report": report, "arrays": table, "bytes": at},
        ensure_ascii=False,
    ).encode()
    with whole(path, own(path)) as partial, open(partial, "wb") as file:
        file.write(MAGIC + len(head).to_bytes(8, "little") + head)
        file.write(b"\0" * (-file.tell() % 64))
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).view(np.uint8).data)  # as it lies: of a mapped file page by page
            file.write(b"\0" * (-array.nbytes % 64))


def read(path: Path, mode: Literal["r", "r+"] = "r") -> tuple[dict, dict[str, np.ndarray]]:
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path}: not an index of this version; delete it and start again, or `blip data index`")
        size = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(size))
        start = -(-file.tell() // 64) * 64
        if os.fstat(file.fileno()).st_size != start + head["bytes"]:
            raise ValueError(f"{path}: the index is cut; delete it and start again")
    whole = np.asarray(np.memmap(path, mode=mode))  # a plain view of the mapping: its elements are sooner had

    def array(at: int, descr, length: int) -> np.ndarray:
        fields = (
            [(name, kind, *map(tuple, shape)) for name, kind, *shape in descr] if isinstance(descr, list) else descr
        )
        dtype = np.lib.format.descr_to_dtype(fields)
        return whole[start + at : start + at + length * dtype.itemsize].view(dtype)

    return head, {name: array(*entry) for name, entry in head["arrays"].items()}


def note_time(path: Path, shard: int, time: int) -> None:
    """Keeps the new time of a shard with the same bytes (a copy), so that they are not compared at every start."""
    if os.access(path, os.W_OK):
        _, arrays = read(path, "r+")
        arrays["times"][shard] = time

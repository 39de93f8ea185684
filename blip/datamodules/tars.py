"""WebDataset shards as we write them: equal samples, equal bytes, and a shard that is there is whole."""

import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_tar(path: str | Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Writes the shard `path`, whole or not at all, and returns the number of its samples.

    A sample is (key, {suffix: bytes}): `("000017", {"jpg": ..., "json": ...})` becomes the members 000017.jpg and
    000017.json, in this order; `{"0.jpg": ..., "1.jpg": ..., "json": ...}` holds two pictures. Members have no time,
    owner or place of writing. A shard that is there is replaced. ValueError for a key that readers would take apart or
    put together with another (empty, with a dot, met before), and for names longer than tars hold.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    keys: set[str] = set()
    try:
        with open(partial, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for key, members in samples:
                    if not key or "." in key or key in keys or not members:
                        raise ValueError(
                            f"{path}: a sample needs members and a key of its own without dots, not {key!r}"
                        )
                    keys.add(key)
                    for suffix, data in members.items():
                        member = tarfile.TarInfo(f"{key}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return len(keys)


def as_json(record: Any) -> bytes:
    """A record as the bytes of its KEY.json."""
    return json.dumps(record, separators=(",", ":")).encode()

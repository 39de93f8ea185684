"""WebDataset shards as we write them: equal samples, equal bytes, and a shard that is there is whole."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blip.files import whole

STARTS = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))


def write_tar(path: str | Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Writes the shard `path`, whole or not at all, and returns the number of its samples.

    A sample is (key, {suffix: bytes}): `("000017", {"jpg": ..., "json": ...})` becomes the members 000017.jpg and
    000017.json, in this order; `{"0.jpg": ..., "1.jpg": ..., "json": ...}` holds two pictures. Members have no time,
    owner or place of writing. A shard that is there is replaced. ValueError for a key that readers would take apart or
    put together with another (empty, with a dot behind its folder, met before), and for names longer than tars hold.
    """
    path = Path(path)
    keys: set[str] = set()
    with whole(path) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            name = key.rpartition("/")[2]
            if not name or "." in name or key in keys or not members:
                raise ValueError(f"{path}: a sample needs members and a key of its own without dots, not {key!r}")
            keys.add(key)
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return len(keys)


def picture_suffix(data: bytes) -> str | None:
    """What a member is to be called by what its bytes are; None for what is none of the pictures that shards hold."""
    return next((suffix for start, suffix in STARTS if data.startswith(start)), None)


def as_json(record: Any) -> bytes:
    """A record as the bytes of its KEY.json."""
    return json.dumps(record, separators=(",", ":")).encode()

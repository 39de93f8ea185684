"""A captioner and a scorer without a model, with the contracts of the real ones, for tests of what goes on around them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blip.capfilt import records
from blip.capfilt.generate import Written
from blip.capfilt.passes import Pass


class Namer:
    """Says the mean colour of a picture and a number drawn from its seed, `samples` times."""

    def __init__(self, samples: int = 1, image_size: int = 8, word: str = "colour") -> None:
        self.samples, self.image_size, self.word = samples, image_size, word
        self.fingerprint, self.decoding = f"namer {word}", {"strategy": "nucleus", "samples": samples}

    def write(self, pixels: Sequence[np.ndarray], seeds: Sequence[int]) -> list[list[Written]]:
        assert all(image.shape == (self.image_size, self.image_size, 3) for image in pixels)
        told = []
        for image, seed in zip(pixels, seeds, strict=True):
            drawn = np.random.default_rng(seed).integers(1000, size=self.samples).tolist()
            colour = image.mean((0, 1)).round().astype(int).tolist()
            told.append([Written(f"{self.word} {colour} {n}", -n / 100, n % 7 + 1) for n in drawn])
        return told


class Hasher:
    """A score from what picture and text are."""

    def __init__(self, image_size: int = 8, columns: tuple[str, ...] = ("itm", "itc")) -> None:
        self.image_size, self.columns, self.fingerprint = image_size, columns, "hasher"

    def score(self, pixels: Sequence[np.ndarray], texts: Sequence[Sequence[str]]) -> list[list[tuple[float, ...]]]:
        return [[self._one(image, text) for text in told] for image, told in zip(pixels, texts, strict=True)]

    def _one(self, image: np.ndarray, text: str) -> tuple[float, ...]:
        digest = hashlib.blake2b(image.tobytes() + text.encode()).digest()
        return tuple(byte / 256 for byte in digest[: len(self.columns)])


def made(shards: Any, folder: Path, **options: Any) -> Path:
    """The folder in which a pass of these shards has run."""
    Pass(shards, **({"batch_size": 4} | options)).run(folder)
    return folder


def told(folder: Path, **changed: Any) -> dict[str, Any]:
    """The manifest of a folder, without times."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for timed in (manifest, *manifest["shards"].values()):
        for key in [k for k in ("seconds", "pictures_per_s", "waited_for_data") if k in timed]:
            del timed[key]
    return manifest | changed


def content(folder: Path) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """File -> (its rows, its metadata without times)."""
    found = {}
    for path in records.files(folder):
        about = {k: v for k, v in records.about(path).items() if k not in ("seconds", "waited")}
        found[str(path.relative_to(folder))] = (records.read([path]).to_pylist(), about)
    return found

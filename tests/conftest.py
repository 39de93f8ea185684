"""What all tests share: the torchvision guard first, and the reference data where it exists."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import blip._torchvision  # noqa: F401


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference data ($BLIP_REFERENCE, by default `shared` beside the checkout)."""
    folder = Path(os.environ.get("BLIP_REFERENCE", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no reference data at {folder} (set BLIP_REFERENCE)")
    return folder

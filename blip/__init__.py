"""BLIP: bootstrapping language-image pre-training (Li et al., ICML 2022), from shards to captions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip.api import load

__all__ = ["load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # `import blip` stays light
    if name == "load":
        from blip.api import load

        return load
    raise AttributeError(f"module 'blip' has no attribute {name!r}")

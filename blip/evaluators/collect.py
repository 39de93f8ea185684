"""Brings what the ranks hold to every rank."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def from_all_ranks(items: list[T]) -> list[T]:
    """The lists of all ranks, one after the other; ranks may hold different numbers."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    parts: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]

"""Several ranks as threads of this process: what they exchange is exact, and starting them costs nothing.

What gloo does with real processes is tested in tests/tasks/test_pretrain.py and tests/evaluators/test_retrieval.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar
from unittest.mock import patch

from torch import Tensor

T = TypeVar("T")


class Exchange:
    """Stands where code looks for `torch.distributed`; a thread without a rank is alone."""

    def __init__(self, world: int) -> None:
        self.world, self.own = world, threading.local()
        self.barrier, self.table = threading.Barrier(world), [None] * world

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return hasattr(self.own, "rank")

    def get_rank(self) -> int:
        return self.own.rank

    def get_world_size(self) -> int:
        return self.world

    def all_gather_object(self, parts: list, item: Any) -> None:
        self.table[self.own.rank] = item
        self.barrier.wait()
        parts[:] = self.table
        self.barrier.wait()  # until all have read

    def all_gather(self, parts: list[Tensor], x: Tensor) -> None:
        found: list[Any] = [None] * self.world
        self.all_gather_object(found, x)
        for part, tensor in zip(parts, found, strict=True):
            part.copy_(tensor)

    def all_reduce(self, x: Tensor) -> None:
        found: list[Any] = [None] * self.world
        self.all_gather_object(found, x.clone())
        x.copy_(sum(found))


def as_ranks(world: int, function: Callable[[int], T]) -> list[T]:
    """What function(rank) gives on each of so many ranks, in rank order; the first error is raised."""
    exchange = Exchange(world)
    results: list[Any] = [None] * world
    errors: list[BaseException] = []

    def run(number: int) -> None:
        exchange.own.rank = number
        try:
            results[number] = function(number)
        except BaseException as error:
            errors.append(error)
            exchange.barrier.abort()  # the others shall not wait

    with ExitStack() as stack:
        for module in ("blip.tasks.distributed", "blip.evaluators.collect"):
            stack.enter_context(patch(f"{module}.dist", exchange))
        threads = [threading.Thread(target=run, args=(number,)) for number in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results

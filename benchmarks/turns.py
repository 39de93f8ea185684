"""Things timed turn by turn, each once a turn: what a shared machine does meanwhile, it does to all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


def clock(device: torch.device) -> float:
    """Seconds, once the device is done with what it was given.

    On a CPU those that this process was given, by its threads: a machine that is shared takes turns away, not speed.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


@dataclass(frozen=True)
class Turns:
    """Of each name its seconds, a turn each, and what it gave last."""

    times: dict[str, list[float]]
    given: dict[str, Any]

    def seconds(self, name: str) -> float:
        return statistics.median(self.times[name])

    def ratio(self, a: str, b: str) -> float:
        """Rate of a over that of b, the median of the turns."""
        return statistics.median(y / x for x, y in zip(self.times[a], self.times[b], strict=True))


def taken(runs: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> Turns:
    """Runs all of them in each turn and prints their seconds; a first turn, which warms caches and allocators, does not count."""
    turns = Turns({name: [] for name in runs}, {})
    for turn in range(-1, repeats):
        for name, run in runs.items():
            start = clock(device)
            turns.given[name] = run()
            if turn >= 0:
                turns.times[name].append(clock(device) - start)
    for name, found in turns.times.items():
        print(f"seconds, {name}: {', '.join(f'{seconds:.3f}' for seconds in found)}")
    return turns

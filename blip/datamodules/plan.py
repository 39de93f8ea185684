"""Which pair, when, on which rank: pure functions of numbers.

The order of a source is a sequence without end, made of passes. A pass permutes the shards, cuts them in windows of about
`window` pairs and permutes all pairs of a window; it depends on (seed, source, phase, pass) alone. An epoch of the stream takes
the next `pairs` of every source's sequence and interleaves them, block by block in fixed proportion. Global batch k is the
positions [k*G, (k+1)*G) of the epoch, G = ranks * batch, and rank r has the r-th part of it; a rest smaller than G is left
out. So (epoch, pairs consumed) is the whole state, and neither ranks nor workers change the order.

Permutations come from raw words of Philox and a stable sort: numpy promises that bit stream between versions, not the output of
`permutation`, and a checkpoint outlives a numpy.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

BLOCK = 4096  # positions over which the sources are interleaved in proportion
KEPT = 4  # windows, passes and blocks remembered


def _philox(*key: Any) -> np.random.Philox:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, dtype="<u8"))


def permutation(n: int, *key: Any) -> np.ndarray:
    """A permutation of range(n) that depends on `key` alone, [n] int64."""
    return np.argsort(_philox(*key).random_raw(n), kind="stable")


def generator(seed: int, epoch: int, position: int, purpose: str) -> np.random.Generator:
    """The random numbers of one sample for one purpose."""
    return np.random.Generator(_philox(seed, epoch, position, purpose))


def draw(n: int, *key: Any) -> int:
    """A number below n that depends on `key` alone."""
    return int(_philox(*key).random_raw()) * n >> 64


class Key(NamedTuple):
    """A position of an epoch and the bounds of the global batch it stands in: what the sampler asks of the dataset."""

    epoch: int
    position: int
    start: int
    stop: int


@dataclass(frozen=True)
class Phase:
    """Shards (numbers) that a source draws from until this share of the run."""

    until: float
    shards: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """One source of the stream, in numbers.

    counts: units (rows or pictures) in each of its shards
    epochs: how often an epoch of the stream goes through it; 0.2 is a fifth each epoch, in rotation
    weight: instead of `epochs`, its share of the stream's pairs
    phases: which shards from which share of the run on; none means all shards, always
    """

    name: str
    counts: np.ndarray
    fingerprint: str = ""
    epochs: float = 1.0
    weight: float | None = None
    phases: tuple[Phase, ...] = ()


@dataclass
class _Pass:
    """One pass over shards: their order, and the windows as running sums of shards and of pairs."""

    shards: np.ndarray
    window_shards: np.ndarray
    window_starts: np.ndarray


@dataclass
class Plan:
    """The order of a stream. `resolve(epoch, positions)` says which unit of which source stands where.

    total_pairs: length of the run, needed only where a source has phases
    """

    sources: Sequence[Source]
    seed: int
    window: int = 65536
    total_pairs: int | None = None
    pairs_by_source: list[int] = field(init=False)

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names) or any(set(name) & set(" =") or not name for name in names):
            raise ValueError(f"sources need names, each its own, without spaces and equal signs: {names}")
        self.pairs_by_source = pairs_by_source(self.sources)
        self.pairs = sum(self.pairs_by_source)
        self._starts = [np.concatenate([[0], np.cumsum(s.counts)]).astype(np.int64) for s in self.sources]
        self._memory: OrderedDict[tuple, Any] = OrderedDict()
        blocks = np.arange(max(1, self.pairs // BLOCK) + 1)
        # first ordinal of each source in each block, [sources, blocks + 1]; a block's start is their sum
        self._block_ordinals = np.array([blocks * n // blocks[-1] for n in self.pairs_by_source])
        self._block_starts = self._block_ordinals.sum(0)
        self._phases = [self._ranges(i) for i in range(len(self.sources))]

    def _ranges(self, i: int) -> list[tuple[int, np.ndarray]]:
        """Phases of a source as (first ordinal of its sequence, shards)."""
        source = self.sources[i]
        if not source.phases:
            return [(0, np.arange(len(source.counts)))]
        ends = [phase.until for phase in source.phases]
        if self.total_pairs is None:
            raise ValueError(f"source {source.name} has phases, shares of a run: say how long it is (data.total_pairs)")
        if ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1:
            raise ValueError(f"source {source.name}: phases must rise to `until: 1.0`, not {ends}")
        if empty := [phase.until for phase in source.phases if not source.counts[list(phase.shards)].sum()]:
            raise ValueError(f"source {source.name}: there is nothing in the shards of the phases until {empty}")
        ordinals = self.total_pairs * self.pairs_by_source[i] / self.pairs
        firsts = [0, *(round(end * ordinals) for end in ends[:-1])]
        return [(first, np.array(phase.shards)) for first, phase in zip(firsts, source.phases, strict=True)]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_memory": OrderedDict()}

    def resolve(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions [n] of an epoch -> (source [n], unit within the source [n])."""
        positions = np.asarray(positions, dtype=np.int64)
        if len(positions) and (positions.min() < 0 or positions.max() >= self.pairs):
            raise ValueError(f"positions {positions.min()} to {positions.max()} of an epoch of {self.pairs} pairs")
        sources, ordinals = self._interleave(epoch, positions)
        units = np.empty_like(positions)
        for i in np.unique(sources):
            here = sources == i
            units[here] = self._sequence(int(i), epoch * self.pairs_by_source[i] + ordinals[here])
        return sources, units

    def _interleave(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions -> (source, how many of that source came before in this epoch)."""
        if len(self.sources) == 1:
            return np.zeros_like(positions), positions
        blocks = np.searchsorted(self._block_starts, positions, side="right") - 1
        sources, ordinals = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks):
            labels, ranks = self._recall(("block", epoch, int(block)), partial(self._block, epoch, int(block)))
            here = blocks == block
            offsets = positions[here] - self._block_starts[block]
            sources[here] = labels[offsets]
            ordinals[here] = self._block_ordinals[labels[offsets], block] + ranks[offsets]
        return sources, ordinals

    def _block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        counts = self._block_ordinals[:, block + 1] - self._block_ordinals[:, block]
        labels = np.repeat(np.arange(len(counts)), counts)
        labels = labels[permutation(len(labels), self.seed, epoch, block, "sources")]
        ranks = np.empty_like(labels)
        for i, count in enumerate(counts):
            ranks[labels == i] = np.arange(count)
        return labels, ranks

    def _sequence(self, i: int, ordinals: np.ndarray) -> np.ndarray:
        """Places in the endless sequence of source i -> its units."""
        phases, passes, within = self._locate(i, ordinals)
        units = np.empty_like(ordinals)
        for phase, number in sorted(set(zip(phases.tolist(), passes.tolist(), strict=True))):
            here = (phases == phase) & (passes == number)
            units[here] = self._in_pass((i, phase, number), within[here])
        return units

    def _locate(self, i: int, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places in the sequence of source i -> (phase, pass of that phase, place in the pass)."""
        firsts = np.array([first for first, _ in self._phases[i]])
        lengths = np.array([self.sources[i].counts[shards].sum() for _, shards in self._phases[i]])
        phases = np.searchsorted(firsts, ordinals, side="right") - 1
        return phases, *np.divmod(ordinals - firsts[phases], lengths[phases])

    def _in_pass(self, key: tuple[int, int, int], within: np.ndarray) -> np.ndarray:
        one = self._pass(key)
        windows = np.searchsorted(one.window_starts, within, side="right") - 1
        units = np.empty_like(within)
        for window in np.unique(windows).tolist():
            order = self._recall(("window", *key, window), partial(self._window, key, one, window))
            here = windows == window
            units[here] = order[within[here] - one.window_starts[window]]
        return units

    def ahead(self, epoch: int, position: int) -> list[tuple[int, list[int]]]:
        """(source, its shards in the window after the one it has come to): what may be fetched ahead. Exact to a block."""
        block = np.searchsorted(self._block_starts, position, side="right") - 1
        coming = []
        for i, pairs in enumerate(self.pairs_by_source):
            gone = position if len(self.sources) == 1 else self._block_ordinals[i, block]
            (phase,), (number,), (within,) = (a.tolist() for a in self._locate(i, np.array([epoch * pairs + gone])))
            one = self._pass((i, phase, number))
            window = int(np.searchsorted(one.window_starts, within, side="right"))
            if window == len(one.window_starts) - 1:
                one, window = self._pass((i, phase, number + 1)), 0
            coming.append((i, one.shards[one.window_shards[window] : one.window_shards[window + 1]].tolist()))
        return coming

    def _pass(self, key: tuple[int, int, int]) -> _Pass:
        return self._recall(("pass", *key), lambda: self._cut(key))

    def _cut(self, key: tuple[int, int, int]) -> _Pass:
        """The pass (source, phase, number): its shards permuted, and cut in windows."""
        shards = self._phases[key[0]][key[1]][1]
        shards = shards[permutation(len(shards), self.seed, *key, "shards")]
        ends = np.cumsum(self.sources[key[0]].counts[shards])
        cuts, full = [0], 0
        for number, end in enumerate(ends.tolist(), start=1):
            # a window is closed when full, unless what is left would not fill another: a short last one joins
            if end - full >= self.window and ends[-1] - end >= self.window:
                cuts.append(number)
                full = end
        cuts.append(len(shards))
        return _Pass(shards, np.array(cuts), np.concatenate([[0], ends])[cuts])

    def _window(self, key: tuple[int, int, int], one: _Pass, window: int) -> np.ndarray:
        starts = self._starts[key[0]]
        shards = one.shards[one.window_shards[window] : one.window_shards[window + 1]]
        units = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards])
        return units[permutation(len(units), self.seed, *key, window, "window")]

    def _recall(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make` gives, remembered for the last few keys of a kind."""
        if key not in self._memory:
            self._memory[key] = make()
            same = [k for k in self._memory if k[0] == key[0]]
            if len(same) > KEPT * len(self.sources):
                del self._memory[same[0]]
        self._memory.move_to_end(key)
        return self._memory[key]

    @property
    def fingerprint(self) -> str:
        """All that decides the order, in words that can be compared: `name=value` parted by spaces."""
        parts = [f"seed={self.seed}", f"window={self.window}"]
        for source, pairs in zip(self.sources, self.pairs_by_source, strict=True):
            parts.append(f"{source.name}={source.fingerprint}:{pairs}")
            if source.phases:
                phases = hashlib.blake2b(repr(source.phases).encode(), digest_size=8).hexdigest()
                parts.append(f"{source.name}.phases={phases}:of-{self.total_pairs}-pairs")
        return " ".join(parts)


def pairs_by_source(sources: Sequence[Source]) -> list[int]:
    """Pairs of each source in an epoch: its units times `epochs`, or what its `weight` asks beside the others.

    Where all have weights an epoch ends when the first of them has been gone through once.
    """
    units = [int(source.counts.sum()) for source in sources]
    weighted = [i for i, source in enumerate(sources) if source.weight is not None]
    counts = [round(n * source.epochs) for n, source in zip(units, sources, strict=True)]
    weights = {i: float(sources[i].weight or 0) for i in weighted}
    if any(w <= 0 for w in weights.values()) or any(source.epochs <= 0 for source in sources):
        raise ValueError(
            f"weight and epochs of a source must be above 0: {[(s.name, s.weight, s.epochs) for s in sources]}"
        )
    if len(weighted) == len(sources):
        total = min(units[i] * sum(weights.values()) / weights[i] for i in weighted)
        share = {i: weights[i] / sum(weights.values()) for i in weighted}
    elif weighted:
        if sum(weights.values()) >= 1:
            raise ValueError(
                f"weights beside sources without are shares of the stream: {weights} leave nothing for these"
            )
        total = sum(n for i, n in enumerate(counts) if i not in weights) / (1 - sum(weights.values()))
        share = weights
    for i in weighted:
        counts[i] = math.floor(total * share[i] + 1e-6)
    if min(counts) < 1:
        raise ValueError(
            f"a source gives no pair in an epoch: {dict(zip([s.name for s in sources], counts, strict=True))}"
        )
    return counts


class Cursor:
    """How far the stream is: the only state. (epoch, pairs of it consumed by optimizer steps)."""

    def __init__(self, epoch: int = 0, pairs: int = 0) -> None:
        self.epoch, self.pairs = epoch, pairs


class TrainSampler:
    """Yields this rank's keys of each global batch from the cursor to the end of its epoch.

    Its length is the steps of the whole epoch, also when it begins in the middle: Lightning restores its batch index and
    would end the epoch early. The cursor is read when `iter` is called; at the end of an epoch it goes on with the next.
    """

    def __init__(self, pairs: int, batch_size: int, rank: int, world_size: int, cursor: Cursor) -> None:
        self.pairs, self.batch_size, self.rank, self.cursor = pairs, batch_size, rank, cursor
        self.step = batch_size * world_size
        if pairs < self.step:
            raise ValueError(
                f"{pairs} pairs an epoch are fewer than one step of {self.step} ({world_size} x {batch_size}): lower data.batch_size"
            )

    def _at(self) -> tuple[int, int]:
        if self.pairs - self.cursor.pairs < self.step:
            return self.cursor.epoch + 1, 0
        return self.cursor.epoch, self.cursor.pairs

    def __len__(self) -> int:
        _, position = self._at()
        return position // self.step + (self.pairs - position) // self.step

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, start = self._at()
        while self.pairs - start >= self.step:
            first = start + self.rank * self.batch_size
            yield [Key(epoch, p, start, start + self.step) for p in range(first, first + self.batch_size)]
            start += self.step


class EvaluationSampler:
    """Yields batches of rank r's pictures, every world_size-th from r on, in file order, none twice, none added."""

    def __init__(self, pictures: int, batch_size: int, rank: int, world_size: int) -> None:
        self.mine, self.batch_size = range(rank, pictures, world_size), batch_size

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for at in range(0, len(self.mine), self.batch_size):
            yield list(self.mine[at : at + self.batch_size])

"""Where the tokens of a batch of texts sit: packed for linear layers, on a padded grid for attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextLayout:
    """The places of T packed tokens on a grid of R texts by L positions.

    Linear layers and norms see `[T, D]`, only real tokens; attention sees `[R, L, D]`. `index` [T] is the place of each
    packed token in the flattened grid (R * L), `mask` [R, L] is True where the grid holds a token, `firsts` [R] is the
    place of each text's first token among the packed ones. `whole`: packed is the grid itself, so that nothing moves.
    `queries`: the grid on which tokens look at something, where it is another (`folded`); its rows are what they look at.
    """

    index: Tensor
    mask: Tensor
    firsts: Tensor
    whole: bool = False
    queries: TextLayout | None = None

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], longest: int | None = None) -> TextLayout:
        """The layout of texts that follow each other without gaps; `longest` widens the grid (default: the longest text)."""
        width = max(lengths) if longest is None else longest
        if min(lengths) < 1 or max(lengths) > width:
            raise ValueError(f"texts of {min(lengths)} to {max(lengths)} tokens do not fit a grid {width} wide")
        sizes = torch.as_tensor(lengths)
        mask = torch.arange(width) < sizes[:, None]  # [R, L]
        return cls(mask.flatten().nonzero().flatten(), mask, sizes.cumsum(0) - sizes)

    @classmethod
    def from_mask(cls, mask: Tensor) -> TextLayout:
        """The layout of a grid taken whole, [R, L]: places that hold no token are computed too, and never looked at.

        For texts chosen on the device, whose lengths the host does not know.
        """
        rows, longest = mask.shape
        everywhere = torch.arange(rows * longest, device=mask.device)
        return cls(everywhere, mask, everywhere[::longest], whole=True)

    @property
    def rows(self) -> int:
        return self.mask.shape[0]

    @property
    def longest(self) -> int:
        return self.mask.shape[1]

    def pad(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [R, L, ...], zero where no token sits."""
        if self.whole:
            return packed.unflatten(0, self.mask.shape)
        grid = packed.new_zeros(self.mask.numel(), *packed.shape[1:])
        return grid.index_copy(0, self.index, packed).unflatten(0, self.mask.shape)

    def pack(self, grid: Tensor) -> Tensor:
        """[R, L, ...] -> [T, ...]."""
        if self.whole:
            return grid.flatten(0, 1)
        return grid.flatten(0, 1).index_select(0, self.index)

    def beside(self, other: TextLayout) -> TextLayout:
        """Text r of both next to each other, 2R rows; packed, all tokens of this layout come before those of the other.

        Two texts that look at one picture lie side by side, so that they fold into one row of queries.
        """
        width = max(self.longest, other.longest)

        def place(layout: TextLayout, offset: int) -> Tensor:
            row, column = layout.index // layout.longest, layout.index % layout.longest
            return (2 * row + offset) * width + column

        def widen(mask: Tensor) -> Tensor:
            return torch.nn.functional.pad(mask, (0, width - mask.shape[1]))

        mask = torch.stack([widen(self.mask), widen(other.mask)], dim=1).flatten(0, 1)  # [2R, L]
        index = torch.cat([place(self, 0), place(other, 1)])
        return TextLayout(index, mask, torch.cat([self.firsts, other.firsts + self.index.shape[0]]))

    def folded(self, row: Tensor, rows: int) -> TextLayout:
        """The same texts, text r looking at thing row[r] (ascending) of `rows` in one row of queries with the others that do.

        However many texts look at each of several things, however long they are. Waits for the device.
        """
        owner = row[self.index // self.longest]  # [T]
        counts = torch.bincount(owner, minlength=rows)
        firsts, width = counts.cumsum(0) - counts, max(1, int(counts.max()))
        place = owner * width + torch.arange(len(owner), device=owner.device) - firsts[owner]
        queries = TextLayout(place, torch.arange(width, device=owner.device) < counts[:, None], firsts)
        return replace(self, queries=queries)

    def followed(self) -> Tensor:
        """Places of the packed tokens that another token of their text follows, [T - R]; no wait for the device.

        Only for layouts made by `from_lengths`, whose texts follow each other.
        """
        ends = (self.mask.sum(1) - 1).cumsum(0)  # [R]
        place = torch.arange(self.index.shape[0] - self.rows, device=self.index.device)
        return place + torch.searchsorted(ends, place, right=True)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TextLayout:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TextLayout:
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> TextLayout:
        queries = None if self.queries is None else self.queries._each(change)
        return TextLayout(change(self.index), change(self.mask), change(self.firsts), self.whole, queries)

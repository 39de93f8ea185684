"""Where the tokens of a batch of texts sit: packed for linear layers, on a padded grid for attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextLayout:
    """The places of T packed tokens on a grid of R texts by L positions.

    Linear layers and norms see `[T, D]`, only real tokens; attention sees `[R, L, D]`. `index` [T] is the place of each
    packed token in the flattened grid (R * L), `mask` [R, L] is True where the grid holds a token.
    """

    index: Tensor
    mask: Tensor

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], longest: int | None = None) -> TextLayout:
        """The layout of texts that follow each other without gaps; `longest` widens the grid (default: the longest text)."""
        width = max(lengths) if longest is None else longest
        if min(lengths) < 1 or max(lengths) > width:
            raise ValueError(f"texts of {min(lengths)} to {max(lengths)} tokens do not fit a grid {width} wide")
        mask = torch.arange(width) < torch.as_tensor(lengths)[:, None]  # [R, L]
        return cls(mask.flatten().nonzero().flatten(), mask)

    @property
    def rows(self) -> int:
        return self.mask.shape[0]

    @property
    def longest(self) -> int:
        return self.mask.shape[1]

    @property
    def firsts(self) -> Tensor:
        """Place of each text's first token among the packed ones, [R]."""
        lengths = self.mask.sum(1)
        return lengths.cumsum(0) - lengths

    def pad(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [R, L, ...], zero where no token sits."""
        grid = packed.new_zeros(self.mask.numel(), *packed.shape[1:])
        return grid.index_copy(0, self.index, packed).unflatten(0, self.mask.shape)

    def pack(self, grid: Tensor) -> Tensor:
        """[R, L, ...] -> [T, ...]."""
        return grid.flatten(0, 1).index_select(0, self.index)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TextLayout:
        move = {"device": device, "non_blocking": non_blocking}
        return TextLayout(self.index.to(**move), self.mask.to(**move))

    def pin_memory(self) -> TextLayout:
        return TextLayout(self.index.pin_memory(), self.mask.pin_memory())

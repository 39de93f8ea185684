"""NLVR2's network (paper section 5.4): is a statement about two pictures true?

- MED's encoder with a twin in place of each cross-attention: own query, key, value and output projections for each picture,
  one residual and one norm; a block knows nothing of it
- what the two looks found is averaged in the first blocks and merged by a linear layer in those from `merge_from` on
- the head reads the state of [ENC]: Linear, ReLU, Linear
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from blip.layout import TextLayout
from blip.modules.blip import Backbone, BLIPConfig
from blip.modules.losses import at_least_float32
from blip.modules.med import CrossKV, Look, MEDConfig


class Average(nn.Module):
    """[..., 2 W] to [..., W], half of each half."""

    def forward(self, both: Tensor) -> Tensor:
        first, second = both.chunk(2, -1)
        return (first + second) / 2


class TwinCrossAttention(nn.Module):
    """Tokens of a statement look at both pictures; residual and norm included.

    merge: what makes one of the two that were found, [T, 2 W] -> [T, W].
    """

    def __init__(self, config: MEDConfig, merge: nn.Module) -> None:
        super().__init__()
        self.halves = nn.ModuleList(Look(config) for _ in range(2))
        self.merge = merge
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def look(self, states: Tensor, mask: Tensor | None = None) -> CrossKV:
        """States [B, 2 N, look_width] of two pictures, one after the other, to keys and values in the same order."""
        first, second = (
            cast(Look, half).look(part) for half, part in zip(self.halves, states.chunk(2, 1), strict=True)
        )
        key, value = torch.cat([first.key, second.key], dim=2), torch.cat([first.value, second.value], dim=2)
        return CrossKV(key, value, None if mask is None else mask[:, None, None])

    def forward(self, x: Tensor, layout: TextLayout, cross: CrossKV) -> Tensor:
        keys, values = cross.key.chunk(2, 2), cross.value.chunk(2, 2)  # [B, H, N, d] of each picture
        masks = (None, None) if cross.mask is None else cross.mask.chunk(2, -1)
        sides = map(CrossKV, keys, values, masks)
        found = [half(x, layout, side) for half, side in zip(self.halves, sides, strict=True)]
        return self.norm(x + self.dropout(self.merge(torch.cat(found, -1))))


def merges_from(tensors: Iterable[str]) -> int:
    """The number of the first block that merges, told by the names of a model's tensors; that of the blocks where none does."""
    found = [re.search(r"\bmed\.encoder\.(\d+)\.cross_attention\.(merge)?", name) for name in tensors]
    merging = [int(place[1]) for place in found if place and place[2]]
    return min(merging, default=1 + max((int(place[1]) for place in found if place), default=-1))


class NLVR(Backbone):
    """Image encoder, MED's encoder with twins, and a head of two classes, index 1 = true (released: `BLIP_NLVR`)."""

    def __init__(self, config: BLIPConfig, merge_from: int) -> None:
        super().__init__(config, encoder=True, decoder=False)
        width = config.med.width
        for number, block in enumerate(self.med.blocks()):
            merge = nn.Linear(2 * width, width) if number >= merge_from else Average()
            twin = TwinCrossAttention(config.med, merge).apply(self.med.initialise)
            block.cross_attention = twin  # type: ignore[assignment]  # what a block looks with is not its affair
        self.nlvr_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    def nlvr_logits(self, image: Tensor, input_ids: Tensor, layout: TextLayout, row: Tensor | None = None) -> Tensor:
        """Normalised pictures [B, 2, 3, S, S] and R statements to logits [R, 2]; [ENC] replaces [CLS].

        row [R], ascending: the pictures that each statement is about; None: one statement for each two pictures.
        """
        cross = self.med.look(self.image_states(image))
        grid = layout if row is None else layout.folded(row, image.shape[0])
        states = self.med.encode(input_ids.index_fill(0, layout.firsts, self.config.enc_id), grid, cross)  # [T, D]
        return at_least_float32(self.nlvr_head(states[layout.firsts]))

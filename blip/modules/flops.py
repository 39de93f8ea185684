"""What one pre-training step computes, in closed form (one multiply-add = 2 FLOPs).

- counted as executed: attention on the padded grid, linear layers on packed tokens, hard negative texts padded; a causal
  text attends to its whole row, since that is how the products are formed
- matrix products and convolutions only; norms, activations, softmaxes and the optimizer are left out, as is customary
- backward is twice forward, less the gradients that nobody asks for (of the picture, of the momentum features)
- what activation checkpointing computes a second time is not counted: utilisation speaks of useful work
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from blip.modules.blip import BLIPConfig
from blip.modules.med import MEDConfig
from blip.modules.vit import ViTConfig, stem_widths


@dataclass(frozen=True)
class Part:
    """FLOPs of one part of the step, for the whole batch."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


def trained(forward: int) -> Part:
    """A part whose inputs and weights both get gradients: each costs as much as the forward pass."""
    return Part(forward, 2 * forward)


def stem_flops(vit: ViTConfig) -> tuple[int, int]:
    """One picture through the layer that sees its pixels, and through the rest of the stem."""
    patches = vit.tokens - 1
    if vit.stem == "patch":
        return 2 * patches * 3 * vit.patch_size**2 * vit.width, 0
    widths = [3, *stem_widths(vit.width, vit.patch_size)]
    sides = [vit.image_size >> step for step in range(1, len(widths))]
    first, *rest = (
        2 * 9 * side**2 * narrow * wide for side, (narrow, wide) in zip(sides, pairwise(widths), strict=True)
    )
    return first, sum(rest) + 2 * patches * widths[-1] * vit.width


def blocks_flops(vit: ViTConfig) -> int:
    """One picture through the blocks of the image encoder."""
    n, width = vit.tokens, vit.width
    linear = 8 * width**2 + 4 * width * int(width * vit.mlp_ratio)
    return vit.depth * (n * linear + 4 * n**2 * width)


def text_flops(med: MEDConfig, tokens: int, rows: int, longest: int, looked_at: int = 0) -> int:
    """Texts of `tokens` in all, on a grid of rows by longest, through one mode of MED.

    `looked_at`: how many states each text looks at; projecting them to keys and values is `look_flops`.
    """
    linear = 8 * med.width**2 + 4 * med.width * med.mlp_width
    attention = 4 * longest * med.width
    if looked_at:
        linear += 4 * med.width**2
        attention += 4 * looked_at * med.width
    return med.depth * (tokens * linear + rows * longest * attention)


def look_flops(med: MEDConfig, states: int) -> int:
    """States projected to the keys and values of each block."""
    return med.depth * states * 4 * med.look_width * med.width


def pretraining_flops(
    config: BLIPConfig,
    batch: int,
    tokens: int,
    longest: int,
    keys: int,
    itm: bool = True,
    gathered_width: int | None = None,
) -> dict[str, Part]:
    """The parts of one step over `batch` pairs whose texts have `tokens` in all and `longest` at most.

    keys: columns of the similarities (keys of the batch and of the queue). itm: whether matching takes part yet.
    gathered_width: with negatives from other ranks the width that texts are padded to; the drawn pictures are then projected.
    """
    vit, med, n = config.vit, config.med, config.vit.tokens
    pixels, rest = (batch * flops for flops in stem_flops(vit))
    image = rest + batch * blocks_flops(vit)
    text = text_flops(med, tokens, batch, longest)
    projections = 2 * batch * config.embed_width * (vit.width + med.width)
    similarities = 2 * 2 * batch * keys * config.embed_width  # in both directions
    # One projection serves encoder and decoder where they share the cross-attention.
    looks = 1 if not itm or med.share in ("all", "all_but_sa") else 2
    parts = {
        "image encoder": Part(pixels + image, pixels + 2 * image),
        "text encoder": trained(text),
        "momentum image encoder": Part(pixels + image, 0),
        "momentum text encoder": Part(text, 0),
        # The momentum features get no gradient: similarities have half a backward pass, the momentum's none.
        "ITC": Part(2 * projections + 2 * similarities, 2 * projections + similarities),
        "keys and values": trained(looks * look_flops(med, batch * n)),
    }
    if itm:
        width = longest if gathered_width is None else gathered_width
        head = 2 * batch * med.width * 2
        # Pair and negative text lie side by side, so both stand on the wider grid.
        both = max(longest, width)
        drawn = 0 if gathered_width is None else look_flops(med, batch * n)
        parts |= {
            "ITM pairs": trained(text_flops(med, tokens, batch, both, n) + head),
            "ITM negative texts": trained(text_flops(med, batch * width, batch, both, n) + head),
            "ITM negative pictures": trained(text_flops(med, tokens, batch, longest, n) + head + drawn),
        }
    return parts | {
        "LM": trained(text_flops(med, tokens, batch, longest, n)),
        "LM head": trained((tokens - batch) * 2 * med.width * (med.width + med.vocab_size)),
    }


def counter() -> FlopCounterMode:
    """torch's counter of what really runs, with formulas for the CPU's fused attention, which it lacks.

    A fused backward pass forms the scores once more, so that it counts 2.5 forward passes, and not 2.
    """
    aten = torch.ops.aten
    missing = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=missing)

"""Small models and texts that the tests of the modules share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip.layout import TextLayout
from blip.modules.blip import BLIP, BLIPConfig
from blip.modules.med import MEDConfig
from blip.modules.vit import ViTConfig

VOCABULARY = 60


def small_config(share: str = "all_but_sa", width: int = 32, look_width: int = 48, **med: Any) -> BLIPConfig:
    """Two blocks a side, heads of 8, pictures of 32 px in 8 px patches, no dropout unless told."""
    rest = {"dropout": 0.0, "attention_dropout": 0.0} | med
    text = MEDConfig(VOCABULARY, width, 2, width // 8, 2 * width, 24, look_width, share, init_std=0.2, **rest)
    return BLIPConfig(ViTConfig(32, 8, look_width, 2, look_width // 8, 0.0), text, 16, 0.07, 58, 59)


def small_model(share: str = "all_but_sa", encoder: bool = True, decoder: bool = True, **kwargs: Any) -> BLIP:
    torch.manual_seed(0)
    return BLIP(small_config(share, **kwargs), encoder, decoder).double().eval()


def texts(*lengths: int, seed: int = 0) -> tuple[Tensor, TextLayout]:
    """Packed ids [T] of texts [CLS] ... [SEP] of these lengths, and their layout."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(5, VOCABULARY - 2, (length,), generator=generator) for length in lengths]
    for row in rows:
        row[0], row[-1] = 2, 3
    return torch.cat(rows), TextLayout.from_lengths(lengths)


def pictures(count: int, seed: int = 0) -> Tensor:
    """Normalised images [B, 3, 32, 32], float64."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

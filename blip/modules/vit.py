"""The image encoder: timm's Vision Transformer under BLIP's names and our sizes.

- parameter names are timm's, which are also the released checkpoint's
- all token states after the final norm come out, [B, N, D]; position 0 is [CLS]
- attention goes through `attend`; the last `checkpoint_blocks` blocks may be recomputed in the backward pass
- `stem: conv` replaces the single patch projection by strided convolutions, for small models trained from nothing
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip.modules.attention import attend

# CLIP's statistics: the released code uses them although its ViT starts from ImageNet.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of the image encoder (paper section 4.1; released: ViT-B/16 and ViT-L/16)."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    drop_path: float
    stem: str = "patch"
    mlp_ratio: float = 4.0
    checkpoint_blocks: int = 0

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1


class ImageAttention(nn.Module):
    """Self-attention of the ViT's blocks, with timm's parameter names."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, **_: Any) -> None:
        super().__init__()
        self.heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, N, 3, H, d]
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, d]
        return self.proj(attend(query, key, value, attn_mask, is_causal).transpose(1, 2).flatten(2))


def stem_widths(width: int, patch_size: int) -> list[int]:
    """Channels after each convolution of the stem; each halves the picture, so their number is log2 of the patch."""
    steps = patch_size.bit_length() - 1
    if 2**steps != patch_size:
        raise ValueError(
            f"stem 'conv' halves the image at each step: patch_size must be a power of 2, not {patch_size}"
        )
    return [min(width, 32 << i) for i in range(steps)]


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2 down to one token a patch, [B, 3, S, S] -> [B, (S/P)^2, D]."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any) -> None:
        super().__init__()
        widths = [in_chans, *stem_widths(embed_dim, patch_size)]
        self.num_patches = (img_size // patch_size) ** 2
        self.grid_size = (img_size // patch_size,) * 2
        self.patch_size = (patch_size, patch_size)
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            convolution = nn.Conv2d(narrow, wide, 3, stride=2, padding=1)
            nn.init.kaiming_normal_(convolution.weight)
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
            layers += [convolution, nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.proj = nn.Linear(widths[-1], embed_dim)

    def forward(self, image: Tensor) -> Tensor:
        x = self.convolutions(image)
        return self.proj(x.flatten(2).transpose(1, 2))


class VisionTransformer(TimmVisionTransformer):
    """timm's ViT without head: normalised images [B, 3, S, S] to states [B, N, D] after the final norm."""

    def __init__(self, config: ViTConfig) -> None:
        if config.stem not in ("patch", "conv"):
            raise ValueError(f"model.vit.stem must be 'patch' or 'conv', not {config.stem!r}")
        super().__init__(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            drop_path_rate=config.drop_path,
            num_classes=0,
            global_pool="",
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            attn_layer=ImageAttention,
            embed_layer=ConvStem if config.stem == "conv" else PatchEmbed,
        )
        self.config = config

    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
        x = self._pos_embed(self.patch_embed(image))  # [B, N, D]
        plain = len(self.blocks) - self.config.checkpoint_blocks
        for i, block in enumerate(self.blocks):
            if i >= plain and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)


@cache  # copied to a device once: each copy of a list of numbers would wait for it
@torch.inference_mode(False)
def statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels on the scale of 0 to 255, [3, 1, 1] each, float32."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (IMAGE_MEAN, IMAGE_STD))
    return mean, std


def normalize(image: Tensor) -> Tensor:
    """uint8 pictures [B, 3, S, S] to the zero-mean, unit-variance values that the encoder takes, float32."""
    mean, std = statistics(image.device)
    return (image.float() - mean) / std


def denormalize(image: Tensor) -> Tensor:
    """The uint8 pictures that `normalize` was given."""
    mean, std = statistics(image.device)
    return (image * std + mean).round().clamp(0, 255).to(torch.uint8)


def resize_position_embedding(table: Tensor, grid: int) -> Tensor:
    """A position table [1, 1 + g*g, D] resized to [1, 1 + grid*grid, D], bicubic; the row of [CLS] is kept as it is."""
    first, rest = table[:, :1], table[:, 1:]
    side = round(rest.shape[1] ** 0.5)
    if side * side != rest.shape[1]:
        raise ValueError(f"a position table of {rest.shape[1]} patches is not square")
    if side == grid:
        return table
    picture = rest.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, D, g, g]
    picture = F.interpolate(picture, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([first, picture.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)

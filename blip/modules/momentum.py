"""The momentum encoder and the queue of its features (MoCo's, as ALBEF and BLIP use them for ITC)."""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.layout import TextLayout
from blip.modules.blip import BLIP
from blip.modules.losses import at_least_float32


class MomentumEncoder(nn.Module):
    """A slow copy of what makes image and text features: theta_m <- m theta_m + (1 - m) theta.

    The copy's text encoder never looks at pictures, so it carries no cross-attention. No gradient reaches it. `dropout`:
    whether its dropout and drop path act in training, as in the released code.
    """

    def __init__(self, model: BLIP, dropout: bool) -> None:
        super().__init__()
        self.dropout = dropout
        self.visual_encoder = deepcopy(model.visual_encoder)
        self.vision_proj = deepcopy(model.vision_proj)
        self.text_proj = deepcopy(model.text_proj)
        self.embeddings = deepcopy(model.med.embeddings)
        self.self_attentions = nn.ModuleList(deepcopy(block.self_attention) for block in model.med.blocks())
        self.feed_forwards = nn.ModuleList(deepcopy(block.feed_forward) for block in model.med.blocks())
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> MomentumEncoder:
        return super().train(mode and self.dropout)

    @torch.no_grad()
    def copy_from(self, model: BLIP) -> None:
        """Starts anew as an exact copy of the online encoders."""
        self.update(model, 0.0)

    @torch.no_grad()
    def update(self, model: BLIP, momentum: float) -> None:
        """One step of the moving average over all parameters, fused."""
        med = model.med
        online: list[Tensor] = [
            *model.visual_encoder.parameters(),
            *model.vision_proj.parameters(),
            *model.text_proj.parameters(),
            *med.embeddings.parameters(),
            *(p for block in med.blocks() for p in block.self_attention.parameters()),
            *(p for block in med.blocks() for p in block.feed_forward.parameters()),
        ]
        torch._foreach_lerp_(list(self.parameters()), online, 1.0 - momentum)

    @torch.no_grad()
    def forward(self, image: Tensor, input_ids: Tensor, layout: TextLayout) -> tuple[Tensor, Tensor]:
        """Normalised images [B, 3, S, S] and texts to unit vectors [B, E] and [R, E], float32."""
        image_features = at_least_float32(self.vision_proj(self.visual_encoder(image)[:, 0]))
        x = self.embeddings(input_ids, layout.index % layout.longest)
        for self_attention, feed_forward in zip(self.self_attentions, self.feed_forwards, strict=True):
            x = feed_forward(self_attention(x, layout, False))
        text_features = at_least_float32(self.text_proj(x[layout.firsts]))
        return F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)


class Queue(nn.Module):
    """The last `size` momentum features of pictures and texts, and which picture each shows; -1 marks a start value."""

    image: Tensor
    text: Tensor
    ids: Tensor
    place: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("image", F.normalize(torch.randn(size, width), dim=-1))
        self.register_buffer("text", F.normalize(torch.randn(size, width), dim=-1))
        self.register_buffer("ids", torch.full((size,), -1, dtype=torch.long))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, image_features: Tensor, text_features: Tensor, image_ids: Tensor) -> None:
        """Puts [G, E] features in place of the oldest, first in first out; any G goes with any size."""
        if self.size == 0:
            return
        count = image_ids.shape[0]
        kept = slice(max(0, count - self.size), None)
        places = (self.place + torch.arange(count, device=image_ids.device)[kept]) % self.size
        self.image.index_copy_(0, places, image_features[kept].to(self.image.dtype))
        self.text.index_copy_(0, places, text_features[kept].to(self.text.dtype))
        self.ids.index_copy_(0, places, image_ids[kept])
        self.place.copy_((self.place + count) % self.size)

"""The whole model: image encoder and MED, which every task has, then the heads of pre-training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip.layout import TextLayout
from blip.modules.losses import at_least_float32
from blip.modules.med import MED, CrossKV, MEDConfig
from blip.modules.vit import VisionTransformer, ViTConfig

TEMPERATURE_RANGE = (0.001, 0.5)


@dataclass(frozen=True)
class BLIPConfig:
    """Everything that decides the parameters; `embed_width` is the width of the common space (paper: 256)."""

    vit: ViTConfig
    med: MEDConfig
    embed_width: int
    temperature: float
    dec_id: int
    enc_id: int

    def __post_init__(self) -> None:
        for name in ("dec_id", "enc_id"):
            if not 0 <= getattr(self, name) < self.med.vocab_size:
                raise ValueError(f"{name}={getattr(self, name)} lies outside the vocabulary of {self.med.vocab_size}")


class Backbone(nn.Module):
    """Image encoder and MED, without heads but MED's own."""

    def __init__(self, config: BLIPConfig, encoder: bool = True, decoder: bool = True) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = VisionTransformer(config.vit)
        self.med = MED(config.med, encoder, decoder)

    def compile(self, compiler: Callable[[Callable], Callable]) -> None:  # type: ignore[override]
        """Replaces the image encoder and each mode of MED by what `compiler` makes of them."""
        self.visual_encoder.forward = compiler(self.visual_encoder.forward)  # type: ignore[method-assign]
        self.med.encode = compiler(self.med.encode)  # type: ignore[method-assign]
        self.med.decode = compiler(self.med.decode)  # type: ignore[method-assign]

    def image_states(self, image: Tensor) -> Tensor:
        """Normalised pictures [B, 3, S, S] to states [B, N, D]; clips [B, F, 3, S, S] to those of all frames, [B, F*N, D]."""
        if image.dim() == 4:
            return self.visual_encoder(image)
        return self.visual_encoder(image.flatten(0, 1)).unflatten(0, image.shape[:2]).flatten(1, 2)

    def lm_states(self, input_ids: Tensor, layout: TextLayout, cross: list[CrossKV]) -> Tensor:
        """Texts looking at something to the decoder's states [T, D]; mode `decoder`, [DEC] replaces [CLS]."""
        return self.med.decode(input_ids.index_fill(0, layout.firsts, self.config.dec_id), layout, cross)


class BLIP(Backbone):
    """The backbone with the heads of the three objectives (paper figure 2)."""

    def __init__(self, config: BLIPConfig, encoder: bool = True, decoder: bool = True) -> None:
        super().__init__(config, encoder, decoder)
        if encoder:
            self.vision_proj = nn.Linear(config.vit.width, config.embed_width)
            self.text_proj = nn.Linear(config.med.width, config.embed_width)
            self.itm_head = nn.Linear(config.med.width, 2)
            self.temperature = nn.Parameter(torch.tensor(float(config.temperature)))

    def image_features(self, image_states: Tensor) -> Tensor:
        """States of pictures [B, N, D], or of all frames of clips [B, F*N, D], to unit vectors [B, E], float32.

        A clip's are the mean of its frames' (released code).
        """
        frames = at_least_float32(self.vision_proj(image_states[:, :: self.config.vit.tokens]))  # [B, F, E]
        return F.normalize(frames.mean(1), dim=-1)

    def text_features(self, input_ids: Tensor, layout: TextLayout) -> Tensor:
        """Texts that begin with [CLS] to unit vectors [R, E], float32; mode `text`."""
        states = self.med.encode(input_ids, layout)
        return F.normalize(at_least_float32(self.text_proj(states[layout.firsts])), dim=-1)

    def itm_logits(self, input_ids: Tensor, layout: TextLayout, cross: list[CrossKV]) -> Tensor:
        """Texts looking at pictures to logits [R, 2], index 1 = match; mode `multimodal`, [ENC] replaces [CLS]."""
        input_ids = input_ids.index_fill(0, layout.firsts, self.config.enc_id)
        return at_least_float32(self.itm_head(self.med.encode(input_ids, layout, cross)[layout.firsts]))

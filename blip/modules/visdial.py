"""Visual dialogue (paper section 5.5): does a candidate answer fit the dialogue, its picture and the picture's caption?

The paper describes it in two sentences and its code was never released. Picture and caption are encoded each for itself, and
the dialogue (history, question, candidate) looks at the states of both, one behind the other; a matching head as ITM's judges.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blip.layout import TextLayout
from blip.modules.blip import Backbone, BLIPConfig
from blip.modules.losses import at_least_float32
from blip.modules.med import CrossKV


class VisDial(Backbone):
    """Image encoder, text encoder in both its modes, and the matching head; no decoder.

    ValueError where pictures and texts differ in width: one cross-attention looks at the states of both.
    """

    def __init__(self, config: BLIPConfig) -> None:
        if config.vit.width != config.med.width:
            raise ValueError(
                "visual dialogue looks at picture and caption with one cross-attention, so that model.vit.width="
                f"{config.vit.width} and model.med.width={config.med.width} must be equal (as in model=base)"
            )
        super().__init__(config, decoder=False)
        self.itm_head = nn.Linear(config.med.width, 2)

    def look(self, image_states: Tensor, caption_ids: Tensor, captions: TextLayout) -> list[CrossKV]:
        """Pictures [B, N, D] and a caption of each ([CLS] ... [SEP], mode `text`) to what dialogues about them look at."""
        caption_states = captions.pad(self.med.encode(caption_ids, captions))  # [B, L, D]
        mask = torch.cat([captions.mask.new_ones(image_states.shape[:2]), captions.mask], dim=1)
        return self.med.look(torch.cat([image_states, caption_states], dim=1), mask)

    def match_logits(self, input_ids: Tensor, layout: TextLayout, cross: list[CrossKV]) -> Tensor:
        """Dialogues [CLS] history question candidate [SEP] to logits [R, 2], index 1 = fits; [ENC] replaces [CLS]."""
        input_ids = input_ids.index_fill(0, layout.firsts, self.config.enc_id)
        return at_least_float32(self.itm_head(self.med.encode(input_ids, layout, cross)[layout.firsts]))

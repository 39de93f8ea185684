"""Writing texts with the decoder: one token a step over preallocated caches, the picture's keys and values projected once."""

from __future__ import annotations

import torch
from torch import Tensor

from blip.layout import TextLayout
from blip.modules.blip import BLIP

LOOK_EVERY = 4  # how many tokens to write between two looks at whether every text has ended (a wait for the device)


@torch.no_grad()
def greedy(model: BLIP, image_states: Tensor, prompt: list[int], max_length: int, end: int, pad: int) -> Tensor:
    """The likeliest next token each time: ids [B, L] that begin with [DEC] and the prompt, `pad` after the `end`.

    image_states: [B, N, D]; prompt: ids of its words without special tokens, the same for all; max_length counts [DEC] and
    the prompt, as the released code does.
    """
    med = model.med
    cross = med.look(image_states, decoder=True)
    rows, device = image_states.shape[0], image_states.device
    ids = torch.full((rows, max_length), pad, device=device)
    ids[:, : 1 + len(prompt)] = torch.tensor([model.config.dec_id, *prompt], device=device)
    caches = med.caches(rows, max_length, cross[0].key)
    running = torch.ones(rows, dtype=torch.bool, device=device)
    written = 1 + len(prompt)
    step = ids[:, :written]
    while written < max_length:
        layout = TextLayout.from_mask(torch.ones_like(step, dtype=torch.bool))
        states = med.decode(step.flatten(), layout, cross, caches).unflatten(0, step.shape)[:, -1]  # [B, D]
        chosen = torch.where(running, med.lm_head(states).argmax(-1), pad)
        ids[:, written] = chosen
        running = running & (chosen != end)
        written += 1
        step = chosen[:, None]
        if written % LOOK_EVERY == 0 and not running.any():
            break
    return ids[:, :written]

"""Captioning (paper section 5.2): the decoder goes on with the language model alone, each text behind a prompt.

The prompt is put in here, so that data know nothing of it and evaluation writes behind the same words. It is read and never
asked for: the loss begins at the caption's first word, as released.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip.layout import TextLayout
from blip.modules.flops import Part, blocks_flops, look_flops, stem_flops, text_flops, trained
from blip.modules.losses import lm_loss
from blip.modules.vit import denormalize
from blip.tasks.base import Task
from blip.tasks.distributed import mean_over_ranks


class CaptionTask(Task):
    """Fine-tunes image encoder and decoder on captions of at most `max_tokens`, [CLS] and [SEP] among them, the prompt not.

    prompt: words before every caption. The other arguments are `Task`'s.
    """

    encoder = False

    def __init__(self, prompt: str, label_smoothing: float, max_tokens: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        positions = self.model.config.med.positions
        self.prompt = self.tokenizer.encode([prompt], positions)[0][1:-1]
        if max_tokens + len(self.prompt) > positions:
            raise ValueError(
                f"data.max_tokens={max_tokens} and {len(self.prompt)} pieces of task.prompt are more than the {positions} of "
                "model.med.positions"
            )
        self.label_smoothing = label_smoothing

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        model = self.model
        cross = model.med.look(model.visual_encoder(batch.image), decoder=True)
        input_ids, layout, followed = prompted(batch.input_ids, batch.layout, self.prompt)
        states = model.lm_states(input_ids, layout, cross)
        targets = input_ids[followed + 1]
        count = mean_over_ranks(torch.full((), float(targets.shape[0]), device=states.device))
        loss = lm_loss(model.med.lm_head(states[followed]), targets, self.label_smoothing, count)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=batch.image.shape[0])
        return loss

    @torch.no_grad()
    def gallery(self, batch: Any) -> list[dict[str, Any]]:
        """A card for each picture: image uint8 [H, W, 3], true and generated caption."""
        pictures = denormalize(batch.image).permute(0, 2, 3, 1).cpu().numpy()
        rows = zip(pictures, batch.references, self._captions(batch), strict=True)
        return [{"image": picture, "true": true[0], "generated": said[0].text} for picture, true, said in rows]

    def flops_per_pair(self, batch: Any) -> float:
        """Forward and backward of a step over this batch on this rank, by its pairs; from shapes alone, so nothing waits."""
        vit, med, size = self.model.config.vit, self.model.config.med, batch.image.shape[0]
        told = batch.layout.index.shape[0] - size
        tokens, longest = told + size * (1 + len(self.prompt)), batch.layout.longest + len(self.prompt)
        pixels, rest = stem_flops(vit)
        image = rest + blocks_flops(vit)
        parts = [
            Part(size * (pixels + image), size * (pixels + 2 * image)),
            trained(look_flops(med, size * vit.tokens)),
            trained(text_flops(med, tokens, size, longest, vit.tokens)),
            trained(told * 2 * med.width * (med.width + med.vocab_size)),
        ]
        return sum(part.total for part in parts) / size


def prompted(input_ids: Tensor, layout: TextLayout, prompt: list[int]) -> tuple[Tensor, TextLayout, Tensor]:
    """Packed texts `[CLS] ... [SEP]` with a prompt behind the [CLS], and the places of the tokens before those to be told.

    input_ids [T] in a layout made by `from_lengths`; ids [T + R * p]; places [T - R]: the prompt's last word, then the
    caption's, and not the [SEP]. No wait for the device.
    """
    size, device = len(prompt), input_ids.device
    row, column = layout.index // layout.longest, layout.index % layout.longest  # [T]
    behind = size * (row + (column > 0)) + torch.arange(input_ids.shape[0], device=device)
    rows = torch.arange(layout.rows, device=device)
    firsts = layout.firsts + size * rows
    words = firsts[:, None] + 1 + torch.arange(size, device=device)  # [R, p]
    ids = input_ids.new_empty(input_ids.shape[0] + layout.rows * size)
    ids[behind] = input_ids
    ids[words] = torch.tensor(prompt, dtype=ids.dtype, device=device)
    width = layout.longest + size
    index = torch.empty_like(ids)
    index[behind] = row * width + column + size * (column > 0)
    index[words] = rows[:, None] * width + 1 + torch.arange(size, device=device)
    mask = torch.cat([layout.mask.new_ones(layout.rows, size), layout.mask], 1)
    followed = layout.followed()
    return ids, TextLayout(index, mask, firsts), followed + size * (row[followed] + 1)

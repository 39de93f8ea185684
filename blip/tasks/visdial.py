"""Fine-tuning for visual dialogue (paper section 5.5): which of the candidate answers belongs to a round."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blip.modules.blip import BLIPConfig
from blip.modules.flops import Part, blocks_flops, look_flops, stem_flops, text_flops, trained
from blip.modules.visdial import VisDial
from blip.modules.vit import denormalize
from blip.tasks.base import Task


class VisDialTask(Task):
    """Trains on `RoundBatch`es, the same number of candidates for each round; starts from a pre-trained model or a dialogue's.

    Each candidate is judged for itself, as ITM judges a pair: cross-entropy of two classes, mean over all candidates. That
    there are more false ones than true moves all their log-odds alike, which no ranking sees. max_tokens: of a dialogue
    with its candidate. The other arguments are `Task`'s.
    """

    def __init__(self, max_tokens: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if max_tokens > (positions := self.model.config.med.positions):
            raise ValueError(f"data.max_tokens={max_tokens} is more than the {positions} of model.med.positions")

    def make_model(self, config: BLIPConfig) -> VisDial:
        return VisDial(config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        model = self.model
        cross = model.look(model.visual_encoder(batch.image), batch.caption_ids, batch.caption_layout)
        # The candidates of a round lie side by side: they fold into the queries of its picture.
        logits = model.match_logits(batch.input_ids, batch.layout, cross)  # [B*C, 2]
        loss = F.cross_entropy(logits, batch.labels)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=batch.image.shape[0])
        return loss

    @torch.no_grad()
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """A row for each round: the key of its picture, its number, question, the best candidate, the rank of each from 1."""
        rows = zip(batch.keys, batch.rounds, self.scores(batch), strict=True)
        return [
            {
                "key": key,
                "round": entry.get("round"),
                "question": entry["question"],
                "answer": entry["options"][int(scores.argmax())],
                "ranks": (scores.argsort(descending=True, stable=True).argsort() + 1).tolist(),
            }
            for key, entry, scores in rows
        ]

    @torch.no_grad()
    def gallery(self, batch: Any) -> list[dict[str, Any]]:
        """A card for each round: its picture uint8 [H, W, 3], its question with the human's answer, and the best candidate."""
        pictures = denormalize(batch.image).permute(0, 2, 3, 1).cpu().numpy()
        return [
            {
                "image": picture,
                "true": f"{entry['question']} {entry['options'][entry['answer_index']]}",
                "generated": entry["options"][int(scores.argmax())],
            }
            for picture, entry, scores in zip(pictures, batch.rounds, self.scores(batch), strict=True)
        ]

    def scores(self, batch: Any) -> Tensor:
        if "visdial" not in self.evaluators:
            raise ValueError("candidates are ranked as task.evaluators.visdial says, and there is no such evaluator")
        return self.evaluators["visdial"].scores(self.model, batch)

    def flops_per_pair(self, batch: Any) -> float:
        """Forward and backward of a step over this batch on this rank, by its rounds; from shapes alone, so nothing waits."""
        vit, med, size = self.model.config.vit, self.model.config.med, batch.image.shape[0]
        captions, layout = batch.caption_layout, batch.layout
        looked_at = vit.tokens + captions.longest
        pixels, rest = stem_flops(vit)
        image = rest + blocks_flops(vit)
        parts = [
            Part(size * (pixels + image), size * (pixels + 2 * image)),
            trained(text_flops(med, captions.index.shape[0], size, captions.longest)),
            trained(look_flops(med, size * looked_at)),
            trained(text_flops(med, layout.index.shape[0], layout.rows, layout.longest, looked_at)),
            trained(2 * layout.rows * med.width * 2),
        ]
        return sum(part.total for part in parts) / size

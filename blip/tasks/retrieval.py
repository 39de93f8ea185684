"""Fine-tuning for retrieval (paper section 5.1): ITC in which all captions of a picture match it, and ITM.

As released: negatives are drawn by the similarities of the online features alone, softmax without a floor, over the pairs of
all ranks (COCO) or of the own (Flickr30K); two pairs of one picture are never negatives of each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip.modules.blip import TEMPERATURE_RANGE
from blip.tasks.contrastive import ContrastiveObjectives, ContrastiveTask
from blip.tasks.distributed import gather


class RetrievalTask(ContrastiveTask):
    """Trains the encoders on pairs of at most `max_tokens`; starts from a pre-trained model, whose decoder it leaves out."""

    decoder = False

    def __init__(self, objectives: dict[str, Any], max_tokens: int, **kwargs: Any) -> None:
        super().__init__(ContrastiveObjectives(**objectives), max_tokens, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        model, goals = self.model, self.objectives
        model.temperature.data.clamp_(*TEMPERATURE_RANGE)
        image_states = model.visual_encoder(batch.image)  # [B, N, D]
        image_features = model.image_features(image_states)  # [B, E]
        text_features = model.text_features(batch.input_ids, batch.layout)  # [B, E]

        momentum_image, momentum_text = self.momentum_features(batch)
        with torch.autocast(batch.image.device.type, enabled=False):
            itc, _, _ = self.contrast(image_features, text_features, momentum_image, momentum_text, batch.image_ids)
            image_similarity, text_similarity = self.online_similarities(image_features, text_features)

        cross = model.med.look(image_states)
        itm = self.match(batch, image_states, cross, image_similarity, text_similarity)
        loss = goals.itc_weight * itc + goals.itm_weight * itm
        logs = {"itc": itc.detach(), "itm": itm.detach(), "temperature": model.temperature.detach()}
        self.log_dict({f"train/{k}": v for k, v in logs.items()}, prog_bar=True, batch_size=batch.image.shape[0])
        self.log("train/loss", loss.detach(), batch_size=batch.image.shape[0])
        return loss

    @torch.no_grad()
    def online_similarities(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Of pictures with the texts, and of texts with the pictures, of this rank or of all, [B, G]; no gradient."""
        images, texts = (gather(image), gather(text)) if self.draws_everywhere else (image, text)
        temperature = self.model.temperature.to(image.dtype)
        return image @ texts.T / temperature, text @ images.T / temperature

    @torch.no_grad()
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """A row for each picture or clip: its key, and of each of its texts the cosine and the probability that it matches."""
        model = self.model
        states = model.image_states(batch.image)
        image, text = model.image_features(states), model.text_features(batch.input_ids, batch.layout)
        cosines = (image[batch.text_row] * text).sum(1)
        grid = batch.layout.folded(batch.text_row, len(image))
        matches = model.itm_logits(batch.input_ids, grid, model.med.look(states)).softmax(1)[:, 1]
        rows: list[dict[str, Any]] = [{"key": key, "texts": []} for key in batch.keys]
        told = (batch.text_row, cosines, matches)
        for words, row, cosine, match in zip(batch.texts, *(x.tolist() for x in told), strict=True):
            rows[row]["texts"].append({"text": words, "itc": round(cosine, 6), "itm": round(match, 6)})
        return rows

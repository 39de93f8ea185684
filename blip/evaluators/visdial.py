"""How well a model ranks the candidate answers of a dialogue's rounds (VisDial v1.0: 100 of each; paper Table 9)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip.evaluators.collect import from_all_ranks
from blip.layout import TextLayout
from blip.metrics.ranking import ndcg, rank_rates, visdial_scores
from blip.modules.visdial import VisDial
from blip.text import Tokenizer


class VisDialEvaluator:
    """`mrr`, `r1`, `r5`, `r10`, `ndcg` in percent and `mean_rank`; `chance_mrr` and `chance_r1`: of a model that can't decide.

    texts_at_once: how many dialogues, each with one candidate, go through the model together at most.
    """

    def __init__(self, tokenizer: Tokenizer, texts_at_once: int) -> None:
        self.texts_at_once = texts_at_once
        self.reset()

    def reset(self) -> None:
        self.rows: list[dict[str, float]] = []  # of each round what it adds to each mean

    @torch.no_grad()
    def update(self, model: VisDial, batch: Any) -> None:
        for entry, scores in zip(batch.rounds, self.scores(model, batch).numpy(), strict=True):
            true = np.array([entry["answer_index"]])
            rates = rank_rates(scores[None], true)
            chance = rank_rates(np.zeros_like(scores)[None], true)
            rates |= {f"chance_{name}": chance[name] for name in ("mrr", "r1")}
            relevance = np.array(entry.get("relevance") or [0.0])
            if relevance.any():
                rates["ndcg"] = ndcg(scores[None], relevance[None])
            self.rows.append({name: float(value[0]) for name, value in rates.items()})

    @torch.no_grad()
    def scores(self, model: VisDial, batch: Any) -> Tensor:
        """Log-odds that a candidate fits, [B, C] on the host; the picture of rounds that follow each other is seen once."""
        counts = torch.unique_consecutive(batch.image_ids, return_counts=True)[1].tolist()
        firsts = torch.tensor([0, *np.cumsum(counts)[:-1].tolist()], device=batch.image.device)
        states = model.visual_encoder(batch.image[firsts])
        captions = batch.caption_layout
        mask = captions.mask[firsts]
        caption_layout = TextLayout.from_lengths(mask.sum(1).tolist()).to(states.device)
        cross = model.look(states, captions.pad(batch.caption_ids)[firsts][mask], caption_layout)
        lengths = batch.layout.mask.sum(1).tolist()
        tokens = batch.input_ids.split(lengths)
        each = len(lengths) // batch.image.shape[0]  # candidates of a round
        found, start = [], 0
        for picture, rounds in enumerate(counts):
            # All candidates of all rounds about one picture are one row of queries, in parts.
            own = [kv.select(firsts.new_tensor([picture])) for kv in cross]
            end = start + rounds * each
            for first in range(start, end, self.texts_at_once):
                part = slice(first, min(end, first + self.texts_at_once))
                layout = TextLayout.from_lengths(lengths[part]).to(states.device)
                logits = model.match_logits(torch.cat(tokens[part]), layout, own)
                found.append((logits[:, 1] - logits[:, 0]).float().cpu())  # a probability would be rounded to 1
            start = end
        return torch.cat(found).view(-1, each)

    def compute(self, model: VisDial) -> dict[str, float]:
        """`ndcg` only where rounds have relevances. Means over rounds, each of which some rank has seen once."""
        rows = from_all_ranks(self.rows)
        names = dict.fromkeys(name for row in rows for name in row)
        return visdial_scores({name: [row[name] for row in rows if name in row] for name in names})

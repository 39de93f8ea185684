"""Image-text retrieval in both directions: by ITC similarity, then the best k of each query re-ranked by ITM.

Score of a candidate: ITM's logit of "match" plus the cosine similarity, as released, or plus the similarity as ITC has it, divided
by the temperature: where ITM learnt from negatives drawn by ITC, it tells only what ITC does not. Candidates outside the best k
come after all others. Each picture's keys and values are projected once for all its candidate texts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip.evaluators.collect import from_all_ranks
from blip.layout import TextLayout
from blip.modules.blip import BLIP
from blip.text import Tokenizer

OUTSIDE = -100.0


class RetrievalEvaluator:
    """R@1, 5 and 10 in percent, `i2t_*` (texts of a picture) and `t2i_*` (the picture of a text), `..._itc` by ITC alone.

    itc_scale: what the cosine is multiplied with before ITM's logit is added; None: 1 / temperature.
    top_k: how many candidates of each query ITM looks at; texts_at_once: how many texts go through ITM together at most.
    """

    def __init__(self, tokenizer: Tokenizer, top_k: int, texts_at_once: int, itc_scale: float | None) -> None:
        self.tokenizer, self.top_k, self.texts_at_once = tokenizer, top_k, texts_at_once
        self.itc_scale = itc_scale
        self.reset()

    def reset(self) -> None:
        self.pictures: list[tuple[int, Tensor, Tensor]] = []  # (picture's id, states [N, D], features [E])
        self.texts: list[tuple[int, list[int], Tensor]] = []  # (picture's id, token ids, features [E])

    @torch.no_grad()
    def update(self, model: BLIP, batch: Any) -> None:
        states = model.visual_encoder(batch.image)
        features = model.image_features(states)
        ids = batch.image_ids.tolist()
        self.pictures += zip(ids, states.cpu(), features.cpu(), strict=True)
        text_features = model.text_features(batch.input_ids, batch.layout)
        lengths = batch.layout.mask.sum(1).tolist()
        tokens = [part.tolist() for part in batch.input_ids.split(lengths)]
        owners = [ids[row] for row in batch.text_row.tolist()]
        self.texts += zip(owners, tokens, text_features.cpu(), strict=True)

    @torch.no_grad()
    def compute(self, model: BLIP) -> dict[str, float]:
        pictures = sorted(from_all_ranks(self.pictures), key=lambda item: item[0])
        texts = sorted(from_all_ranks(self.texts), key=lambda item: (item[0], item[1]))
        if not pictures:
            return {}
        cosine = torch.stack([p[2] for p in pictures]) @ torch.stack([t[2] for t in texts]).T  # [I, T]
        match = torch.tensor([p[0] for p in pictures])[:, None] == torch.tensor([t[0] for t in texts])
        near_texts = best(cosine, self.top_k)
        near_pictures = best(cosine.T, self.top_k).T
        scale = 1 / model.temperature.item() if self.itc_scale is None else self.itc_scale
        scores = scale * cosine + self.rerank(model, pictures, texts, near_texts | near_pictures)
        results = {"chance_r1": 100.0 / len(pictures)}
        for name, similarity, truth in (
            ("i2t", scores.masked_fill(~near_texts, OUTSIDE), match),
            ("t2i", scores.masked_fill(~near_pictures, OUTSIDE).T, match.T),
        ):
            results.update({f"{name}_r{k}": v for k, v in recalls(similarity, truth).items()})
        for name, similarity, truth in (("i2t", cosine, match), ("t2i", cosine.T, match.T)):
            results.update({f"{name}_r{k}_itc": v for k, v in recalls(similarity, truth).items()})
        return results

    def rerank(self, model: BLIP, pictures: list, texts: list, wanted: Tensor) -> Tensor:
        """ITM's logit of "match" for the wanted pairs, [I, T], 0 elsewhere."""
        device = model.itm_head.weight.device
        logits = torch.zeros(wanted.shape)
        longest = max(len(t[1]) for t in texts)
        ids = torch.tensor([t[1] + [self.tokenizer.pad_id] * (longest - len(t[1])) for t in texts])  # [T, L]
        mask = torch.arange(longest) < torch.tensor([len(t[1]) for t in texts])[:, None]
        counts = wanted.sum(1)
        # Those with many texts first: one picture may be near to all texts, and must not make work for the others.
        order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
        while len(order):
            most = int(counts[order[0]])
            width = min(most, self.texts_at_once)
            together = self.texts_at_once // width
            rows, order = order[:together], order[together:]
            states = torch.stack([pictures[i][1] for i in rows.tolist()]).to(device)
            cross = model.med.look(states)
            # The wanted texts of each picture first, then others to fill the row: [b, K]
            chosen = wanted[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
            for texts_of_each in chosen.split(width, dim=1):
                flat = texts_of_each.flatten()
                layout = TextLayout.from_mask(mask[flat]).to(device)
                found = model.itm_logits(ids[flat].flatten().to(device), layout, cross)[:, 1]
                logits[rows[:, None], texts_of_each] = found.float().cpu().view_as(texts_of_each)
        return logits


def best(similarity: Tensor, k: int) -> Tensor:
    """True for the k highest of each row."""
    top = similarity.topk(min(k, similarity.shape[1]), dim=1).indices
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, top, True)


def recalls(similarity: Tensor, truth: Tensor, at: tuple[int, ...] = (1, 5, 10)) -> dict[int, float]:
    """Percent of queries (rows) with a true candidate among the first k; equal scores count against the model."""
    highest = similarity.masked_fill(~truth, float("-inf")).amax(1, keepdim=True)
    ahead = ((similarity >= highest) & ~truth).sum(1)
    return {k: 100.0 * (ahead < k).double().mean().item() for k in at}

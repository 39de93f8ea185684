"""How well texts fit pictures, by ITM and by ITC, from one encoding of each picture and one of each text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blip.layout import TextLayout
from blip.modules.blip import BLIP


def match(
    model: BLIP, image_states: Tensor, texts: Sequence[Sequence[int]], row: Sequence[int], at_once: int
) -> tuple[Tensor, Tensor]:
    """Probabilities by ITM and cosines by ITC, [R] each: of text r (ids, `[CLS] ... [SEP]`) with picture row[r] (ascending).

    image_states [B, N, D]; a picture may have any number of texts, also none. The texts of a picture fold into one row of
    queries, so that its keys and values exist once; a text that stands at several pictures is encoded for ITC once.
    at_once: how many texts, with the places of the grid that stay empty, go through the model together at most.
    """
    pictures, device = image_states.shape[0], image_states.device
    own = torch.tensor(row, dtype=torch.long)
    counts = torch.bincount(own, minlength=pictures)
    number = torch.arange(len(row)) - (counts.cumsum(0) - counts)[own]  # which of its picture's texts each is
    cross, together = model.med.look(image_states), max(1, at_once // pictures)
    probability = image_states.new_empty(len(row), dtype=torch.promote_types(image_states.dtype, torch.float32))
    for start in range(0, int(counts.max()), together):
        some = ((start <= number) & (number < start + together)).nonzero().flatten()
        kept, place = own[some].unique(return_inverse=True)
        looked = cross if len(kept) == pictures else [kv.select(kept.to(device)) for kv in cross]
        ids, layout = _packed([texts[i] for i in some.tolist()])
        logits = model.itm_logits(ids.to(device), layout.folded(place, len(kept)).to(device), looked)
        probability[some.to(device)] = logits.softmax(-1)[:, 1]

    places = {text: n for n, text in enumerate(dict.fromkeys(map(tuple, texts)))}
    distinct, features = list(places), []
    for start in range(0, len(distinct), at_once):
        ids, layout = _packed(distinct[start : start + at_once])
        features.append(model.text_features(ids.to(device), layout.to(device)))
    text_features = torch.cat(features)[torch.tensor([places[tuple(text)] for text in texts], device=device)]
    return probability, (model.image_features(image_states)[own.to(device)] * text_features).sum(-1)


def _packed(texts: Sequence[Sequence[int]]) -> tuple[Tensor, TextLayout]:
    return torch.tensor([i for text in texts for i in text]), TextLayout.from_lengths([len(text) for text in texts])

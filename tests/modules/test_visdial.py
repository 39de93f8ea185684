"""A dialogue looks at its picture and its caption together."""

from __future__ import annotations

import pytest
import torch

from blip.modules.visdial import VisDial
from tests.modules.small import pictures, small_config, texts


@pytest.fixture
def model() -> VisDial:
    torch.manual_seed(0)
    return VisDial(small_config(width=32, look_width=32)).double().eval()


@torch.no_grad()
def logits(model: VisDial, image: torch.Tensor, captions: tuple, dialogues: tuple) -> torch.Tensor:
    return model.match_logits(*dialogues, model.look(model.visual_encoder(image), *captions))


def test_picture_and_caption_both_count(model: VisDial):
    dialogues = texts(6, 4)
    before = logits(model, pictures(2), texts(5, 5), dialogues)
    assert not torch.allclose(logits(model, pictures(2, seed=1), texts(5, 5), dialogues), before)
    assert not torch.allclose(logits(model, pictures(2), texts(5, 5, seed=1), dialogues), before)
    assert before.shape == (2, 2)


def test_a_caption_s_padding_is_not_looked_at(model: VisDial):
    ids, layout = texts(3, 9)
    dialogue, place = texts(6, 4)
    both = logits(model, pictures(2), (ids, layout), (dialogue, place))
    alone = logits(model, pictures(2)[:1], (ids[:3], texts(3)[1]), (dialogue[:6], texts(6)[1]))
    torch.testing.assert_close(both[:1], alone, rtol=1e-10, atol=1e-10)


def test_candidates_fold_into_their_round(model: VisDial):
    captions = texts(3, 5)
    ids, layout = texts(6, 4, 5, 7)
    folded = logits(model, pictures(2), captions, (ids, layout))
    cross = model.look(model.visual_encoder(pictures(2)), *captions)
    with torch.no_grad():
        gathered = model.match_logits(ids, layout, [kv.select(torch.tensor([0, 0, 1, 1])) for kv in cross])
    torch.testing.assert_close(folded, gathered, rtol=1e-10, atol=1e-10)


def test_pictures_and_texts_of_two_widths_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"model.vit.width=48 and model.med.width=32 must be equal"):
        VisDial(small_config())

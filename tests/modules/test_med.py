"""MED: what is shared, that keys and values projected once change nothing, and that packing, folding, caches are exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blip.layout import TextLayout
from blip.modules.blip import BLIP, BLIPConfig
from blip.modules.losses import itm_loss, lm_loss
from blip.modules.med import MED, CrossKV, MEDConfig
from blip.modules.vit import ViTConfig
from tests.modules.small import pictures, small_config, small_model, texts


@pytest.mark.parametrize(
    ("share", "count"),
    [("all", 224_075_071), ("all_but_ca", 252_441_919), ("all_but_sa", 252_441_919), ("none", 361_333_567)],
)
def test_sharing_gives_the_parameters_of_table_3(share: str, count: int):
    vit = ViTConfig(224, 16, 768, 12, 12, 0.0)
    med = MEDConfig(30524, 768, 12, 12, 3072, 512, 768, share, 0.1, 0.1)
    with torch.device("meta"):
        model = BLIP(BLIPConfig(vit, med, 256, 0.07, 30522, 30523))
    assert sum(p.numel() for p in model.parameters()) == count


def test_an_unknown_way_to_share_is_refused():
    with pytest.raises(ValueError, match=r"model\.med\.share must be one of all, .* not 'some'"):
        MED(replace(small_config().med, share="some"))


def losses(model: BLIP, image: Tensor, ids: Tensor, layout: TextLayout, anew: bool) -> Tensor:
    """ITM of a positive and a negative text, and LM, of the same pictures; `anew`: projected for each, texts unfolded."""
    states = model.visual_encoder(image)
    negative_ids, negative = ids.flip(0), TextLayout.from_lengths(layout.mask.sum(1).flip(0).tolist())
    negative_ids = negative_ids.index_fill(0, negative.firsts, 2)
    if anew:
        positive = model.itm_logits(ids, layout, model.med.look(states))
        other = model.itm_logits(negative_ids, negative, model.med.look(states))
        logits = torch.cat([positive, other])
        decoded = model.lm_states(ids, layout, model.med.look(states, decoder=True))
    else:
        cross = model.med.look(states)
        both = layout.beside(negative)
        logits = model.itm_logits(torch.cat([ids, negative_ids]), both, cross)
        decoder = cross if model.med.looks_alike else model.med.look(states, decoder=True)
        decoded = model.lm_states(ids, layout, decoder)
    matched = torch.arange(logits.shape[0]) < layout.rows
    followed = layout.followed()
    matching = itm_loss(logits, matched, torch.ones_like(matched))
    return matching + lm_loss(model.med.lm_head(decoded[followed]), ids[followed + 1], 0.1)


@pytest.mark.parametrize("share", ["all", "all_but_sa", "all_but_ca", "none"])
def test_keys_projected_once_give_the_losses_and_gradients_of_projecting_anew(share: str):
    model = small_model(share)
    ids, layout = texts(5, 9, 3)
    image = pictures(3)
    results = []
    for anew in (True, False):
        model.zero_grad()
        loss = losses(model, image, ids, layout, anew)
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (once, once_gradients) = results
    torch.testing.assert_close(once, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(once_gradients, gradients, rtol=1e-9, atol=1e-12)
    assert "med.encoder.0.cross_attention.key_value.weight" in gradients


def test_a_text_does_not_depend_on_its_neighbours_or_their_lengths():
    model = small_model()
    ids, layout = texts(4, 11, 6)
    cross = model.med.look(model.visual_encoder(pictures(3)))
    together = {
        "text": layout.pad(model.med.encode(ids, layout)),
        "multimodal": layout.pad(model.med.encode(ids, layout, cross)),
        "decoder": layout.pad(model.med.decode(ids, layout, cross)),
    }
    own_ids, own = ids[4:15], TextLayout.from_lengths([11])
    own_cross = [kv.select(torch.tensor([1])) for kv in cross]
    alone = {
        "text": model.med.encode(own_ids, own),
        "multimodal": model.med.encode(own_ids, own, own_cross),
        "decoder": model.med.decode(own_ids, own, own_cross),
    }
    for mode, states in alone.items():
        torch.testing.assert_close(together[mode][1, :11], states, rtol=1e-12, atol=1e-12, msg=mode)


def test_texts_folded_into_one_row_of_queries_look_as_each_alone():
    model = small_model()
    states = model.visual_encoder(pictures(2))
    cross = model.med.look(states)
    ids, layout = texts(4, 7, 3, 5, 6, 2)  # three texts for each of two pictures
    folded = model.med.encode(ids, layout, cross)
    copied = [kv.select(torch.tensor([0, 0, 0, 1, 1, 1])) for kv in cross]
    torch.testing.assert_close(folded, model.med.encode(ids, layout, copied), rtol=1e-12, atol=1e-12)


def test_masked_places_are_not_looked_at():
    model = small_model()
    states = model.visual_encoder(pictures(2))
    ids, layout = texts(4, 7)
    mask = torch.ones(states.shape[:2], dtype=torch.bool)
    mask[:, 9:] = False
    spoilt = states.masked_fill(~mask[..., None], 1e3)
    masked = model.med.encode(ids, layout, model.med.look(spoilt, mask))
    short = model.med.encode(ids, layout, model.med.look(states[:, :9]))
    torch.testing.assert_close(masked, short, rtol=1e-12, atol=1e-12)


def test_the_decoder_sees_no_later_token():
    model = small_model()
    ids, layout = texts(8)
    cross = model.med.look(model.visual_encoder(pictures(1)))
    changed = ids.clone()
    changed[5] = (ids[5] + 1) % 50
    before, after = model.med.decode(ids, layout, cross), model.med.decode(changed, layout, cross)
    assert torch.equal(before[:5], after[:5])
    assert not torch.allclose(before[5:], after[5:])


@torch.no_grad()
def test_decoding_with_a_cache_equals_decoding_without():
    model = small_model()
    ids, layout = texts(7, 7, 7)
    cross = model.med.look(model.visual_encoder(pictures(3)), decoder=True)
    whole = layout.pad(model.med.decode(ids, layout, cross))
    caches = model.med.caches(3, 10, whole)
    grid = layout.pad(ids)
    parts = []
    for start, end in ((0, 3), (3, 4), (4, 7)):
        step = grid[:, start:end]
        mask = torch.ones_like(step, dtype=torch.bool)
        parts.append(
            model.med.decode(step.flatten(), TextLayout.from_mask(mask), cross, caches).unflatten(0, step.shape)
        )
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_attention_written_out_for_bfloat16_agrees_with_the_fused_one():
    from blip.modules.attention import attend

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=generator)
    key, value = (torch.randn(2, 4, 7, 8, generator=generator) for _ in range(2))
    mask = torch.arange(7) < torch.tensor([7, 4])[:, None, None, None]
    for options in ({}, {"mask": mask}, {"causal": True}, {"mask": mask, "causal": True}):
        fused = attend(query, key, value, **options)
        written = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), **options)
        torch.testing.assert_close(written.float(), fused, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("side", ["vit", "med"])
def test_activation_checkpointing_changes_no_gradient(side: str):
    ids, layout = texts(5, 9, 3)
    gradients = []
    for blocks in (0, 2):
        config = small_config()
        config = replace(config, **{side: replace(getattr(config, side), checkpoint_blocks=blocks)})
        torch.manual_seed(0)
        model = BLIP(config).double().train()
        losses(model, pictures(3), ids, layout, anew=False).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-14)


def test_selecting_rows_of_keys_takes_the_mask_along():
    kv = CrossKV(torch.arange(3.0)[:, None], torch.arange(3.0)[:, None], torch.tensor([[True], [False], [True]]))
    chosen = kv.select(torch.tensor([1, 1, 0]))
    assert chosen.key.flatten().tolist() == [1, 1, 0]
    assert chosen.mask is not None
    assert chosen.mask.flatten().tolist() == [False, False, True]

"""The image encoder: timm's numbers under our attention, position tables of other sizes, stems, normalisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn

from blip.modules.vit import IMAGE_MEAN, IMAGE_STD, VisionTransformer, ViTConfig, normalize, resize_position_embedding

TINY = ViTConfig(image_size=32, patch_size=8, width=24, depth=2, heads=3, drop_path=0.0)


@torch.no_grad()
def test_states_are_timms_before_its_head():
    torch.manual_seed(0)
    vit = VisionTransformer(TINY).double().eval()
    timm = TimmVisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=0,
        global_pool="",
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    timm.double().eval().load_state_dict(vit.state_dict())
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    states = vit(image)
    assert states.shape == (2, 17, 24)
    torch.testing.assert_close(states, timm.forward_features(image), rtol=1e-12, atol=1e-12)


def test_a_position_table_of_the_same_grid_is_kept_and_another_is_resized():
    table = torch.randn(1, 17, 6)
    assert resize_position_embedding(table, 4) is table
    larger = resize_position_embedding(table, 6)
    assert larger.shape == (1, 37, 6)
    assert torch.equal(larger[:, 0], table[:, 0])
    level = torch.ones(1, 17, 6)
    torch.testing.assert_close(resize_position_embedding(level, 7), torch.ones(1, 50, 6))
    with pytest.raises(ValueError, match="a position table of 12 patches is not square"):
        resize_position_embedding(torch.ones(1, 13, 6), 4)


def test_the_convolutional_stem_gives_one_token_a_patch():
    config = replace(TINY, stem="conv")
    assert VisionTransformer(config)(torch.zeros(1, 3, 32, 32)).shape == (1, config.tokens, 24)
    with pytest.raises(ValueError, match="patch_size must be a power of 2, not 12"):
        VisionTransformer(replace(config, image_size=36, patch_size=12))
    with pytest.raises(ValueError, match=r"model\.vit\.stem must be"):
        VisionTransformer(replace(TINY, stem="other"))


def test_pictures_are_normalised_by_clips_statistics():
    level = torch.full((1, 3, 2, 2), 128, dtype=torch.uint8)
    for channel, mean, std in zip(normalize(level)[0], IMAGE_MEAN, IMAGE_STD, strict=True):
        torch.testing.assert_close(channel, torch.full((2, 2), (128 / 255 - mean) / std))


def test_drop_path_acts_in_training_alone():
    vit = VisionTransformer(replace(TINY, drop_path=0.5))
    image = torch.randn(16, 3, 32, 32)
    assert torch.equal(vit.eval()(image), vit(image))
    torch.manual_seed(0)
    assert not torch.equal(vit.train()(image), vit(image))

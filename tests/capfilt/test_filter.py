"""Filters of CapFilt: a score hangs on picture and text alone, however many texts a picture has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import blip
from blip.capfilt.filter import ClipScorer, MatchScorer
from blip.modules.blip import BLIP
from blip.modules.checkpoint import convert
from blip.modules.matching import match
from tests.checkpoints import VOCABULARY, picture, save
from tests.golden_models import _model, _texts

SIZE = 32
PICTURES = [picture(n, SIZE, SIZE) for n in range(4)]
TEXTS = [
    ["a dog", "a very long tail of a cat and of another cat", "a dog"],
    [],
    ["the cat"],
    [f"a man and a {colour} dog" for colour in ("red", "blue", "green", "black", "white")],
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "last.ckpt", decoder=False)


@pytest.fixture(scope="module")
def scorer(checkpoint: Path) -> MatchScorer:
    return MatchScorer(checkpoint)


def same(found: list[list[Any]], expected: list[list[Any]]) -> bool:
    return [len(row) for row in found] == [len(row) for row in expected] and all(
        np.allclose(a, b, atol=2e-6) for a, b in zip(found, expected, strict=True) if b
    )


def test_scores_are_those_of_each_pair_by_itself(scorer: MatchScorer, checkpoint: Path):
    model = blip.load(checkpoint)
    pairs = [[model.match(pixels, text) for text in each] for pixels, each in zip(PICTURES, TEXTS, strict=True)]
    expected = [[(pair.probability, pair.cosine) for pair in row] for row in pairs]
    assert same(scorer.score(PICTURES, TEXTS), expected)
    assert np.ptp([itm for row in expected for itm, _ in row]) > 0.01  # not all alike


def test_a_score_does_not_hang_on_what_is_scored_beside_it(scorer: MatchScorer):
    together = scorer.score(PICTURES, TEXTS)
    assert same([scorer.score([pixels], [each])[0] for pixels, each in zip(PICTURES, TEXTS, strict=True)], together)
    assert same(scorer.score(PICTURES[::-1], TEXTS[::-1])[::-1], together)
    assert same([row[::-1] for row in scorer.score(PICTURES, [each[::-1] for each in TEXTS])], together)
    assert scorer.score(PICTURES[:2], [[], []]) == [[], []]
    assert scorer.score([], []) == []


@pytest.mark.parametrize("at_once", [1, 4, 7])
def test_so_many_texts_and_no_more_go_through_the_model_together(scorer: MatchScorer, checkpoint: Path, at_once: int):
    few, rows = MatchScorer(checkpoint, texts_at_once=at_once), []
    encode = few.model.network.med.encode

    def counted(ids: Any, layout: Any, cross: Any = None) -> Any:
        rows.append(layout.rows)
        return encode(ids, layout, cross)

    few.model.network.med.encode = counted
    assert same(few.score(PICTURES, TEXTS), scorer.score(PICTURES, TEXTS))
    assert max(rows) <= max(at_once, len(PICTURES))
    assert len(rows) > 2


def test_a_picture_is_encoded_once_and_a_text_that_stands_twice_as_well(scorer: MatchScorer):
    network = scorer.model.network
    with (
        mock.patch.object(network.visual_encoder, "forward", wraps=network.visual_encoder.forward) as seen,
        mock.patch.object(network.med, "look", wraps=network.med.look) as looked,
        mock.patch.object(network, "text_features", wraps=network.text_features) as told,
    ):
        scorer.score(PICTURES, TEXTS)
    assert [call.args[0].shape[0] for call in seen.call_args_list] == [4]
    assert looked.call_count == 1
    assert [call.args[1].rows for call in told.call_args_list] == [8]  # of nine texts one stands twice


def test_texts_are_cleaned_and_cut_as_the_checkpoint_was_trained(scorer: MatchScorer, tmp_path: Path):
    plain, loud = scorer.score(PICTURES[:1], [["a dog", "A  Dog!! (*)"]])[0]
    assert loud == pytest.approx(plain, abs=1e-6)
    short = MatchScorer(save(tmp_path / "short.ckpt", decoder=False, data={"max_words": 2, "max_tokens": 35}))
    first, cut = short.score(PICTURES[:1], [["a dog", "a dog and a cat"]])[0]
    assert cut == pytest.approx(first, abs=1e-6)
    assert short.fingerprint != scorer.fingerprint


def test_the_layouts_of_others_score_alike(scorer: MatchScorer, checkpoint: Path, tmp_path: Path):
    convert(checkpoint, tmp_path / "itm.pth", "released", "itm")
    convert(checkpoint, tmp_path / "folder", "transformers", "BlipForImageTextRetrieval")
    for path in (tmp_path / "itm.pth", tmp_path / "folder"):
        assert same(MatchScorer(path, tokenizer=VOCABULARY).score(PICTURES, TEXTS), scorer.score(PICTURES, TEXTS))


def test_in_bfloat16_scores_are_nearly_the_same(scorer: MatchScorer, checkpoint: Path):
    exact, rounded = (
        np.array([each for row in which.score(PICTURES, TEXTS) for each in row])
        for which in (scorer, MatchScorer(checkpoint, precision="bfloat16"))
    )
    assert 0 < np.abs(exact - rounded).max() < 0.05


def test_what_cannot_score_is_refused_at_once(tmp_path: Path):
    with pytest.raises(ValueError, match="no ITM head, no ITC projections"):
        MatchScorer(save(tmp_path / "captioner.ckpt", encoder=False))
    with pytest.raises(ValueError, match="2 lists of texts for 1 pictures"):
        MatchScorer(save(tmp_path / "whole.ckpt")).score(PICTURES[:1], [["a dog"], []])


@pytest.mark.parametrize("at_once", [512, 2])
def test_the_released_models_numbers_come_out_in_float64(at_once: int):
    folder = Path(__file__).parents[1] / "golden_cases" / "itm"
    inputs, expected = (load_file(folder / f"{name}.safetensors") for name in ("inputs", "f64"))
    case = json.loads((folder / "case.json").read_text())
    model: BLIP = _model(folder, case, load_file(folder / "weights.safetensors"), torch.float64, decoder=False)
    packed, layout = _texts(inputs["input_ids"], inputs["attention_mask"])
    texts = [text.tolist() for text in packed.split(layout.mask.sum(1).tolist())]
    count = len(texts)
    every = [[texts[(n + k) % count] for k in range(n + 1)] for n in range(count)]  # of picture n its own, and n others
    with torch.no_grad():
        states = model.visual_encoder(inputs["image"].double())
        row = [n for n, each in enumerate(every) for _ in each]
        itm, itc = match(model, states, [text for each in every for text in each], row, at_once)
    own = [n * (n + 1) // 2 for n in range(count)]
    released = expected["itm_logits_with_ENC"].softmax(-1)[:, 1]
    assert torch.allclose(itm[own], released, atol=1e-8, rtol=0)
    shown = [(n + k) % count for n in range(count) for k in range(n + 1)]
    assert torch.allclose(itc.double(), expected["itc_sim"][row, shown], atol=1e-8, rtol=0)


# a CLIP of transformers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP with tokenizer and image processor, as save_pretrained leaves them."""
    import transformers as hf

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: n for n, piece in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
    text = {**sizes, **ends, "vocab_size": len(vocabulary), "max_position_embeddings": 12}
    vision = {**sizes, "image_size": 24, "patch_size": 8}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    hf.CLIPModel(config).save_pretrained(folder)
    hf.CLIPTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    size = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    hf.CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(folder: Path) -> ClipScorer:
    return ClipScorer(folder)


SQUARES = [picture(n, 24, 24) for n in range(4)]


def test_cosines_are_those_of_transformers_own_model(clip: ClipScorer, folder: Path):
    import transformers as hf

    model = hf.CLIPModel.from_pretrained(folder)
    processor = hf.CLIPProcessor(
        hf.CLIPImageProcessor.from_pretrained(folder), hf.AutoTokenizer.from_pretrained(folder)
    )
    for pixels, each, found in zip(SQUARES, TEXTS, clip.score(SQUARES, TEXTS), strict=True):
        for text, (cosine,) in zip(each, found, strict=True):
            given = processor(text=text, images=pixels, return_tensors="pt", truncation=True, max_length=12)
            with torch.no_grad():
                logit = model(**given).logits_per_image.item()
            assert cosine == pytest.approx(logit / model.logit_scale.exp().item(), abs=1e-5)


def test_a_cosine_does_not_hang_on_what_is_scored_beside_it(clip: ClipScorer, folder: Path):
    together = clip.score(SQUARES, TEXTS)
    assert same([clip.score([pixels], [each])[0] for pixels, each in zip(SQUARES, TEXTS, strict=True)], together)
    assert same(ClipScorer(folder, texts_at_once=2).score(SQUARES, TEXTS), together)
    assert clip.score(SQUARES, [[], [], [], []]) == [[], [], [], []]
    assert ClipScorer(folder).fingerprint == clip.fingerprint != ClipScorer(folder, precision="bfloat16").fingerprint


def test_a_folder_that_is_no_clip_is_told(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere.*save_pretrained"):
        ClipScorer(tmp_path / "nowhere")
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled.*\.safetensors"):
        ClipScorer(pickled)
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="bare: transformers cannot read"):
        ClipScorer(bare)
    with pytest.raises(ValueError, match="precision must be"):
        ClipScorer(folder, precision="half")

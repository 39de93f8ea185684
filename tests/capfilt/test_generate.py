"""Captioners of CapFilt: what they write of a picture hangs on the picture and its seed alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import blip
from blip.api import PAPER
from blip.capfilt.generate import Captioner
from blip.modules.checkpoint import convert
from tests.checkpoints import VOCABULARY, picture, save

SIZE = 32
PICTURES = [picture(n, SIZE, SIZE) for n in range(4)]
OWN = {"max_length": 9, "min_length": 3, "strategy": "greedy", "beams": 1, "top_p": 0.5, "temperature": 0.8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that says how it writes."""
    task = {"evaluators": {"caption": {"prompt": "a dog ", "decoding": PAPER | OWN}}}
    return save(tmp_path_factory.mktemp("model") / "last.ckpt", task=task)


@pytest.mark.parametrize("options", [{}, {"samples": 3}, {"strategy": "beam"}, {"strategy": "greedy"}])
def test_a_text_hangs_on_picture_and_seed_alone(checkpoint: Path, options: dict):
    captioner, seeds = Captioner(checkpoint, **options), [7, 2**62, 0, 7]
    together = captioner.write(PICTURES, seeds)
    assert [len(row) for row in together] == [captioner.samples] * 4
    backwards = captioner.write(PICTURES[::-1], seeds[::-1])[::-1]
    alone = [captioner.write([pixels], [seed])[0] for pixels, seed in zip(PICTURES, seeds, strict=True)]
    for other in (backwards, alone):
        assert [[(w.text, w.tokens) for w in row] for row in other] == [
            [(w.text, w.tokens) for w in row] for row in together
        ]
        found = [[w.log_prob for w in row] for row in other]
        assert np.allclose(found, [[w.log_prob for w in row] for row in together], atol=1e-4)
    assert captioner.write([], []) == []


def test_another_seed_draws_another_text_and_the_same_the_same(checkpoint: Path):
    captioner = Captioner(checkpoint)
    first, other, again = captioner.write([PICTURES[0]] * 3, [1, 2, 1])
    assert (first[0].text, first[0].tokens) == (again[0].text, again[0].tokens)
    assert first[0].log_prob == pytest.approx(again[0].log_prob, rel=1e-5)  # another row of the batch: but for rounding
    assert first[0].text != other[0].text


def test_a_captioner_draws_from_the_nucleus_as_long_as_its_own_run_writes(checkpoint: Path):
    how = Captioner(checkpoint).decoding
    assert (how["strategy"], how["top_p"], how["samples"]) == ("nucleus", 0.9, 1)
    assert (how["max_length"], how["min_length"], how["temperature"], how["prompt"]) == (9, 3, 0.8, "a dog ")
    assert json.loads(json.dumps(how)) == how
    changed = Captioner(checkpoint, prompt="", top_p=0.7, samples=2, max_length=6).decoding
    assert (changed["prompt"], changed["top_p"], changed["samples"], changed["max_length"]) == ("", 0.7, 2, 6)


def test_beam_search_searches_where_its_own_run_does_not(checkpoint: Path):
    assert Captioner(checkpoint, strategy="beam").decoding["beams"] == 3
    assert Captioner(checkpoint, strategy="beam", beams=2).decoding["beams"] == 2


def test_numbers_are_those_of_the_caption_that_the_model_gives(checkpoint: Path):
    captioner, model = Captioner(checkpoint, strategy="beam"), blip.load(checkpoint)
    for (written,), caption in zip(
        captioner.write(PICTURES, [0] * 4), model.caption(PICTURES, strategy="beam", beams=3), strict=True
    ):
        assert (written.text, written.tokens) == (caption.text, len(caption.token_log_probs))
        assert written.log_prob == pytest.approx(caption.log_prob, rel=1e-5)


def test_a_whole_model_and_the_layouts_of_others_write_what_the_captioner_writes(checkpoint: Path, tmp_path: Path):
    told = {name: value for name, value in (PAPER | OWN).items() if name not in ("strategy", "top_p")}
    options = {"tokenizer": VOCABULARY, "prompt": "a dog", **told}
    convert(checkpoint, tmp_path / "captioner.pth", "released", "captioner")
    convert(checkpoint, tmp_path / "folder", "transformers", "BlipForConditionalGeneration")
    (tmp_path / "folder" / "tokenizer.json").unlink()
    expected = Captioner(checkpoint).write(PICTURES, range(4))
    for path in (tmp_path / "captioner.pth", tmp_path / "folder"):
        with pytest.raises(ValueError, match=r"vocab\.txt"):
            Captioner(path)
        assert [[w.text for w in row] for row in Captioner(path, **options).write(PICTURES, range(4))] == [
            [w.text for w in row] for row in expected
        ]


def test_what_cannot_write_is_refused_at_once(checkpoint: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="no text decoder"):
        Captioner(save(tmp_path / "filter.ckpt", decoder=False))
    with pytest.raises(ValueError, match="answers questions"):
        Captioner(save(tmp_path / "vqa.ckpt", questions=True))
    with pytest.raises(ValueError, match=r"beam_size.*beams"):
        Captioner(checkpoint, beam_size=3)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        Captioner(tmp_path / "nowhere.ckpt")


def test_a_fingerprint_tells_models_apart_and_not_files(checkpoint: Path, tmp_path: Path):
    same = Captioner(checkpoint, strategy="beam").fingerprint
    (tmp_path / "again.ckpt").write_bytes(checkpoint.read_bytes())
    assert Captioner(tmp_path / "again.ckpt").fingerprint == same
    assert Captioner(checkpoint, precision="bfloat16").fingerprint != same
    assert Captioner(save(tmp_path / "captioner.ckpt", encoder=False)).fingerprint != same

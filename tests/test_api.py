"""`blip.load` and the commands on it: results that hang on picture and model alone, and runs that can be broken off."""

from __future__ import annotations

import fcntl
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from omegaconf import OmegaConf

import blip
from blip.api import ANSWERS, FIRST, PAPER, SMOOTHING, Model
from blip.cli import parser
from blip.modules.checkpoint import convert
from blip.modules.vit import normalize
from tests import checkpoints
from tests.checkpoints import VOCABULARY


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a random model as a checkpoint of ours, with the parts that are asked for."""

    def save(**parts: bool) -> Path:
        return checkpoints.save(tmp_path_factory.mktemp("model") / "last.ckpt", **parts)

    return save


@pytest.fixture(scope="module")
def model(saved: Callable[..., Path]) -> Model:
    return blip.load(saved())


def picture(seed: int) -> np.ndarray:
    return checkpoints.picture(seed, height=40 + seed)


def test_one_picture_gives_the_result_that_it_has_in_a_list(model: Model):
    several = [picture(n) for n in range(3)]
    for options in ({"strategy": "greedy"}, {"strategy": "beam"}, {"strategy": "nucleus", "samples": 2}):
        together = model.caption(several, **options)
        for alone, among in zip(map(lambda p: model.caption(p, **options), several), together, strict=True):
            if "samples" not in options:
                alone, among = [alone], [among]
            assert [c.text for c in alone] == [c.text for c in among]
            assert [c.log_prob for c in alone] == pytest.approx([c.log_prob for c in among], rel=1e-4)
    assert np.allclose(model.embed(several)[1], model.embed(several[1]), atol=1e-5)
    matches = model.match(several, ["a dog", "a very long tail of a cat"])
    assert model.match(several[2], "a dog").probability == pytest.approx(matches[2][0].probability, abs=1e-5)


def test_a_path_its_bytes_a_pil_image_and_an_array_are_one_picture(model: Model, tmp_path: Path):
    path = tmp_path / "a.png"
    PIL.Image.fromarray(picture(1)).save(path)
    given = [path, str(path), path.read_bytes(), PIL.Image.open(path), picture(1)]
    found = model.embed(given)
    assert np.abs(found - found[0]).max() < 1e-6


def test_matches_are_those_of_the_model_itself(model: Model):
    words = ["a dog", "the cat of a man"]
    image = normalize(torch.from_numpy(model.pixels(picture(0))).permute(2, 0, 1)[None])
    with torch.no_grad():
        states = model.network.visual_encoder(image)
        for text, found in zip(words, model.match(picture(0), words), strict=True):
            ids, layout = model.packed([text])
            logits = model.network.itm_logits(ids, layout, model.network.med.look(states))
            cosine = model.network.image_features(states) @ model.network.text_features(ids, layout).T
            assert found.probability == pytest.approx(logits.softmax(-1)[0, 1].item(), abs=1e-5)
            assert found.cosine == pytest.approx(cosine.item(), abs=1e-5)


def test_an_answer_does_not_hang_on_the_questions_and_pictures_beside_it(saved: Callable[..., Path]):
    model = blip.load(saved(questions=True))
    several, wanted = [picture(n) for n in range(3)], ["what is it?", "how many dogs are on the old table?"]
    choices = ["dog", "two dogs", "a man of the cat"]
    for options in ({}, {"choices": choices}):
        together = model.answer(several, wanted, **options)
        for image, row in zip(several, together, strict=True):
            for question, among in zip(wanted, row, strict=True):
                alone = model.answer(image, question, **options)
                assert alone.text == among.text
                assert alone.log_prob == pytest.approx(among.log_prob, rel=1e-4)
        own = model.answer(several[:2], [wanted[1:], wanted], **options)  # of each picture its own
        assert [[each.text for each in row] for row in own] == [
            [each.text for each in row] for row in (together[0][1:], together[1])
        ]
    assert {each.text for row in together for each in row} <= set(choices)
    with pytest.raises(ValueError, match="2 lists of questions for 3 pictures"):
        model.answer(several, [wanted, wanted])


def test_an_answer_is_one_and_whole(saved: Callable[..., Path]):
    model, long = blip.load(saved(questions=True)), "a dog and a cat and a man and"
    short, longer = (model.answer(picture(0), "what is it?", [text]) for text in (long, f"{long} a dog"))
    assert longer.log_prob < short.log_prob - 1
    for wrong in ({"strategy": "beam", "samples": 2}, {"strategy": "nucleus"}):
        with pytest.raises(ValueError, match="likeliest"):
            model.answer(picture(0), ["what is it?", "how many?"], **wrong)
    with pytest.raises(ValueError, match=r"beam_size.*beams"):
        model.answer(picture(0), "what is it?", beam_size=5)


def test_without_a_run_decoding_is_that_of_the_configs():
    conf = Path(blip.__file__).parents[1] / "conf"
    beam, answers = (OmegaConf.load(conf / name) for name in ("decoding/beam.yaml", "task/vqa.yaml"))
    said = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(conf / "decoding/greedy.yaml"), beam))
    assert {name: said[name] for name in PAPER} == PAPER
    evaluator = answers.evaluators.vqa
    assert PAPER | OmegaConf.to_container(evaluator.decoding) == ANSWERS
    assert (evaluator.top_k, answers.label_smoothing) == (FIRST, SMOOTHING)


def test_a_model_says_what_it_was_not_made_for(model: Model, saved: Callable[..., Path]):
    with pytest.raises(ValueError, match="not fine-tuned for questions"):
        model.answer(picture(0), "what is it?")
    with pytest.raises(ValueError, match="answers questions"):
        blip.load(saved(questions=True)).caption(picture(0))


def test_log_probabilities_add_up(model: Model):
    caption = model.caption(picture(0), strategy="greedy")
    assert caption.log_prob == pytest.approx(sum(caption.token_log_probs))
    assert caption.mean_log_prob == pytest.approx(caption.log_prob / len(caption.token_log_probs))
    assert all(p <= 0 for p in caption.token_log_probs)


def test_sampling_is_a_function_of_seed_and_picture(model: Model):
    first, again, other = (model.caption(picture(0), seed=s, strategy="nucleus").text for s in (0, 0, 1))
    assert first == again != other


def test_the_layouts_of_others_give_what_ours_gives_once_the_vocabulary_is_told(
    saved: Callable[..., Path], tmp_path: Path
):
    ours = saved()
    convert(ours, tmp_path / "model.pth", "released", "itm")
    convert(ours, tmp_path / "folder", "transformers", "BlipForImageTextRetrieval")
    with pytest.raises(ValueError, match=r"vocab\.txt"):
        blip.load(tmp_path / "model.pth")
    expected = blip.load(ours).match(picture(0), ["a dog", "a cat"])
    for path in (tmp_path / "model.pth", tmp_path / "folder"):
        found = blip.load(path, tokenizer=VOCABULARY).match(picture(0), ["a dog", "a cat"])
        assert [m.probability for m in found] == pytest.approx([m.probability for m in expected], abs=1e-6)


def test_a_checkpoint_without_a_part_says_which(saved: Callable[..., Path]):
    captioner, matcher = blip.load(saved(encoder=False)), blip.load(saved(decoder=False))
    with pytest.raises(ValueError, match="no ITM head, no ITC projections"):
        captioner.match(picture(0), "a dog")
    with pytest.raises(ValueError, match="no text decoder"):
        matcher.caption(picture(0))
    assert matcher.embed(picture(0)).shape == (16,)
    assert captioner.caption(picture(0)).token_log_probs


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (np.zeros((4, 4), np.uint8), r"\[H, W, 3\] uint8"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        ("/nowhere/a.jpg", "/nowhere/a.jpg: unreadable"),
        (b"no picture", "not an image"),
    ],
)
def test_what_is_no_picture_is_named(model: Model, wrong: object, told: str):
    with pytest.raises(ValueError, match=told):
        model.embed([picture(0), wrong])  # type: ignore[list-item]


def test_an_unknown_way_of_decoding_is_refused_with_the_known_ones(model: Model):
    with pytest.raises(ValueError, match=r"beam_size.*beams"):
        model.caption(picture(0), beam_size=5)


# the commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, one that is none, and a shard of two more."""
    (tmp_path / "in" / "below").mkdir(parents=True)
    for n, name in enumerate(("a.jpg", "b.PNG", "below/c.jpg")):
        PIL.Image.fromarray(picture(n)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "in" / "notes.txt").write_text("not looked at")
    with tarfile.open(tmp_path / "in" / "shard.tar", "w") as tar:
        for n in (3, 4):
            out = io.BytesIO()
            PIL.Image.fromarray(picture(n)).save(out, "PNG")
            member = tarfile.TarInfo(f"{n}.png")
            member.size = out.tell()
            tar.addfile(member, io.BytesIO(out.getvalue()))
    return tmp_path / "in"


def run(*arguments: object) -> int:
    options = parser().parse_args([str(argument) for argument in arguments])
    return options.run(options)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_picture_gets_a_line_and_the_broken_one_is_told_of(
    saved: Callable[..., Path], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "out.jsonl"
    assert (
        run("caption", saved(), folder, "--out", out, "--batch-size", 2, "--samples", 2, "--strategy", "nucleus") == 0
    )
    names = [Path(row["picture"]).relative_to(folder).as_posix() for row in rows(out)]
    assert names == ["a.jpg", "b.PNG", "shard.tar/3.png", "shard.tar/4.png", "below/c.jpg"]
    assert all(len(row["captions"]) == 2 for row in rows(out))
    assert "broken.jpg: not an image" in capsys.readouterr().err


def test_a_command_that_was_broken_off_goes_on_and_ends_as_if_it_had_not_been(
    saved: Callable[..., Path], folder: Path, tmp_path: Path
):
    model, whole, cut = saved(), tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    wanted = ("match", model, folder, "--text", "a dog", "--text", "a cat", "--batch-size", 1)
    run(*wanted, "--out", whole)
    run(*wanted, "--out", cut)
    lines = cut.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:2]) + lines[2][:20])
    run(*wanted, "--out", cut)
    assert cut.read_bytes() == whole.read_bytes()


def test_a_name_that_is_no_utf8_stops_nothing_and_is_known_again(
    saved: Callable[..., Path], folder: Path, tmp_path: Path
):
    os.rename(folder / "a.jpg", os.fsencode(folder) + b"/\xff.jpg")
    out, model = tmp_path / "out.jsonl", saved()
    for _ in range(2):
        assert run("embed", model, folder, "--out", out, "--batch-size", 2) == 0
    assert [os.fsencode(row["picture"]).rpartition(b"/")[2] for row in rows(out)].count(b"\xff.jpg") == 1
    assert len(rows(out)) == 5


def test_a_file_begun_with_other_settings_is_not_gone_on_with(saved: Callable[..., Path], folder: Path, tmp_path: Path):
    model, out = saved(), tmp_path / "out.jsonl"
    run("match", model, folder, "--text", "a dog", "--out", out)
    before = out.read_bytes()
    with pytest.raises(ValueError, match=r"other settings \(text\)"):
        run("match", model, folder, "--text", "a cat", "--out", out)
    assert out.read_bytes() == before


def test_answers_are_chosen_from_a_file_of_answers(saved: Callable[..., Path], folder: Path, tmp_path: Path):
    (tmp_path / "answers.json").write_text('["dog", "cat"]')
    out, model = tmp_path / "out.jsonl", saved(questions=True)
    run("answer", model, folder, "--question", "what is it?", "--answers", tmp_path / "answers.json", "--out", out)
    assert {row["answers"][0]["answer"] for row in rows(out)} <= {"dog", "cat"}
    (tmp_path / "answers.json").write_text('{"dog": 1}')
    with pytest.raises(ValueError, match="no list of answers"):
        run("answer", model, folder, "--question", "what is it?", "--answers", tmp_path / "answers.json")


def test_each_picture_is_asked_its_own_questions_and_the_others_none(
    saved: Callable[..., Path], folder: Path, tmp_path: Path
):
    asked = [("below/c.jpg", "is it red?"), ("3.png", "what is it?"), ("c.jpg", "how many dogs are there?")]
    file, out, model = tmp_path / "questions.jsonl", tmp_path / "out.jsonl", saved(questions=True)
    file.write_text("".join(json.dumps({"picture": name, "question": text}) + "\n" for name, text in asked))
    assert run("answer", model, folder, "--questions", file, "--out", out) == 0
    found = {Path(row["picture"]).name: [each["question"] for each in row["answers"]] for row in rows(out)}
    assert found == {"3.png": ["what is it?"], "c.jpg": ["is it red?", "how many dogs are there?"]}
    file.write_text('{"picture": "a.jpg", "question": "what is it?"}\n')
    with pytest.raises(ValueError, match=r"other settings \(question\)"):
        run("answer", model, folder, "--questions", file, "--out", out)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"picture": "a.jpg"}', "line 1: expected"),
        ("what is it?", "line 1: expected"),
        ('{"picture": "d.jpg", "question": "what is it?"}', r"line 1: none of the pictures that were given is d\.jpg"),
        ("", "no questions there"),
    ],
)
def test_a_line_that_is_no_question_of_a_picture_is_named(
    saved: Callable[..., Path], folder: Path, tmp_path: Path, line: str, told: str
):
    (tmp_path / "questions.jsonl").write_text(line)
    with pytest.raises(ValueError, match=told):
        run("answer", saved(questions=True), folder, "--questions", tmp_path / "questions.jsonl")


def test_two_processes_do_not_write_one_file_nor_its_settings(saved: Callable[..., Path], folder: Path, tmp_path: Path):
    out = tmp_path / "out.jsonl"
    with open(out, "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process"):
            run("embed", saved(), folder, "--out", out)
    assert not (tmp_path / "out.jsonl.settings.json").exists()


def test_a_model_is_named_by_its_run_and_what_is_none_by_its_path(saved: Callable[..., Path], tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").symlink_to(path := saved())
    assert blip.load(tmp_path).fingerprint == blip.load(path).fingerprint
    (tmp_path / "notes.txt").write_text("imagine a model")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        blip.load(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="device 'gpu' cannot be had here"):
        blip.load(path, device="gpu")


def test_nothing_but_broken_pictures_is_a_failure(
    saved: Callable[..., Path], folder: Path, capsys: pytest.CaptureFixture
):
    assert run("embed", saved(), folder / "broken.jpg") == 1
    assert capsys.readouterr().out == ""


def test_an_input_that_names_nothing_is_told(saved: Callable[..., Path], tmp_path: Path):
    with pytest.raises(ValueError, match="no such file, folder or pattern"):
        run("embed", saved(), tmp_path / "*.jpg")


def test_a_search_finds_what_the_cosines_say_and_refuses_another_models_vectors(
    saved: Callable[..., Path], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    path, vectors = saved(), tmp_path / "vectors.jsonl"
    run("embed", path, folder, "--out", vectors)
    capsys.readouterr()
    assert run("search", path, vectors, "a dog", "--top", 2) == 0
    found = json.loads(capsys.readouterr().out)["found"]
    names = [row["picture"] for row in rows(vectors)]
    model = blip.load(path)
    cosines = np.array([row["embedding"] for row in rows(vectors)]) @ model.embed_text("a dog")
    assert [each["picture"] for each in found] == [names[i] for i in np.argsort(-cosines)[:2]]
    with pytest.raises(ValueError, match="another model"):
        run("search", saved(decoder=False), vectors, "a dog")
    run("match", path, folder, "--text", "a dog", "--out", tmp_path / "matches.jsonl")
    with pytest.raises(ValueError, match="written by `blip match`"):
        run("search", path, tmp_path / "matches.jsonl", "a dog")

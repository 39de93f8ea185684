"""Scores of captions: worked out by hand, equal to the COCO toolkit's, and clear about what cannot be had."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra.utils
import pytest
from omegaconf import OmegaConf

from blip.cli import main
from blip.metrics import captions
from blip.metrics.captions import caption_scores, missing, score_captions
from tests.metrics.test_ptb import flickr8k

pytest.importorskip("pycocoevalcap", reason="the extra `metrics` is not installed")
TOOLKIT = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]


@pytest.fixture
def forget():
    """What is missing is asked anew, before and after."""
    missing.cache_clear()
    yield
    missing.cache_clear()


def test_bleu_and_rouge_by_hand():
    scores = score_captions([["A dog runs fast."]], ["a dog runs"], ["bleu", "rouge_l"])
    assert scores.corpus["Bleu_1"] == pytest.approx(math.exp(1 - 4 / 3))  # all three words right, one too few
    assert scores.corpus["ROUGE_L"] == pytest.approx((1 + 1.2**2) * 1 * 0.75 / (0.75 + 1.2**2 * 1))
    assert scores.per_image == [pytest.approx(scores.corpus)]


def test_cider_by_hand():
    # "a" is in both images and tells nothing; "dog" and "a dog" match in the first: two of four orders are whole
    scores = score_captions([["a dog"], ["a cat"]], ["a dog", "a dog"], ["cider"])
    assert scores.per_image == [{"CIDEr": pytest.approx(5)}, {"CIDEr": 0}]
    assert scores.corpus == {"CIDEr": pytest.approx(2.5)}


def test_scores_of_an_evaluator_are_in_percent_under_our_names():
    scores = caption_scores([["a dog"], ["a cat"]], ["a dog", "a dog"])
    assert list(scores) == ["bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider"]
    assert scores["cider"] == pytest.approx(250)
    assert scores["bleu1"] == pytest.approx(75)


def test_an_empty_caption_scores_nothing():
    scores = score_captions([["a dog runs"], ["a cat sits"]], ["", "a cat sits"])
    assert set(scores.per_image[0].values()) == {0}
    assert scores.per_image[1]["ROUGE_L"] == pytest.approx(1)


@pytest.mark.parametrize("partial", [False, True])
def test_a_config_names_the_scores(partial: bool):
    node = (
        {"_target_": "blip.metrics.captions.caption_scores", "_partial_": True, "metrics": ["cider"]}
        if partial
        else {"_target_": "hydra.utils.get_method", "path": "blip.metrics.captions.caption_scores"}
    )
    scores = hydra.utils.instantiate(OmegaConf.create(node))([["a dog"], ["a cat"]], ["a dog", "a cat"])
    assert scores["cider"] == pytest.approx(500)
    assert ("bleu4" in scores) != partial


@pytest.mark.parametrize("folder", ["coco_fakecap", "flickr8k_val"])
def test_scores_are_those_of_the_toolkit(reference: Path, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    files = evaluation(reference, folder, tmp_path)
    scores = scored(capsys, *files, "bleu", "rouge_l", "cider")
    expected = json.loads((reference / "data/metrics" / folder / "expected.json").read_text(encoding="utf-8"))
    assert scores["n"] == expected["n"] == len(scores["per_image"])
    assert scores["corpus"] == pytest.approx({name: expected["corpus"][name] for name in TOOLKIT}, abs=1e-6, rel=0)
    for image, values in expected["per_image"].items():
        assert scores["per_image"][image] == pytest.approx({name: values[name] for name in TOOLKIT}, abs=1e-6, rel=0)


def test_meteor_is_that_of_the_toolkit(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = "coco_fakecap"  # the larger set takes Java a minute
    if shutil.which("java") is None:
        pytest.skip("METEOR needs Java")
    scores = scored(capsys, *evaluation(reference, folder, tmp_path), "meteor")
    expected = json.loads((reference / "data/metrics" / folder / "expected.json").read_text(encoding="utf-8"))
    assert scores["corpus"]["METEOR"] == pytest.approx(expected["corpus"]["METEOR"], abs=1e-6, rel=0)
    for image, values in expected["per_image"].items():
        assert scores["per_image"][image]["METEOR"] == pytest.approx(values["METEOR"], abs=1e-6, rel=0)


def evaluation(reference: Path, folder: str, tmp_path: Path) -> tuple[Path, Path]:
    """References and captions of a reference set: COCO's layout as it is, or the plain one made here."""
    if folder == "coco_fakecap":
        return tuple(reference / "data/metrics" / folder / name for name in ("references.json", "results.json"))  # type: ignore[return-value]
    said = flickr8k(reference, "val")
    truth, captions = tmp_path / "truth.json", tmp_path / "captions.json"
    truth.write_text(json.dumps({image: [c for n, c in enumerate(texts) if n != 1] for image, texts in said.items()}))
    captions.write_text(json.dumps({image: [texts[1]] for image, texts in said.items()}))
    return truth, captions


def scored(capsys: pytest.CaptureFixture, truth: Path, captions: Path, *metrics: str) -> dict:
    assert main(["score", str(truth), str(captions), *(["--metrics", *metrics] if metrics else [])]) == 0
    return json.loads(capsys.readouterr().out)


def written(tmp_path: Path, truth: object, said: object) -> list[str]:
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "said.json").write_text(json.dumps(said))
    return ["score", str(tmp_path / "truth.json"), str(tmp_path / "said.json")]


COCO = {"annotations": [{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "a cat"}]}


def test_images_without_a_caption_are_noted_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([*written(tmp_path, COCO, {"2": ""}), "--metrics", "bleu"]) == 0
    out, notes = capsys.readouterr()
    assert list(json.loads(out)["per_image"]) == ["2"]
    assert "1 of 2 images of" in notes
    assert "have no caption and are not scored: 1" in notes
    assert "1 captions are empty and score 0: 2" in notes


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ([{"image_id": 3, "caption": "a"}], "1 images have no references in"),
        ([{"image_id": 1, "caption": "a"}] * 2, "1 images have none or several: 1"),
        ({"1": []}, "1 images have none or several: 1"),
        ([{"image_id": 1}], "row 0 is {'image_id': 1}; expected"),
        ({"1": [3]}, "expected a list of strings"),
        ([], "no captions; expected"),
    ],
)
def test_captions_that_fit_no_reference_are_one_error(said, says: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(written(tmp_path, COCO, said)) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert says in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((["a dog"], ["a", "b"]), "2 captions, but references of 1 images"),
        (([], []), "no captions"),
        (([["a"], []], ["a", "b"]), "1 of 2 images have no reference, the first is number 1"),
        (([["..."]], ["a"]), "no reference holds a word"),
        (([["a"]], ["a"], ["bleurt"]), "no metric 'bleurt'; there are bleu"),
    ],
)
def test_what_cannot_be_scored_is_refused(arguments, says: str):
    with pytest.raises(ValueError, match=says):
        score_captions(*arguments)


def test_without_java_the_others_work(monkeypatch, forget, tmp_path: Path, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(written(tmp_path, COCO, {"1": "a dog", "2": "a cat"})) == 0
    out, notes = capsys.readouterr()
    assert list(json.loads(out)["corpus"]) == TOOLKIT
    assert notes.count("meteor needs Java on the PATH") == 1
    with pytest.warns(UserWarning, match="meteor needs Java") as warned:
        assert list(caption_scores([["a dog"]], ["a dog"], ["meteor", "rouge_l"])) == ["rouge_l"]
    assert len(warned) == 1
    with pytest.raises(ValueError, match="meteor needs Java"):
        score_captions([["a dog"]], ["a dog"], ["meteor"])


def test_without_the_package_the_error_names_it(monkeypatch, forget):
    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'blip-lightning\[metrics\]'"):
        score_captions([["a dog"]], ["a dog"])


@pytest.fixture
def java(tmp_path: Path, monkeypatch, forget):
    """Puts a program of ours in Java's place, in a package that has SPICE's jars."""

    def stand_in(body: str) -> Path:
        for part in ("spice/lib", "meteor", "bin", "temporary"):
            (tmp_path / part).mkdir(parents=True, exist_ok=True)
        for name in captions.SPICE_JARS:
            (tmp_path / "spice/lib" / name).touch()
        program = tmp_path / "bin" / "java"
        program.write_text(f"#!{sys.executable}\nimport json, os, sys\n{body}")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent))
        monkeypatch.setattr(captions.tempfile, "tempdir", str(tmp_path / "temporary"))
        monkeypatch.setattr(captions, "_package", lambda part: tmp_path / part)
        return tmp_path / "temporary"

    return stand_in


def test_spice_is_read_from_its_program_and_nothing_is_left_behind(java):
    temporary = java(
        "images = json.load(open(sys.argv[sys.argv.index('-jar') + 2]))\n"
        "rows = [{'image_id': i['image_id'], 'scores': {'All': {'f': 0.25 * (1 + i['image_id'])}}} for i in images[::-1]]\n"
        "json.dump(rows, open(sys.argv[sys.argv.index('-out') + 1], 'w'))\n"
    )
    scores = score_captions([["a dog"], ["a cat"]], ["a dog", "a cat"], ["spice"])
    assert scores.per_image == [{"SPICE": 0.25}, {"SPICE": 0.5}]
    assert scores.corpus == {"SPICE": 0.375}
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("metric", ["meteor", "spice"])
def test_a_failing_program_says_why_and_leaves_nothing_behind(metric: str, java):
    temporary = java("sys.exit('no memory for the heap')\n")
    with pytest.raises(OSError, match="no memory for the heap"):
        score_captions([["a dog"]], ["a dog"], [metric])
    assert list(temporary.iterdir()) == []


def test_a_program_that_ends_before_it_is_asked_says_why(java, monkeypatch: pytest.MonkeyPatch):
    java("sys.exit('no memory for the heap')\n")
    ask = captions._ask

    def ask_too_late(*arguments: Any) -> str:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        return ask(*arguments)

    monkeypatch.setattr(captions, "_ask", ask_too_late)
    with pytest.raises(OSError, match="no memory for the heap"):
        score_captions([["a dog"]], ["a dog"], ["meteor"])


def test_without_its_jars_spice_names_the_folder_and_the_source(java, tmp_path: Path):
    java("")
    (tmp_path / "spice/lib" / captions.SPICE_JARS[1]).unlink()
    assert str(tmp_path / "spice/lib") in missing("spice")
    assert captions.SPICE_JARS[1] in missing("spice")
    assert captions.SPICE_JARS[0] not in missing("spice")
    assert captions.SPICE_URL in missing("spice")


def test_score_is_light(tmp_path: Path):
    arguments = [*written(tmp_path, COCO, {"1": "a dog", "2": "a cat"}), "--metrics", "bleu", "cider"]
    program = (
        "import sys; from blip.cli import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'lightning', 'transformers', 'matplotlib', 'pycocotools'} & set(sys.modules); sys.exit(str(heavy) if heavy else status)"
    )
    run = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["n"] == 2

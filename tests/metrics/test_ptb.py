"""The words of captions are those of Stanford's tokenizer: of texts kept here, of the reference data, and of the program itself."""

from __future__ import annotations

import csv
import json
import random
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from blip.metrics.captions import _package
from blip.metrics.ptb import DROPPED, tokenize

PAIRS = json.loads(Path(__file__).with_name("ptb.json").read_text(encoding="utf-8"))  # [text, its words], in one go


def test_words_are_those_of_the_original():
    texts, words = zip(*PAIRS, strict=True)
    assert tokenize(texts) == list(words)


def test_a_line_break_within_a_caption_shifts_no_other():
    assert tokenize(["a\ndog", "", "a\r\ncat\u2028sits", " "]) == ["a dog", "", "a cat sits", ""]


def test_no_captions_have_no_words():
    assert tokenize([]) == []


@pytest.mark.parametrize("repeated", ["\u02c6", "\u05b0", "a\u0300", "&aacute;", "a.", "a-", "<a "])
def test_whatever_is_repeated_the_words_are_soon_had(repeated: str):
    program = "import sys; from blip.metrics.ptb import tokenize; tokenize([sys.argv[1]])"
    subprocess.run([sys.executable, "-c", program, repeated * 200], check=True, timeout=20)


@pytest.mark.parametrize("folder", ["coco_fakecap", "flickr8k_val"])
def test_words_of_a_whole_evaluation_are_those_of_the_original(reference: Path, folder: str):
    tokenized = json.loads((reference / "data/metrics" / folder / "tokenized.json").read_text(encoding="utf-8"))
    if folder == "coco_fakecap":
        texts = {"references": {}, "results": {}}
        files = reference / "data/metrics" / folder
        for row in json.loads((files / "references.json").read_text(encoding="utf-8"))["annotations"]:
            texts["references"].setdefault(str(row["image_id"]), []).append(row["caption"])
        for row in json.loads((files / "results.json").read_text(encoding="utf-8")):
            texts["results"][str(row["image_id"])] = [row["caption"]]
    else:
        captions = flickr8k(reference, "val")
        texts = {
            "references": {image: [c for n, c in enumerate(said) if n != 1] for image, said in captions.items()},
            "results": {image: [said[1]] for image, said in captions.items()},
        }
    for part, expected in tokenized.items():
        words = iter(tokenize([caption for image in expected for caption in texts[part][image]]))
        assert {image: [next(words) for _ in said] for image, said in expected.items()} == expected


def test_words_are_those_of_the_program_where_it_runs(reference: Path, tmp_path: Path):
    data = reference / "data"
    photos = [json.loads(line) for line in (data / "photos/captions.jsonl").read_text(encoding="utf-8").splitlines()]
    web = [json.loads(line) for line in (data / "web_alt_texts.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [caption for photo in photos for caption in photo["captions"]] + [line["text"] for line in web]
    texts += [caption for said in flickr8k(data.parent, "test").values() for caption in said]
    texts += invented(400, seed=2)
    texts = [text.replace("\n", " ") for text in texts]
    assert [
        text
        for text, ours, theirs in zip(texts, tokenize(texts), original(texts, tmp_path), strict=True)
        if ours != theirs
    ] == []


def flickr8k(reference: Path, split: str) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    with (reference / "data/flickr8k/captions.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["split"] == split:
                captions.setdefault(row["image"], []).append(row["caption"])
    return captions


def invented(count: int, seed: int) -> list[str]:
    """Texts put together of pieces of the kept ones, with and without spaces between."""
    draw = random.Random(seed)
    pieces = [piece for text, _ in PAIRS for piece in text.split()]
    return [
        "".join(draw.choice(pieces) + draw.choice(["", " ", " "]) for _ in range(draw.randint(1, 6)))
        for _ in range(count)
    ]


def original(texts: list[str], folder: Path) -> list[str]:
    """The words by the Java program that pycocoevalcap brings."""
    if shutil.which("java") is None or find_spec("pycocoevalcap") is None:
        pytest.skip("no Java or no pycocoevalcap here to compare with")
    jar = _package("tokenizer") / "stanford-corenlp-3.4.1.jar"
    (folder / "texts").write_text("\n".join(texts), encoding="utf-8")
    command = [
        "java",
        "-Dfile.encoding=UTF-8",
        "-cp",
        str(jar),
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
    ]
    lines = (
        subprocess.run([*command, str(folder / "texts")], capture_output=True, check=True).stdout.decode().split("\n")
    )
    return [
        " ".join(word for word in line.rstrip(" ").split(" ") if word not in DROPPED) for line in lines[: len(texts)]
    ]

"""BLEU-1..4, ROUGE-L, CIDEr, METEOR and SPICE of captions, as COCO's evaluation computes them.

Words come from `ptb.tokenize`; the scores from pycocoevalcap (the extra `metrics`): BLEU (closest reference length), ROUGE-L
(beta 1.2) and CIDEr-D (sigma 6, document frequencies from the references that are passed in) are Python. METEOR 1.5 and SPICE
are Java programs of that package; SPICE also needs two jars that it does not bring. Whatever is missing is said by `missing`,
and the others work without it. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from blip.metrics.files import read_json
from blip.metrics.ptb import tokenize

METRICS = ("bleu", "meteor", "rouge_l", "cider", "spice")
WITHOUT_JAVA = ("bleu", "rouge_l", "cider")
# Our names, and those of the COCO toolkit.
NAMES = {
    "bleu1": "Bleu_1", "bleu2": "Bleu_2", "bleu3": "Bleu_3", "bleu4": "Bleu_4",
    "meteor": "METEOR", "rouge_l": "ROUGE_L", "cider": "CIDEr", "spice": "SPICE",
}  # fmt: skip
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
SPICE_URL = "http://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"


@dataclass(frozen=True)
class Scores:
    """Under the toolkit's names and on its scale (fractions; CIDEr from 0 to 10): of the whole set, and of each image in order."""

    corpus: dict[str, float]
    per_image: list[dict[str, float]]


def caption_scores(
    references: Sequence[Sequence[str]], captions: Sequence[str], metrics: Sequence[str] = WITHOUT_JAVA
) -> dict[str, float]:
    """bleu1..bleu4, rouge_l, cider (meteor, spice) of captions in percent, as papers print them.

    A metric that is asked for and cannot be computed here is left out with one warning that says what is missing.
    """
    possible = []
    for metric in metrics:
        if reason := missing(metric):
            warnings.warn(reason, stacklevel=2)
        else:
            possible.append(metric)
    corpus = score_captions(references, captions, possible).corpus if possible else {}
    return {ours: 100 * corpus[name] for ours, name in NAMES.items() if name in corpus}


def score_captions(
    references: Sequence[Sequence[str]], captions: Sequence[str], metrics: Sequence[str] = WITHOUT_JAVA
) -> Scores:
    """Scores of one caption an image against its references, tokens and order as the COCO toolkit has them.

    An empty caption counts as one (its scores are 0). With a single image CIDEr is 0: no word tells it from another.
    """
    if len(references) != len(captions):
        raise ValueError(f"{len(captions)} captions, but references of {len(references)} images; one caption an image")
    if not captions:
        raise ValueError("no captions to score")
    bare = [image for image, texts in enumerate(references) if not texts]
    if bare:
        raise ValueError(f"{len(bare)} of {len(references)} images have no reference, the first is number {bare[0]}")
    for metric in metrics:
        if reason := missing(metric):
            raise ValueError(reason)

    words = iter(tokenize([text for texts in references for text in texts]))
    truth = {image: [next(words) for _ in texts] for image, texts in enumerate(references)}
    if not any(text for texts in truth.values() for text in texts):
        raise ValueError("no reference holds a word")
    said = {image: [caption] for image, caption in enumerate(tokenize(captions))}
    corpus: dict[str, float] = {}
    each: dict[str, Sequence[float]] = {}
    for metric in metrics:
        corpus |= (scored := _score(metric, truth, said))[0]
        each |= scored[1]
    rows = [{name: float(values[image]) for name, values in each.items()} for image in said]
    return Scores({name: corpus[name] for name in NAMES.values() if name in corpus}, rows)


@functools.cache
def missing(metric: str) -> str:
    """What a metric lacks on this machine and where to get it; "" where it can be computed."""
    if metric not in METRICS:
        raise ValueError(f"no metric {metric!r}; there are {', '.join(METRICS)}")
    if importlib.util.find_spec("pycocoevalcap") is None:
        return f"{metric} needs the package pycocoevalcap: pip install 'blip-lightning[metrics]'"
    if metric in WITHOUT_JAVA:
        return ""
    if shutil.which("java") is None:
        return f"{metric} needs Java on the PATH (version 8 or later, such as Debian's default-jre-headless); left out"
    absent = [name for name in SPICE_JARS if not (_package("spice") / "lib" / name).is_file()]
    if metric == "spice" and absent:
        return (
            f"spice needs {' and '.join(absent)} in {_package('spice') / 'lib'}: they are in {SPICE_URL}, "
            "which is not downloaded for you; left out"
        )
    return ""


def _package(part: str) -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / part


Words = dict[int, list[str]]  # image -> its tokenised captions


def _score(metric: str, truth: Words, said: Words) -> tuple[dict[str, float], dict[str, Sequence[float]]]:
    """One metric under the toolkit's names: {name: of the set}, {name: [of each image]}."""
    if metric == "bleu":
        from pycocoevalcap.bleu.bleu import Bleu

        whole, each = Bleu(4).compute_score(truth, said, verbose=0)
        names = [f"Bleu_{n}" for n in range(1, 5)]
        return {name: float(x) for name, x in zip(names, whole, strict=True)}, dict(zip(names, each, strict=True))
    if metric == "rouge_l":
        from pycocoevalcap.rouge.rouge import Rouge

        whole, each = Rouge().compute_score(truth, said)
    elif metric == "cider":
        from pycocoevalcap.cider.cider import Cider

        whole, each = Cider().compute_score(truth, said)
    else:
        whole, each = (_meteor if metric == "meteor" else _spice)(truth, said)
    return {NAMES[metric]: float(whole)}, {NAMES[metric]: each}


def _meteor(truth: Words, said: Words) -> tuple[float, list[float]]:
    """METEOR 1.5, English, normalised: the jar answers a line for each image, then scores what it answered, then the whole."""
    command = [
        "java",
        "-Dfile.encoding=UTF-8",
        "-Xmx2G",
        "-jar",
        "meteor-1.5.jar",
        "-",
        "-",
        "-stdio",
        "-l",
        "en",
        "-norm",
    ]
    folder = _package("meteor")
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
        ) as java,
    ):
        assert java.stdin is not None
        assert java.stdout is not None
        try:
            statistics = []
            for image, (caption,) in said.items():
                line = " ||| ".join(["SCORE", *truth[image], caption.replace("|||", "").replace("  ", " ")])
                statistics.append(_ask(java.stdin, java.stdout, line))
            first = float(_ask(java.stdin, java.stdout, " ||| ".join(["EVAL", *statistics])))
            rest = [float(java.stdout.readline()) for _ in said]
        except (ValueError, OSError) as error:
            java.kill()
            java.wait()
            with contextlib.suppress(OSError):  # what it did not take any more would be written once again
                java.stdin.close()
            errors.seek(0)
            raise OSError(f"METEOR's Java program failed: {errors.read().strip()[-500:] or error}") from error
        finally:
            java.kill()
        *each, whole = [first, *rest]
        return whole, each


def _ask(to: IO[str], answers: IO[str], line: str) -> str:
    to.write(line + "\n")
    to.flush()
    return answers.readline().strip()


def _spice(truth: Words, said: Words) -> tuple[float, list[float]]:
    """SPICE 1.0: F-scores of the scene graphs; an image whose captions hold no tuple at all has none (NaN)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cache").mkdir()
        images = [{"image_id": image, "test": caption, "refs": truth[image]} for image, (caption,) in said.items()]
        (folder / "in.json").write_text(json.dumps(images), encoding="utf-8")
        command = ["java", "-Dfile.encoding=UTF-8", "-Xmx8G", "-jar", "spice-1.0.jar", str(folder / "in.json")]
        options = ["-cache", str(folder / "cache"), "-out", str(folder / "out.json"), "-subset", "-silent"]
        # Its serializer looks into Java's own classes, which Java 9 and later allow only when told; Java 8 ignores the variable.
        opens = " ".join(
            f"--add-opens=java.base/java.{part}=ALL-UNNAMED" for part in ("lang", "util", "math", "text", "net")
        )
        run = subprocess.run(
            command + options,
            cwd=_package("spice"),
            env=os.environ | {"JDK_JAVA_OPTIONS": opens},
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            raise OSError(f"SPICE's Java program failed ({run.returncode}): {run.stderr.strip()[-500:]}")
        found = {item["image_id"]: item["scores"]["All"]["f"] for item in read_json(folder / "out.json")}
    each = [math.nan if found[image] is None else float(found[image]) for image in said]
    return sum(each) / len(each), each


# --- the files of `blip score` ---


def score_caption_files(references: Path, captions: Path, metrics: Iterable[str]) -> tuple[dict, list[str]]:
    """{"n", "corpus", "per_image": {id: ...}} of two files, and notes on what was left out.

    References are COCO's {"annotations": [{"image_id", "caption"}]} or {id: [captions]}; captions are COCO's results
    [{"image_id", "caption"}] or {id: caption}. As with the toolkit's example, the images that have a caption are scored; as
    with its `loadRes`, a caption of an unknown image or a second one of an image is an error.
    """
    truth, said = _captions_in(references), _captions_in(captions)
    if unknown := [image for image in said if image not in truth]:
        raise ValueError(f"{captions}: {len(unknown)} images have no references in {references}: {_some(unknown)}")
    if several := [image for image, texts in said.items() if len(texts) != 1]:
        raise ValueError(
            f"{captions}: one caption an image is scored, but {len(several)} images have none or several: {_some(several)}"
        )
    images = [image for image in truth if image in said]
    notes = []
    if absent := [image for image in truth if image not in said]:
        notes.append(
            f"{len(absent)} of {len(truth)} images of {references} have no caption and are not scored: {_some(absent)}"
        )
    if empty := [image for image in images if not said[image][0].strip()]:
        notes.append(f"{len(empty)} captions are empty and score 0: {_some(empty)}")
    possible = []
    for metric in metrics:
        if reason := missing(metric):
            notes.append(reason)
        else:
            possible.append(metric)
    if not possible:
        raise ValueError("; ".join(notes))
    scores = score_captions([truth[image] for image in images], [said[image][0] for image in images], possible)
    per_image = dict(zip(images, scores.per_image, strict=True))
    return {"n": len(images), "corpus": scores.corpus, "per_image": per_image}, notes


def _captions_in(path: Path) -> dict[str, list[str]]:
    """{id: [captions]} of a file of either layout; ids as strings, so that 7 and "7" are one image."""
    content = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        content = content["annotations"]
    found: dict[str, list[str]] = {}
    if isinstance(content, list):
        for number, row in enumerate(content):
            if not isinstance(row, dict) or "image_id" not in row or not isinstance(row.get("caption"), str):
                raise ValueError(
                    f"{path}: row {number} is {str(row)[:80]}; expected {{'image_id': ..., 'caption': '...'}}"
                )
            found.setdefault(str(row["image_id"]), []).append(row["caption"])
    elif isinstance(content, dict):
        for image, texts in content.items():
            texts = [texts] if isinstance(texts, str) else texts
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{path}: captions of {image!r} are {str(texts)[:80]}; expected a list of strings")
            found[image] = texts
    if not found:
        raise ValueError(f"{path}: no captions; expected COCO's layout or {{id: [captions]}}")
    return found


def _some(images: Sequence[str]) -> str:
    return ", ".join(images[:5]) + ", ..." * (len(images) > 5)

"""Real photos from files to captions and answers, through checkpoint and command line, by the base model with random weights.

    python -m benchmarks.photos PHOTOS QUESTIONS VOCABULARY [--size PX] [--float32] [--batch N] [--out FOLDER] [--json FILE]

PHOTOS is a folder, QUESTIONS a file as `blip answer --questions` takes it (tests/fixtures/photo_questions.jsonl), VOCABULARY BERT's
vocab.txt. What is said means nothing; that every photo gets its caption and every question its answer, once each, is checked, and
the time of a photo stands beside that of the image encoder alone, which is the limit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from benchmarks.report import begin, end, row
from blip.api import load
from blip.cli import main as blip
from blip.datamodules.files import find
from blip.modules.blip import BLIP
from blip.modules.checkpoint import blip_config
from blip.modules.vit import normalize
from blip.modules.vqa import VQA
from blip.overrides import CONF
from blip.text import Tokenizer


def random_checkpoint(path: Path, model: str, size: int, vocabulary: Path, questions: bool) -> Path:
    """A captioner's checkpoint, or that of a model for questions, at the start of `model=NAME` with pictures of `size` px."""
    words = Tokenizer.load(vocabulary)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [f"model={model}", f"data.image_size={size}"])
    nodes: Any = OmegaConf.to_container(cfg.model, resolve=True)
    torch.manual_seed(0)
    config = blip_config(nodes, len(words), words.dec_id, words.enc_id)
    network = VQA(config) if questions else BLIP(config, encoder=False)
    state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    said = {"model": nodes, "task": {"evaluators": {"caption": {"prompt": "a picture of "}}}}
    torch.save({"state_dict": state, "tokenizer": words.to_json(), "config": json.dumps(said)}, path)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def caption_all(checkpoint: Path, photos: Path, out: Path, *options: str) -> int:
    """Runs `blip caption` and returns how many photos it captioned; ValueError where one has no caption or two."""
    blip(["caption", str(checkpoint), str(photos), "--out", str(out), *options])
    found = Counter(line["picture"] for line in lines(out) for _ in line["captions"])
    if found != Counter(place.name for place in find([photos])):
        raise ValueError(f"{out}: not a caption for each of the pictures of {photos}")
    return len(found)


def answer_all(checkpoint: Path, photos: Path, questions: Path, out: Path, *options: str) -> int:
    """Runs `blip answer` and returns how many questions it answered; ValueError where one has no answer or two."""
    blip(["answer", str(checkpoint), str(photos), "--questions", str(questions), "--out", str(out), *options])
    found = Counter((Path(line["picture"]).name, each["question"]) for line in lines(out) for each in line["answers"])
    if found != Counter((line["picture"], line["question"]) for line in lines(questions)):
        raise ValueError(f"{out}: not an answer to each of the questions of {questions}")
    return found.total()


def encoder_seconds(checkpoint: Path, photos: Path, precision: str, count: int) -> float:
    """Of the image encoder alone for a photo, the mean of so many in one batch."""
    model = load(checkpoint, precision=precision)
    pixels = [torch.from_numpy(model.pixels(place)) for place in find([photos])[:count]]  # type: ignore[arg-type]
    image = normalize(torch.stack(pixels).permute(0, 3, 1, 2).to(model.device))
    with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        start = time.process_time()
        model.network.visual_encoder(image)
    return (time.process_time() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("--size", type=int, default=384, help="pixels of a side (default: %(default)s)")
    parser.add_argument("--float32", action="store_true", help="float32 instead of bf16")
    parser.add_argument("--batch", type=int, default=10, help="photos at once (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="keep what is said in this folder")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    precision = "float32" if options.float32 else "bfloat16"
    head = begin(
        f"base model, random weights, {options.size} px, {precision}, {options.batch} at once",
        note="; seconds are the processor's",
    )
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        how = ("--batch-size", str(options.batch), "--precision", precision)
        rows = []
        for task in ("caption", "answer"):
            made = (Path(temporary) / f"{task}.ckpt", "base", options.size, options.vocabulary, task == "answer")
            checkpoint, file = random_checkpoint(*made), out / f"{task}s.jsonl"
            alone = encoder_seconds(checkpoint, options.photos, precision, options.batch)
            start = time.process_time()
            if task == "caption":
                count = photos = caption_all(checkpoint, options.photos, file, *how)
            else:
                count = answer_all(checkpoint, options.photos, options.questions, file, *how)
                photos = len(lines(file))
            seconds = (time.process_time() - start) / photos
            print(f"{count} {task}s for {photos} photos; the first: {json.dumps(lines(file)[0])[:300]}")
            rows.append(row(f"{task}s, loading included", seconds, "s a photo", "image encoder alone", alone))
            checkpoint.unlink()
    end(head, rows, options.json)


if __name__ == "__main__":
    main()

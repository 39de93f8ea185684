"""Real photos and the project's own questions about them go all the way: from files and from shards, each answered once."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from benchmarks.photos import answer_all, caption_all, lines, random_checkpoint
from blip.overrides import CONF

QUESTIONS = Path(__file__).parent / "fixtures" / "photo_questions.jsonl"


@pytest.fixture(scope="module")
def photos(reference: Path) -> Path:
    return reference / "data" / "photos"


@pytest.fixture(scope="module")
def vocabulary(reference: Path) -> Path:
    return reference / "data" / "bert_vocab" / "vocab.txt"


def test_thirty_photos_have_three_questions_each_of_known_kinds_with_short_answers():
    rows = lines(QUESTIONS)
    assert set(Counter(row["picture"] for row in rows).values()) == {3}
    assert len({(row["picture"], row["question"]) for row in rows}) == len(rows) == 90
    assert {row["kind"] for row in rows} == {"yes/no", "count", "color", "object"}
    assert all((row["answer"] in ("yes", "no")) == (row["kind"] == "yes/no") for row in rows)
    assert all(row["answer"].isdigit() == (row["kind"] == "count") for row in rows)
    assert all(row["question"].endswith("?") and len(row["answer"].split()) == 1 for row in rows)


def test_every_photo_gets_a_caption_and_every_question_an_answer_from_the_command_line(
    photos: Path, vocabulary: Path, tmp_path: Path
):
    captioner, answerer = (
        random_checkpoint(tmp_path / f"{name}.ckpt", "tiny", 32, vocabulary, name == "answers")
        for name in ("captions", "answers")
    )
    some = tmp_path / "photos"
    some.mkdir()
    for name in dict.fromkeys(row["picture"] for row in lines(QUESTIONS)):
        (some / name).symlink_to(photos / name)
    assert caption_all(captioner, some, tmp_path / "captions.jsonl") == 30
    assert answer_all(answerer, some, QUESTIONS, tmp_path / "answers.jsonl") == 90


def shard(photos: Path, path: Path) -> list[Any]:
    """The photos with their questions as a shard; returns the ids of the questions."""
    asked: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(lines(QUESTIONS)):
        entry = {"id": number, "question": row["question"], "answers": [row["answer"]], "answer_type": row["kind"]}
        asked.setdefault(row["picture"], []).append(entry)
    with tarfile.open(path, "w") as tar:
        for name, entries in asked.items():
            tar.add(photos / name, name)
            text = path.with_name(f"{Path(name).stem}.json")
            text.write_text(json.dumps({"questions": entries}))
            tar.add(text, text.name)
    return [entry["id"] for entries in asked.values() for entry in entries]


def test_every_question_of_a_shard_is_answered_and_counted_once(photos: Path, vocabulary: Path, tmp_path: Path):
    ids = shard(photos, tmp_path / "photos.tar")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["experiment=photos_base", "model=tiny", "data=questions", "data.image_size=32", "task=vqa"]
        numbers = ["data.num_workers=0", "data.eval_batch_size=7", "task.evaluators.vqa.inference=generate"]
        numbers += [
            f"task.evaluators.vqa.{x}" for x in ("accuracy=exact", "decoding.strategy=greedy", "decoding.beams=1")
        ]
        cfg = compose("config", [*overrides, *numbers, f"data.tokenizer={vocabulary}", f"paths.root={tmp_path}"])
    cfg.data.test = {"main": {"shards": str(tmp_path / "photos.tar")}}
    data = instantiate(cfg.data, _convert_="all")
    task = instantiate(cfg.task, tokenizer=data.tokenizer.to_json(), _convert_="all").eval()
    rows = []
    for batch in data.predict_dataloader():
        batch = task.on_after_batch_transfer(batch, 0)
        rows += task.predict_step(batch, 0)
        task.evaluators["vqa"].update(task.model, batch)
    assert [row["question_id"] for row in rows] == ids
    assert [(f"{row['key']}.jpg", row["question"], *row["references"]) for row in rows] == [
        (line["picture"], line["question"], line["answer"]) for line in lines(QUESTIONS)
    ]
    numbers = task.evaluators["vqa"].compute(task.model)
    assert {f"accuracy_{kind}" for kind in ("yes_no", "count", "color", "object")} < numbers.keys()
    assert numbers["chance"] == pytest.approx(100 * 15 / 90)  # yes: 15 of 90

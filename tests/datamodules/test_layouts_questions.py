"""Questions, statements and dialogues as published (VQA v2, Visual Genome, NLVR2, VisDial) become records that are read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blip.datamodules.layouts.published import LAYOUTS
from blip.datamodules.records import QUESTIONS, ROUNDS, STATEMENTS, entries_of
from tests.datamodules.published import pictures, shards, write


def vqa(
    folder: Path, part: str, questions: list[tuple[int, int, str]], answers: dict[int, list[str]] | None
) -> list[Path]:
    """Files of questions (image, id, text) and, unless a test set, of the answers."""
    head = {"info": {"version": "2.0"}, "license": {"name": "CC"}, "data_type": "mscoco", "data_subtype": part}
    asked = [{"image_id": image, "question": text, "question_id": number} for image, number, text in questions]
    files = [write(folder / f"v2_OpenEnded_mscoco_{part}_questions.json", head | {"questions": asked})]
    if answers is not None:
        said = [
            {
                "question_type": "what",
                "multiple_choice_answer": texts[0],
                "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(texts, 1)],
                "image_id": 0,
                "answer_type": "other",
                "question_id": number,
            }
            for number, texts in answers.items()
        ]
        files.append(write(folder / f"v2_mscoco_{part}_annotations.json", head | {"annotations": said}))
    return files


def test_vqa_questions_of_a_picture_stand_together_with_all_that_humans_said(tmp_path: Path):
    train = vqa(tmp_path, "train2014", [(9, 9000, "What?"), (25, 25000, "Who?"), (9, 9001, "Where?")], {
        9000: ["red"] * 6 + ["blue"] * 4, 9001: ["there"] * 10, 25000: ["he"] * 10, 77: ["lost"],
    })  # fmt: skip
    val = vqa(tmp_path, "val2014", [(42, 42000, "Is it?")], {42000: ["yes"] * 10})
    coco = pictures(tmp_path / "coco", [
        "train2014/COCO_train2014_000000000009.jpg", "train2014/COCO_train2014_000000000025.jpg",
        "val2014/COCO_val2014_000000000042.jpg",
    ])  # fmt: skip
    built, records, members = shards("vqa_v2", [coco, *train, *val], tmp_path / "out")
    assert members == ["9.png", "25.png", "42.png"]
    about = {"question_type": "what", "answer_type": "other"}
    assert records["9"]["questions"] == [
        {"id": 9000, "question": "What?", "answers": ["red"] * 6 + ["blue"] * 4} | about,
        {"id": 9001, "question": "Where?", "answers": ["there"] * 10} | about,
    ]
    assert [q["id"] for q in records["42"]["questions"]] == [42000]
    assert built.rows == {"questions": 4}
    assert built.left_out == [("answers without their question", "77")]


@pytest.mark.parametrize("part", ["test2015", "test-dev2015"])
def test_vqa_test_sets_have_questions_without_answers(tmp_path: Path, part: str):
    (path,) = vqa(tmp_path, part, [(1, 1000, "What?")], None)
    folder = pictures(tmp_path / "test2015", ["COCO_test2015_000000000001.jpg"])
    _, records, _ = shards("vqa_v2", [folder, path], tmp_path / "out")
    assert records == {"1": {"questions": [{"id": 1000, "question": "What?", "answers": []}]}}
    assert entries_of(json.dumps(records["1"]).encode(), True, QUESTIONS)[1] == []


def test_vqa_excerpt_keeps_every_answer_under_its_question(reference: Path):
    folder = reference / "data/annotations/vqa_v2"
    files = [
        folder / "v2_mscoco_train2014_annotations.json", folder / "v2_OpenEnded_mscoco_train2014_questions.json"
    ]  # fmt: skip
    entries = list(LAYOUTS["vqa_v2"].entries(files))
    made = {q["id"]: q for entry in entries for q in entry.record["questions"]}
    published = {row["question_id"]: row for row in json.loads(files[0].read_text())["annotations"]}
    asked = {row["question_id"]: row for row in json.loads(files[1].read_text())["questions"]}
    assert made.keys() == published.keys() == asked.keys()
    for number, question in made.items():
        assert question["question"] == asked[number]["question"]
        assert question["answers"] == [answer["answer"] for answer in published[number]["answers"]]
        assert question["answer_type"] == published[number]["answer_type"]
    for entry in entries:
        assert {asked[q["id"]]["image_id"] for q in entry.record["questions"]} == {int(entry.key)}
        assert entry.media[0][0] == f"COCO_train2014_{int(entry.key):012d}.jpg"


def test_annotations_alone_ask_for_their_questions(tmp_path: Path):
    files = vqa(tmp_path, "train2014", [], {1: ["a"]})
    folder = pictures(tmp_path / "images", ["1.jpg"])
    with pytest.raises(ValueError, match="no questions; annotations need their file of questions"):
        shards("vqa_v2", [folder, files[1]], tmp_path / "out")


def test_visual_genome_answers_weigh_a_fifth(tmp_path: Path, reference: Path):
    path = reference / "data/annotations/visual_genome/question_answers.json"
    published = json.loads(path.read_text())
    folder = pictures(tmp_path / "vg", [f"VG_100K/{published[0]['id']}.jpg", f"VG_100K_2/{published[1]['id']}.jpg"])
    _, records, _ = shards("visual_genome", [folder, path], tmp_path / "out")
    assert records == {
        str(image["id"]): {
            "questions": [
                {"id": qa["qa_id"], "question": qa["question"], "answers": [qa["answer"]], "weight": 0.2}
                for qa in image["qas"]
            ]
        }
        for image in published
    }


def test_released_question_lists_hold_vqa_visual_genome_and_test_sets(tmp_path: Path):
    path = write(
        tmp_path / "vqa.json",
        [
            {"question_id": 1, "question": "What?", "answer": ["a"] * 10, "image": "val2014/COCO_val2014_000000000042.jpg", "dataset": "vqa"},
            {"question_id": 2, "question": "Who?", "answer": "me", "image": "VG_100K/7.jpg", "dataset": "vg"},
            {"question_id": 3, "question": "Why?", "image": "val2014/COCO_val2014_000000000042.jpg", "dataset": "vqa"},
        ],
    )  # fmt: skip
    folder = pictures(tmp_path / "all", ["val2014/COCO_val2014_000000000042.jpg", "VG_100K/7.jpg"])
    _, records, _ = shards("blip_vqa", [folder, path], tmp_path / "out")
    assert records == {
        "42": {"questions": [{"id": 1, "question": "What?", "answers": ["a"] * 10}, {"id": 3, "question": "Why?", "answers": []}]},
        "7": {"questions": [{"id": 2, "question": "Who?", "answers": ["me"], "weight": 0.2}]},
    }  # fmt: skip


def test_released_question_list_of_a_fork_is_read(reference: Path):
    path = reference / "data/annotations/blip/vqa_test_layout_other_dataset.json"
    entries = list(LAYOUTS["blip_vqa"].entries([path]))
    assert sum(len(entry.record["questions"]) for entry in entries) == 100
    assert len({entry.key for entry in entries}) == len(entries)


def test_nlvr2_statements_stand_with_their_two_pictures(tmp_path: Path, reference: Path):
    path = reference / "data/annotations/nlvr2/dev.json"
    published = [json.loads(line) for line in path.read_text().splitlines()]
    pair = published[0]["identifier"].rpartition("-")[0]
    folder = pictures(tmp_path / "dev", [f"{pair}-img0.png", f"{pair}-img1.png", "dev-1-0-img0.png"])
    built, records, members = shards("nlvr2", [folder, path], tmp_path / "out")
    rows = [row for row in published if row["identifier"].rpartition("-")[0] == pair]
    assert len(rows) > 1
    assert members == [f"{pair}.0.png", f"{pair}.1.png"]
    assert records[pair]["statements"] == [
        {"id": row["identifier"], "sentence": row["sentence"], "label": row["label"] == "True"} for row in rows
    ]
    assert entries_of(json.dumps(records[pair]).encode(), True, STATEMENTS)[1] == []
    assert built.pictures == 2
    missing = {row["identifier"].rpartition("-")[0] for row in published} - {pair}
    assert len(built.reasons["picture is missing"]) == len(missing)


def test_the_released_list_names_the_same_pairs_as_the_published_file(reference: Path):
    annotations = reference / "data/annotations"
    made, published = {}, {}
    for found, name, path in ((made, "blip_nlvr", "blip/nlvr_test.json"), (published, "nlvr2", "nlvr2/test1.json")):
        for entry in LAYOUTS[name].entries([annotations / path]):
            for row in entry.record["statements"]:
                files = tuple(Path(names[0]).name for names in entry.media)
                found[entry.key, row["sentence"]] = files, row["label"]
    assert len(made) == len(published) > 300
    assert made == published


def test_a_hidden_test_has_no_labels_and_a_wrong_label_is_named(tmp_path: Path):
    folder = pictures(tmp_path / "x", ["test2-0-1-img0.png", "test2-0-1-img1.png"])
    line = {"identifier": "test2-0-1-0", "sentence": "Two dogs."}
    path = write(tmp_path / "test2.json", json.dumps(line) + "\n")
    records = shards("nlvr2", [folder, path], tmp_path / "out")[1]
    assert records == {"test2-0-1": {"statements": [{"id": "test2-0-1-0", "sentence": "Two dogs."}]}}
    path = write(tmp_path / "bad.json", "\n" + json.dumps(line | {"label": "Maybe"}))
    with pytest.raises(ValueError, match=r'bad.json: line 2: label is to be "True" or "False", not \'Maybe\''):
        shards("nlvr2", [folder, path], tmp_path / "bad")


def test_visdial_rounds_have_their_texts_and_relevance(tmp_path: Path, reference: Path):
    visdial = reference / "data/annotations/visdial"
    path, dense = visdial / "visdial_1.0_val.json", visdial / "visdial_1.0_val_dense_annotations.json"
    published, relevances = json.loads(path.read_text())["data"], json.loads(dense.read_text())
    names = [f"VisualDialog_val2018_{dialog['image_id']:012d}.jpg" for dialog in published["dialogs"]]
    folder = pictures(tmp_path / "VisualDialog_val2018", names)
    built, records, _ = shards("visdial", [folder, dense, path], tmp_path / "out")
    assert (built.pictures, built.rows, built.left_out) == (8, {"rounds": 80}, [])
    for dialog, relevance in zip(published["dialogs"], relevances, strict=True):
        record = records[str(dialog["image_id"])]
        rows, reasons = entries_of(json.dumps(record).encode(), True, ROUNDS)
        assert (len(rows), reasons) == (10, [])
        assert record["caption"] == dialog["caption"]
        for number, (made, turn) in enumerate(zip(record["rounds"], dialog["dialog"], strict=True), start=1):
            assert made["question"] == published["questions"][turn["question"]]
            assert made["options"][made["answer_index"]] == made["answer"] == published["answers"][turn["answer"]]
            assert len(made["options"]) == 100
            assert made.get("relevance") == (relevance["gt_relevance"] if number == relevance["round_id"] else None)


def test_visdial_training_pictures_are_cocos_and_test_rounds_may_lack_answers(tmp_path: Path):
    data = {
        "questions": ["is it red", "is it big"],
        "answers": ["yes", "no"],
        "dialogs": [
            {
                "image_id": 9,
                "caption": "a ball",
                "dialog": [
                    {"question": 0, "answer": 1, "answer_options": [0, 1], "gt_index": 1},
                    {"question": 1, "answer_options": [1, 0]},
                ],
            }
        ],
    }
    path = write(tmp_path / "train.json", {"data": data, "version": "1.0", "split": "train"})  # split stands last
    folder = pictures(tmp_path / "coco", ["val2014/COCO_val2014_000000000009.jpg"])
    _, records, _ = shards("visdial", [folder, path], tmp_path / "out")
    assert records["9"]["rounds"] == [
        {"question": "is it red", "answer": "no", "options": ["yes", "no"], "answer_index": 1},
        {"question": "is it big", "options": ["no", "yes"]},
    ]
    for field, value, message in (
        (
            "answer_options",
            [0, 2],
            r"data.dialogs\[0\]: dialog\[0\]: answer_options are to be numbers of the 2 answers",
        ),
        ("question", -1, "question is -1, but there are 2"),
        ("gt_index", "1", "gt_index is to be a whole number, not '1'"),
    ):
        data["dialogs"][0]["dialog"][0][field] = value  # type: ignore[index]
        bad = write(tmp_path / f"{field}.json", {"data": data, "split": "train"})
        with pytest.raises(ValueError, match=message):
            shards("visdial", [folder, bad], tmp_path / "bad")
        data["dialogs"][0]["dialog"][0][field] = {"answer_options": [0, 1], "question": 0, "gt_index": 1}[field]  # type: ignore[index]
    dense = write(tmp_path / "dense.json", [{"image_id": 9, "round_id": 1, "relevance": [1.0]}])
    with pytest.raises(ValueError, match="2 options, but 1 relevances"):
        shards("visdial", [folder, path, dense], tmp_path / "bad")
    with pytest.raises(ValueError, match="no dialogues"):
        shards("visdial", [folder, dense], tmp_path / "bad")

"""Building from published layouts: what is looked for where, what is left out, and nothing by surprise."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest

from blip.cli import main
from blip.datamodules.answers import frequent_answers
from blip.datamodules.layouts.published import LAYOUTS
from blip.datamodules.scan import scan
from tests.datamodules.making import picture, tar_of
from tests.datamodules.published import pictures, shards, write


def captions(path: Path, names: list[str], said: str = "a caption") -> Path:
    return write(path, [{"image": name, "caption": [said]} for name in names])


def test_where_nothing_is_found_the_error_says_what_was_looked_for_and_where(tmp_path: Path):
    folder = pictures(tmp_path / "wrong", ["sub/cat.jpg"])
    path = captions(tmp_path / "x.json", ["val2014/a.jpg", "val2014/b.jpg"])
    with pytest.raises(
        ValueError,
        match=rf"no pair in {folder} \(1 files, such as sub/cat.jpg\): picture is missing \(2 times, first val2014/a.jpg\)",
    ):
        shards("blip_captions", [folder, path], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no file"):
        shards("blip_captions", [tmp_path / "empty", path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_name_in_two_folders_is_ambiguous_unless_its_path_tells(tmp_path: Path):
    one, two = (pictures(tmp_path / name, ["a.jpg", f"{name}/b.jpg", "train/c.jpg"]) for name in ("one", "two"))
    path = captions(tmp_path / "x.json", ["a.jpg", "two/b.jpg", "c.jpg"])
    built, records, _ = shards("blip_captions", [one, two, path], tmp_path / "out")
    assert list(records) == ["b"]
    assert built.left_out == [("picture name is ambiguous", "a.jpg"), ("picture name is ambiguous", "c.jpg")]


def test_nothing_outside_the_folders_is_read(tmp_path: Path):
    pictures(tmp_path, ["secret.jpg"])
    path = captions(
        tmp_path / "x.json", ["../secret.jpg", str(tmp_path / "secret.jpg"), "in/../../secret.jpg", "a.jpg"]
    )
    built, records, _ = shards("blip_captions", [pictures(tmp_path / "in", ["a.jpg"]), path], tmp_path / "out")
    assert list(records) == ["a"]
    assert [reason for reason, _ in built.left_out] == ["picture is missing"] * 3


def test_zips_and_folders_give_the_same_and_broken_pictures_are_named(tmp_path: Path):
    files = {"a.png": picture(1), "b.png": picture(2)[:-30], "c.png": b"<html>"}
    folder = tmp_path / "in"
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for name, data in files.items():
            (folder / name).write_bytes(data)
            archive.writestr(f"x/{name}", data)
    os.mkfifo(folder / "d.png")
    path = captions(tmp_path / "x.json", ["a.png", "b.png", "c.png", "d.png"])
    for place, last in (
        (folder, ("picture not a file", "d.png")),
        (tmp_path / "in.zip", ("picture is missing", "d.png")),
    ):
        built, records, _ = shards("blip_captions", [path, place], tmp_path / f"out-{place.suffix}")
        assert list(records) == ["a"]
        inside = "" if place == folder else "x/"
        assert [name for _, name in built.left_out[:2]] == [f"{inside}b.png", f"{inside}c.png"]
        assert built.left_out[-1] == last


def test_texts_that_no_reader_takes_are_left_out(tmp_path: Path):
    names = ["half.jpg", "long.jpg", "empty.jpg", "good.jpg"]
    path = tmp_path / "x.json"
    records = [
        {"image": "half.jpg", "caption": "\ud83d"},
        {"image": "long.jpg", "caption": "x" * 1_100_000},
        {"image": "empty.jpg", "caption": ["...", ""]},
        {"image": "good.jpg", "caption": "fine"},
    ]
    path.write_text(json.dumps(records))
    built, found, _ = shards("blip_captions", [pictures(tmp_path / "in", names), path], tmp_path / "out")
    assert found == {"good": {"captions": ["fine"]}}
    assert built.left_out == [
        ("text is not Unicode", "half.jpg"), ("text too large", "long.jpg"),
        *[("caption is empty", "empty.jpg")] * 2, ("nothing is said of it", "empty.jpg"),
    ]  # fmt: skip
    listed = [json.loads(line) for line in (tmp_path / "out/left_out.jsonl").read_text().splitlines()]
    assert [(line["reason"], line["name"]) for line in listed] == built.left_out


def test_equal_input_gives_equal_bytes(tmp_path: Path):
    path = captions(tmp_path / "x.json", ["a.jpg", "b.jpg"])
    folder = pictures(tmp_path / "in", ["a.jpg", "b.jpg"])
    for out in ("one", "two"):
        shards("blip_captions", [folder, path], tmp_path / out)
    assert (tmp_path / "one/00000.tar").read_bytes() == (tmp_path / "two/00000.tar").read_bytes()


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_takes_folders_and_files_in_any_order_and_tells_what_it_made(tmp_path: Path, capsys):
    folder = pictures(tmp_path / "val2014", ["COCO_val2014_000000000042.jpg"])
    path = captions(tmp_path / "coco_karpathy_val.json", ["val2014/COCO_val2014_000000000042.jpg", "val2014/gone.jpg"])
    status, said, _ = run(capsys, "data", "build", "--layout", "blip_captions", path, folder, tmp_path / "out")
    assert status == 0
    assert "1 picture (0.0 MB), 1 caption, 1 shard" in said
    assert "1 picture is missing: val2014/gone.jpg" in said
    assert str(tmp_path / "out/left_out.jsonl") in said


def test_a_test_set_has_pictures_and_no_captions(tmp_path: Path, capsys):
    folder = pictures(tmp_path / "test2014", ["COCO_test2014_000000000001.jpg"])
    images = [{"id": 1, "file_name": "COCO_test2014_000000000001.jpg"}]
    path = write(tmp_path / "image_info_test2014.json", {"images": images, "categories": []})
    status, said, _ = run(capsys, "data", "build", "--layout", "coco_captions", folder, path, tmp_path / "out")
    assert status == 0
    assert "1 picture (0.0 MB), 0 captions, 1 shard" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "coco", "in", "x.json", "out"], "no layout 'coco'; there are\n  karpathy"),
        (
            ["--layout", "nlvr2", "in", "x.json", "out", "--split", "dev"],
            "--split dev: nlvr2 has a file for each split",
        ),
        (["--layout", "nlvr2", "in", "out"], "no file of annotations (unpacked) among in; nlvr2 takes train.json"),
        (["--layout", "nlvr2", "x.json", "out"], "no folder or zip of pictures among x.json"),
        (["--layout", "nlvr2", "in", "y.json", "out"], "y.json: no such file or folder"),
        (["--layout", "nocaps", "in", "x.json", "out", "--split-column", "a"], "--split-column is of an own file"),
        (["in", "x.json", "y.json", "out"], "IMAGES CAPTIONS OUT are three paths, not 4"),
        (["--layout", "blip_captions", "in", "x.json", "in"], "in: already there"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_before_anything_is_made(
    tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "in", ["a.jpg"])
    captions(tmp_path / "x.json", ["a.jpg"])
    status, said, complaint = run(capsys, "data", "build", *arguments)
    assert (status, said) == (1, "")
    assert message in complaint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "x.json"]


def test_help_names_every_layout(capsys):
    with pytest.raises(SystemExit):
        main(["data", "build", "--help"])
    said = capsys.readouterr().out
    for name, layout in LAYOUTS.items():
        assert f"\n  {name} " in said
        assert layout.takes in said


def questions(*answers: list[str]) -> bytes:
    rows = [{"id": n, "question": "what?", "answers": said} for n, said in enumerate(answers)]
    return json.dumps({"questions": rows}).encode()


def test_the_answer_list_holds_what_settles_questions_most_often(tmp_path: Path, capsys):
    members = {
        "a.png": picture(0), "a.json": questions(["red"] * 6 + ["blue"] * 4, ["yes"] * 10, []),
        "b.json": questions(["no", "yes", "yes"], ["é"], ["blue", "red"]), "c.json": b'{"captions": ["x"]}', "d.json": b"{",
    }  # fmt: skip
    (tmp_path / "0.tar").write_bytes(tar_of(members))
    (tmp_path / "1.tar").write_bytes(tar_of({"a.json": questions(["red"])}))
    shards_ = tmp_path / "{0,1}.tar"
    assert frequent_answers(shards_, 1) == [("red", 2), ("yes", 2), ("blue", 1), ("é", 1)]
    out = tmp_path / "lists/answer_list.json"
    status, said, _ = run(capsys, "data", "answers", shards_, "--out", out, "--min-count", 2)
    assert status == 0
    assert json.loads(out.read_text()) == ["red", "yes"]
    assert "2 answers that settle 2 questions or more; first red (2), yes (2)" in said
    assert "no answer settles" in run(capsys, "data", "answers", shards_, "--out", out, "--min-count", 9)[2]
    (tmp_path / "2.tar").write_bytes(tar_of({"c.json": b'{"captions": ["x"]}'}))
    assert "no question with an answer" in run(capsys, "data", "answers", tmp_path / "2.tar", "--out", out)[2]
    (tmp_path / "2.tar").write_bytes(tar_of(members)[:2048])
    assert "2.tar: " in (told := run(capsys, "data", "answers", tmp_path / "2.tar", "--out", out)[2])
    assert "cut" in told
    (tmp_path / "2.tar").write_bytes(b"no tar")
    assert "not a tar" in run(capsys, "data", "answers", tmp_path / "2.tar", "--out", out)[2]


def test_names_that_would_harm_a_terminal_are_shown_harmless(tmp_path: Path, capsys):
    path = tmp_path / "x.json"
    path.write_text(
        json.dumps([{"image": name, "caption": "x"} for name in ("a.jpg", "\x1b[2J\n.jpg", "\ud83d.jpg", "é" * 999)])
    )
    folder = pictures(tmp_path / "in", ["a.jpg"])
    status, said, _ = run(capsys, "data", "build", "--layout", "blip_captions", folder, path, tmp_path / "out")
    assert status == 0
    assert f"3 picture is missing: \\x1b[2J\\n.jpg, \\ud83d.jpg, {'é' * 300}" in said


@pytest.mark.parametrize(
    ("layout", "content", "names", "kind", "rows"),
    [
        ("blip_captions", [{"image": "a.jpg", "caption": ["one", "two"]}], ["a.jpg"], "pairs", 2),
        ("blip_vqa", [{"question_id": 1, "question": "What?", "image": "a.jpg", "answer": ["x"]}], ["a.jpg"], "questions", 1),
        ("blip_nlvr", [{"images": ["a.png", "b.png"], "sentence": "x", "label": "True"}], ["a.png", "b.png"], "statements", 1),
        (
            "visdial",
            {"split": "val2018", "data": {"questions": ["is it"], "answers": ["yes", "no"], "dialogs": [
                {"image_id": 1, "caption": "x", "dialog": [
                    {"question": 0, "answer": 1, "answer_options": [0, 1], "gt_index": 1},
                    {"question": 0, "answer": 0, "answer_options": [0, 1], "gt_index": 0},
                ]}
            ]}},
            ["VisualDialog_val2018_000000000001.jpg"], "rounds", 2,
        ),
    ],
)  # fmt: skip
def test_readers_take_everything_that_was_built(tmp_path: Path, layout, content, names, kind, rows):
    folder, path = pictures(tmp_path / "in", names), write(tmp_path / "x.json", content)
    built, _, _ = shards(layout, [folder, path], tmp_path / "out")
    found = scan(str(tmp_path / "out/00000.tar"), verify=True, records=kind)
    assert (found.broken, found.skipped, found.texts) == ("", [], [rows])
    assert sum(built.rows.values()) == rows

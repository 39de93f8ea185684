"""Files of annotations are read record by record, and what is not as published is named by file, record and field."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from blip.datamodules.layouts import reading
from blip.datamodules.layouts.reading import Record, items, lines, rows
from tests.datamodules.published import pictures, shards, write

NESTED = {
    "info": {"about": ['a "quoted" \\ text', None], "year": 2014},
    "numbers": [0, -1, 2.5e3, 123456789, True, None, "é“”\U0001f600", "], {"],
    "data": {"dialogs": [{"a": [1, [2, {"b": []}]]}, {}], "questions": [], "other": [1, 2]},
    "split": "val2014",
}


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_streaming_gives_what_loading_the_whole_file_gives(tmp_path: Path, monkeypatch, chunk, indent, ascii_only):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    path = tmp_path / "x.json"
    path.write_text("\ufeff" + json.dumps(NESTED, indent=indent, ensure_ascii=ascii_only) + " \n", encoding="utf-8")
    found = [(item.name, item.value) for item in items(path, "numbers", "data.dialogs", "split", "data.questions")]
    assert found == [
        *(("numbers", value) for value in NESTED["numbers"]),
        *(("data.dialogs", value) for value in NESTED["data"]["dialogs"]),  # type: ignore[index, call-overload]
        ("split", "val2014"),
    ]
    path.write_text(json.dumps(NESTED["numbers"], indent=indent), encoding="utf-8")
    assert [(item.where, item.value) for item in items(path, "")] == [
        (f"{path}: record {number}", value) for number, value in enumerate(NESTED["numbers"])
    ]


def test_memory_is_for_a_record_and_not_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "CHUNK", 1 << 12)
    record = json.dumps({"image_id": 1, "caption": "x" * 100, "more": list(range(100))})
    path = tmp_path / "large.json"
    path.write_text('{"annotations": [' + ",".join([record] * 3_000) + "]}")
    tracemalloc.start()
    assert sum(1 for _ in items(path, "annotations")) == 3_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 1_500_000
    assert peak < 150_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'{' is expected; found ''"),
        ("{", "found ''"),
        ('{"images": [1, 2', "']'|',' is expected"),
        ('{"images": [1 2]}', "',' is expected; found '2]}'"),
        ('{"images": [tru]}', r"in images\[0\]: Expecting value"),
        ('{"images": [NaN]}', r"in images\[0\]: NaN is no JSON number"),
        ('{"images": [' + "[" * 200_000, "nested too deep"),
        ('{"images": [1]} {"images": [2]}', "something follows the end"),
        ('{1: 2}', "a name is expected|Expecting"),
        ('{"annotation": [], "info": {}}', "images expected, but it is an object of 'annotation', 'info': a file of another"),
        ("[1]", "images expected, but it is a list"),
        ("{}", "an empty object"),
        ("images", "'{' is expected; found 'images'"),
        ("{" + ",".join(f'"{n}{"x" * 9000}": 1' for n in range(50)) + "}", "an object of '0xxx"),
        ('{"images": [' + "9" * 5000 + "]}", r"in images\[0\]"),
    ],
)  # fmt: skip
def test_what_is_no_such_json_is_one_clear_error(tmp_path: Path, text: str, message: str):
    path = write(tmp_path / "x.json", text)
    with pytest.raises(ValueError, match=message) as caught:
        list(items(path, "images"))
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 1500


def test_a_record_without_an_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "MAX_RECORD", 10_000)
    monkeypatch.setattr(reading, "CHUNK", 1000)
    path = write(tmp_path / "x.json", '{"images": ["' + "a" * 100_000)
    with pytest.raises(ValueError, match="no end of the value within 10000 characters"):
        list(items(path, "images"))
    with pytest.raises(ValueError, match="line 1 is longer than 10000"):
        list(lines(path))


def test_other_files_than_utf8_json_and_csv_are_named(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_bytes('{"images": ["é"]}'.encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        list(items(path, "images"))
    with pytest.raises(ValueError, match="line 1 is not UTF-8"):
        list(lines(path))
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        list(lines(write(path, '{"a": 1}\n{\n')))
    with pytest.raises(ValueError, match="line 3 has not as many fields"):
        list(rows(write(path, "a,b\n1,2\n3\n")))
    with pytest.raises(ValueError, match="is not CSV"):
        list(rows(write(path, 'a,b\n1,"2\n')))
    with pytest.raises(FileNotFoundError, match="no such file of annotations"):
        list(items(tmp_path / "nowhere.json", ""))


def test_fields_are_had_by_their_type_or_named():
    record = Record({"n": 5, "t": "x", "b": True, "e": "", "l": [1], "f": 1.5, "none": None}, "f.json: images[3]")
    assert (record.number("n"), record.text("t"), record.id("n"), record.id("t")) == (5, "x", 5, "x")
    assert (record.texts("t"), "none" in record, "n" in record) == (["x"], False, True)
    for wrong, message in (
        (lambda: record.number("b"), r"^f.json: images\[3\]: b is to be a whole number, not True$"),
        (lambda: record.number("f"), "f is to be a whole number, not 1.5"),
        (lambda: record.text("n"), "n is to be a text, not 5"),
        (lambda: record.id("e"), "e is to be a whole number or a text, not ''"),
        (lambda: record.texts("l"), r"l is to be a list of texts, not \[1\]"),
        (lambda: record.text("missing"), r"^f.json: images\[3\] has no missing \(a text\); it has 'n', 't'"),
        (lambda: record.records("l"), r"images\[3\]: l\[0\] is not a record but 1"),
        (lambda: Record([1] * 1000, "x"), r"^x is not a record but \[1, 1, 1, 1, 1, 1, \.\.\.\]$"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


@pytest.mark.parametrize(
    ("layout", "content", "message"),
    [
        ("coco_captions", {"images": [{"id": 1}], "annotations": []}, r"x.json: images\[0\] has no file_name"),
        ("coco_captions", {"annotations": [{"image_id": 1, "caption": ["a"]}]}, r"annotations\[0\]: caption is to be a text"),
        ("coco_captions", [{"image": "a.jpg"}], "images and annotations expected, but it is a list"),
        ("karpathy", {"images": [{"split": "val", "filename": "a", "sentences": [{"tokens": []}]}]}, r"images\[0\]: sentences\[0\] has no raw"),
        ("vqa_v2", {"questions": [{"question_id": 1, "image_id": "a", "question": "b"}]}, "image_id is to be a whole number"),
        ("visual_genome", [{"id": 1, "qas": {}}], "record 0: qas is to be a list, not {}"),
        ("nlvr2", {"identifier": "x", "sentence": "y"}, "line 1: identifier is to be like dev-850-0-0, not 'x'"),
        ("visdial", {"data": {"questions": [1]}}, r"data.questions\[0\] is to be a text, not '1'"),
        ("msrvtt_qa", [{"id": 1, "question": "a", "answer": 5, "video_id": 1}], "record 0: answer is to be a text, not 5"),
        ("blip_captions", [{"image": "a.jpg", "caption": 5}], "record 0: caption is to be a text or a list of texts, not 5"),
        ("blip_vqa", [{"question_id": 1, "question": "a", "image": None}], "record 0: image is to be a text, not None"),
        ("blip_nlvr", [{"images": ["a"], "sentence": "b"}], "record 0: images are to be two, left and right, not 1"),
        ("nocaps", ["a"], "images and annotations expected"),
    ],
)  # fmt: skip
def test_each_layout_names_the_file_the_record_and_the_field(tmp_path: Path, layout: str, content, message: str):
    path = write(tmp_path / "x.json", content)
    with pytest.raises(ValueError, match=message):
        shards(layout, [pictures(tmp_path / "images", ["a.jpg"]), path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "x.json"]

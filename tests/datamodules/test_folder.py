"""Shards from own pictures: bytes untouched, whole or not at all, and every loss named."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from blip.datamodules.layouts import packing
from blip.datamodules.layouts.folder import build, read_rows


def jpeg(seed: int, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def write(where: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = where / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return where


def write_csv(path: Path, rows: list[tuple], header: tuple = ("image", "caption")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def members(out: Path) -> dict[str, bytes]:
    """Members of all shards in order."""
    found = {}
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return found


def test_bytes_and_captions_are_kept_in_the_order_of_the_file(tmp_path: Path):
    files = {"b.jpg": jpeg(0), "sub/a.jpg": jpeg(1), "c.png": jpeg(2, "PNG")}
    rows = [("sub/a.jpg", "one, “two”"), ("b.jpg", "only"), ("sub/a.jpg", "three "), ("c.png", "été")]
    out = tmp_path / "new/shards"
    built = build(write(tmp_path / "in", files), write_csv(tmp_path / "c.csv", rows), out)
    assert (built.pictures, built.captions, built.shards, built.left_out) == (3, 4, 1, [])
    assert list(members(out).items()) == [
        ("a.jpg", files["sub/a.jpg"]),
        ("a.json", json.dumps({"captions": ["one, “two”", "three"]}, ensure_ascii=False).encode()),
        ("b.jpg", files["b.jpg"]),
        ("b.txt", b"only"),
        ("c.png", files["c.png"]),
        ("c.txt", "été".encode()),
    ]
    assert [path.name for path in out.iterdir()] == ["00000.tar"]


def test_a_zip_gives_the_same_shards_as_the_folder(tmp_path: Path):
    files = {f"x/{n}.jpg": jpeg(n) for n in range(5)}
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("__MACOSX/x/._0.jpg", b"junk")
    captions = write_csv(tmp_path / "c.csv", [(f"{n}.jpg", f"caption {n}") for n in range(5)])
    for images, out in ((write(tmp_path / "in", files), "a"), (tmp_path / "in.zip", "b")):
        built = build(images, captions, tmp_path / out, shard_size=2)
        assert (built.shards, built.left_out) == (3, [])
    for name in ("00000.tar", "00001.tar", "00002.tar"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_everything_left_out_is_named_with_its_reason(tmp_path: Path):
    good = jpeg(0)
    files = {
        "good.jpg": good,
        "cut.jpg": good[: len(good) // 2],
        "page.jpg": b"<html>404</html>",
        "nothing.jpg": b"",
        "moving.gif": jpeg(1, "GIF"),
        "alone.jpg": jpeg(2),
        "silent.jpg": jpeg(3),
        "x/twin.jpg": jpeg(4),
        "y/twin.jpg": jpeg(5),
        "notes.txt": b"not a picture, and nobody asks",
        "really_png.jpg": jpeg(6, "PNG"),
    }
    names = [
        "good.jpg",
        "cut.jpg",
        "page.jpg",
        "nothing.jpg",
        "moving.gif",
        "missing.jpg",
        "twin.jpg",
        "really_png.jpg",
    ]
    rows = [(name, "a caption") for name in names] + [("silent.jpg", " . "), ("good.jpg", "")]
    built = build(write(tmp_path / "in", files), write_csv(tmp_path / "c.csv", rows), tmp_path / "out")
    assert sorted(built.left_out) == [
        ("caption is empty", "good.jpg"),
        ("caption is empty", "silent.jpg"),
        ("picture cut short", "cut.jpg"),
        ("picture empty", "nothing.jpg"),
        ("picture is missing", "missing.jpg"),
        ("picture name is ambiguous", "twin.jpg"),
        ("picture not an image", "page.jpg"),
        ("picture of a kind that shards do not hold", "moving.gif"),
        ("picture without a caption", "alone.jpg"),
    ]
    assert list(members(tmp_path / "out")) == ["good.jpg", "good.txt", "really_png.png", "really_png.txt"]
    listed = [json.loads(line) for line in (tmp_path / "out/left_out.jsonl").read_text().splitlines()]
    assert [(entry["reason"], entry["name"]) for entry in listed] == built.left_out


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError("No space left on device")])
def test_shards_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure):
    images = write(tmp_path / "in", {f"{n}.jpg": jpeg(n) for n in range(4)})
    captions = write_csv(tmp_path / "c.csv", [(f"{n}.jpg", "a caption") for n in range(4)])
    decode = packing.decode

    def fail_at_the_third(data: bytes) -> np.ndarray:
        if data == jpeg(2):
            raise failure
        return decode(data)

    monkeypatch.setattr(packing, "decode", fail_at_the_third)
    with pytest.raises(failure if isinstance(failure, type) else OSError):
        build(images, captions, tmp_path / "made/out", shard_size=1)
    assert list((tmp_path / "made").iterdir()) == []


def test_existing_shards_are_not_written_over(tmp_path: Path):
    images = write(tmp_path / "in", {"a.jpg": jpeg(0)})
    captions = write_csv(tmp_path / "c.csv", [("a.jpg", "a caption")])
    build(images, captions, tmp_path / "out")
    with pytest.raises(ValueError, match="already there"):
        build(images, captions, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.csv", "FileName;Text;n\na.jpg;uno, dos;1\na.jpg;tres;2\n"),
        ("c.tsv", "file\tcaption\na.jpg\tuno, dos\na.jpg\ttres\n"),
        ("c.csv", '\ufefffile_name,captions\na.jpg,"[""uno, dos"", ""tres""]"\n'),
        ("c.json", '[{"image": "a.jpg", "captions": ["uno, dos", "tres"]}]'),
        ("c.json", '{"a": ["uno, dos", "tres"]}'),
        ("c.jsonl", '{"filename": "./a.jpg", "text": "uno, dos"}\n\n{"filename": "a.jpg", "text": "tres"}\n'),
    ],
)
def test_the_usual_layouts_of_captions_are_read(tmp_path: Path, name: str, text: str):
    images = write(tmp_path / "in", {"a.jpg": jpeg(0)})
    (tmp_path / name).write_text(text, encoding="utf-8")
    built = build(images, tmp_path / name, tmp_path / "out")
    assert built.left_out == []
    assert json.loads(members(tmp_path / "out")["a.json"]) == {"captions": ["uno, dos", "tres"]}


def test_a_split_takes_its_rows_and_minds_no_others(tmp_path: Path):
    images = write(tmp_path / "in", {f"{n}.jpg": jpeg(n) for n in range(4)})
    rows = [(f"{n}.jpg", "a caption", "val" if n % 2 else "train") for n in range(4)] + [("9.jpg", "gone", "train")]
    captions = write_csv(tmp_path / "c.csv", rows, ("image", "caption", "part"))
    built = build(images, captions, tmp_path / "val", split="val", split_column="part")
    assert (built.pictures, built.left_out) == (2, [])
    assert list(members(tmp_path / "val")) == ["1.jpg", "1.txt", "3.jpg", "3.txt"]
    with pytest.raises(ValueError, match=r"no row with part=dev; found \{'train': 3, 'val': 2\}"):
        build(images, captions, tmp_path / "dev", split="dev", split_column="part")
    with pytest.raises(ValueError, match="no column 'split'"):
        build(images, captions, tmp_path / "dev", split="val")


def test_a_name_means_the_file_whose_path_agrees(tmp_path: Path):
    images = write(
        tmp_path / "in", {"train/1.jpg": jpeg(0), "val/1.jpg": jpeg(1), "val/2.jpg": jpeg(2), "3.jpg": jpeg(3)}
    )
    rows = [("val/1.jpg", "a"), ("/data/coco/train/1.jpg", "b"), ("train/2.jpg", "c"), ("2", "d"), ("deep/3.jpg", "e")]
    built = build(images, write_csv(tmp_path / "c.csv", rows), tmp_path / "out")
    assert built.left_out == [("picture is missing", "train/2.jpg")]
    found = members(tmp_path / "out")
    texts = {name: data.decode() for name, data in found.items() if name.endswith("txt")}
    assert texts == {"1.txt": "a", "1-2.txt": "b", "2.txt": "d", "3.txt": "e"}
    assert found["1.jpg"] == jpeg(1)
    assert found["1-2.jpg"] == jpeg(0)


def test_keys_are_safe_for_every_reader(tmp_path: Path):
    names = ["a.b.c.jpg", "a_b_c.jpg", "été photo.jpg", "n" * 200 + ".jpg"]
    images = write(tmp_path / "in", {name: jpeg(n) for n, name in enumerate(names)})
    build(images, write_csv(tmp_path / "c.csv", [(name, "a caption") for name in names]), tmp_path / "out")
    keys = [name.removesuffix(".jpg") for name in members(tmp_path / "out") if name.endswith("jpg")]
    assert keys == ["a_b_c", "a_b_c-2", "_t__photo", "n" * 80]


def test_nothing_outside_the_pictures_is_read(tmp_path: Path):
    write(tmp_path, {"secret.jpg": jpeg(0), "in/a.jpg": jpeg(1)})
    rows = [("../secret.jpg", "x"), (str(tmp_path / "secret.jpg"), "y"), ("a.jpg", "z")]
    built = build(tmp_path / "in", write_csv(tmp_path / "c.csv", rows), tmp_path / "out")
    assert [reason for reason, _ in built.left_out] == ["picture is missing"] * 2
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("../../evil.jpg", jpeg(2))
    build(tmp_path / "in.zip", write_csv(tmp_path / "d.csv", [("evil.jpg", "x")]), tmp_path / "zipped")
    assert list(members(tmp_path / "zipped")) == ["evil.jpg", "evil.txt"]
    assert not list(tmp_path.parent.glob("evil*"))


def test_what_is_no_file_in_the_folder_is_left_out_and_never_waited_for(tmp_path: Path):
    write(tmp_path / "in", {"a.jpg": jpeg(0)})
    os.mkfifo(tmp_path / "in" / "pipe.jpg")
    (tmp_path / "in" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    rows = [(f"{name}.jpg", "a caption") for name in ("a", "pipe", "gone")]
    built = build(tmp_path / "in", write_csv(tmp_path / "c.csv", rows), tmp_path / "out")
    assert built.left_out == [("picture not a file", "pipe.jpg"), ("picture not a file", "gone.jpg")]


def test_large_and_damaged_members_of_a_zip_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing, "MAX_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(1_000_000))
        archive.writestr("good.jpg", jpeg(0))
        archive.writestr(zipfile.ZipInfo("bad.jpg"), jpeg(1))
    packed = bytearray((tmp_path / "in.zip").read_bytes())
    packed[packed.index(jpeg(1)) + 100] ^= 255
    (tmp_path / "in.zip").write_bytes(packed)
    rows = [(f"{name}.jpg", "a caption") for name in ("bomb", "good", "bad")]
    built = build(tmp_path / "in.zip", write_csv(tmp_path / "c.csv", rows), tmp_path / "out")
    assert built.left_out == [("picture too large", "bomb.jpg"), ("picture unreadable in the zip", "bad.jpg")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.csv", "picture,caption\na.jpg,x\n", r"no picture: one of image, file.*found picture, caption"),
        ("c.csv", "image,title\na.jpg,x\n", "no caption: one of caption"),
        ("c.csv", "image,caption\na.jpg,one, two\n", "line 2 has more fields.*quotes"),
        ("c.csv", "", "holds no row"),
        ("c.json", "{", "not JSON"),
        ("c.json", "[1]", "row 1 is not a record"),
        ("c.jsonl", '{"image": "a", "caption": "b"}\nx\n', "line 2 is not JSON"),
        ("c.json", '[{"image": 5, "caption": "b"}]', "row 1 names no picture, but 5"),
        ("c.xlsx", "", r"read from \.csv"),
    ],
)
def test_unusable_captions_are_one_clear_error(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name)


def test_unusable_pictures_are_one_clear_error(tmp_path: Path):
    captions = write_csv(tmp_path / "c.csv", [("a.jpg", "x"), ("b.jpg", "y")])
    (tmp_path / "in.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="neither a folder nor a zip"):
        build(tmp_path / "in.zip", captions, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        build(tmp_path / "nowhere", captions, tmp_path / "out")
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=r"no pair in .*: picture is missing \(2 times, first a.jpg\)"):
        build(tmp_path / "in", captions, tmp_path / "out")
    (tmp_path / "latin.csv").write_bytes("image,caption\na.jpg,été\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        build(tmp_path / "in", tmp_path / "latin.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_made_to_hurt_do_not(tmp_path: Path, reference: Path):
    broken = reference / "data/broken"
    names = sorted(path.name for path in broken.iterdir() if path.suffix != ".md")
    built = build(broken, write_csv(tmp_path / "c.csv", [(name, "a caption") for name in names]), tmp_path / "out")
    assert built.pictures == len(names) - 8
    assert {name for _, name in built.left_out} == {
        "animated.gif", "bad_crc.png", "bomb_20000x20000.png", "not_an_image.jpg", "random_bytes.jpg", "truncated.jpg",
        "truncated_header.jpg", "zero_bytes.jpg",
    }  # fmt: skip
    assert members(tmp_path / "out")["png_named.png"] == (broken / "png_named.jpg").read_bytes()

"""An index tells what shards hold, is made once, and refuses what is damaged or changed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from blip.datamodules import index as module
from blip.datamodules.index import BrokenShardsError, build_index, open_index
from tests.datamodules.making import clip, pair, picture, record, tar_of, write_records, write_shards


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(folder: Path, members: Mapping[str, bytes | str], name: str = "00000.tar") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(tar_of({key: data if isinstance(data, bytes) else data.encode() for key, data in members.items()}))
    return path


def test_rows_point_at_the_bytes_of_pictures_and_texts(tmp_path):
    index = build_index(write_shards(tmp_path / "data", [3, 1, 4], texts=2))
    assert (len(index), len(index.pictures), index.shard_starts.tolist()) == (16, 8, [0, 3, 4, 8])
    for number, row in enumerate(index.pictures):
        data = Path(index.location(int(index.shard_of(number)))).read_bytes()
        assert data[int(row["image_at"]) :][: int(row["image_size"])] == picture(number)
        assert f"number {number} text" in data[int(row["text_at"]) :][: int(row["text_size"])].decode()
        assert index.key(number) == f"{number:05d}"
    pictures, texts = index.picture_of(np.arange(16))
    assert (pictures.tolist(), texts.tolist()) == ([n // 2 for n in range(16)], [n % 2 for n in range(16)])
    assert index.full_name(3) == "00001.tar: 00003"


def test_captions_of_a_json_are_texts_before_a_txt_and_a_txt_before_its_caption(tmp_path):
    members = {
        "a.png": picture(0), "a.txt": " a text ",
        "b.png": picture(1), "b.json": json.dumps({"caption": "from json", "url": "x"}),
        "c.png": picture(2), "c.txt": "from txt", "c.json": json.dumps({"caption": "other"}),
        "d.png": picture(3), "d.txt": "txt", "d.json": json.dumps({"captions": ["one", "", " two ", "...", 3]}),
        "e.png": picture(4), "e.txt": "from txt", "e.json": json.dumps({"captions": []}),
    }  # fmt: skip
    index = build_index(write(tmp_path, members))
    assert np.diff(index.text_starts).tolist() == [1, 1, 1, 2, 1]
    assert index.pictures["json"].tolist() == [0, 1, 0, 1, 0]


def test_pairs_without_a_sound_picture_and_text_are_left_out_and_counted_by_reason(tmp_path):
    members = {
        **{"only_text.txt": "a", "only_picture.jpg": picture(1), "two.jpg": picture(2), "two.png": picture(2)},
        **{"two.txt": "b", "empty.png": picture(3), "empty.txt": " ...", "latin.png": picture(4)},
        **{"latin.txt": b"caf\xe9", "list.png": picture(5), "list.json": "[1]", "cut.png": picture(6)},
        **{"cut.json": '{"caption": "a', "half.png": picture(7)[:60], "half.txt": "c", "page.jpg": b"<html>404"},
        **{"page.txt": "d", "zero.jpg": b"", "zero.txt": "e", "fine.PNG": picture(8), "fine.TXT": "f"},
        **{"lone.png": picture(9), "lone.json": json.dumps({"caption": "\ud800"}), "seg.cls": b"1"},
    }
    index = build_index(write(tmp_path, members))
    assert index.report.pictures == len(index) == 1
    assert index.key(0) == "fine"
    reasons = dict(index.report.skipped)
    assert sum(reasons.values()) == 12
    assert reasons["no picture"] == 2, "a key of which only other members are there counts, too"
    assert {"no text", "more than one picture", "text is empty", "text is not UTF-8", "text is not Unicode"} < set(
        reasons
    )
    assert {"json is not an object", "json does not parse", "picture not an image", "picture empty"} < set(reasons)
    assert index.report.skipped_names["no text"] == ["00000.tar: only_picture"]


def test_without_verifying_no_picture_is_decoded_and_all_are_taken(tmp_path):
    path = write(tmp_path, {"a.png": b"no picture", "a.txt": "a", "b.png": picture(1), "b.txt": "b"})
    assert len(build_index(path, verify=False)) == 2
    assert len(build_index(path, verify=True)) == 1


def test_files_that_would_hurt_get_no_row(tmp_path, reference):
    members = {}
    for number, file in enumerate(sorted((reference / "data" / "broken").glob("*.[jpw]*"))):
        if file.suffix in (".jpg", ".png", ".webp"):
            members |= {
                f"{number:03d}_{file.stem}{file.suffix}": file.read_bytes(),
                f"{number:03d}_{file.stem}.txt": "x",
            }
    index = build_index(write(tmp_path, members))
    left_out = [name.split("_", 1)[1] for names in index.report.skipped_names.values() for name in names]
    broken = {
        "truncated",
        "truncated_header",
        "not_an_image",
        "random_bytes",
        "zero_bytes",
        "bad_crc",
        "bomb_20000x20000",
    }
    assert set(left_out) == broken


def test_no_member_is_unpickled(tmp_path):
    class Mine:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    members = pair(0) | {"00000.pyd": pickle.dumps(Mine()), "00000.pickle": pickle.dumps(Mine()), "00000.pth": b"x"}
    assert len(build_index(write(tmp_path, members))) == 1
    assert not (tmp_path / "ran").exists()


def damaged(kind: str, path: Path) -> None:
    data = bytearray(path.read_bytes())
    size = len(picture(0)) // 512 * 512 + 512 + 512  # a picture with its header
    if kind == "bad header":
        data[size + 1024 : size + 1024 + 100] = b"\xff" * 100
    elif kind == "cut in a header":
        del data[size + 1024 + 200 :]
    elif kind == "cut in data":
        del data[size + 1024 + 512 + 20 :]
    elif kind == "no end":
        del data[len(data.rstrip(b"\0")) // 512 * 512 + 512 :]
    elif kind == "compressed":
        import gzip

        data = bytearray(gzip.compress(bytes(data)))
    elif kind == "empty":
        data = bytearray()
    elif kind == "key again":
        data = bytearray(tar_of([*pair(0).items(), *pair(1).items(), ("00000.json", b"{}")]))
    elif kind == "member again":
        data = bytearray(tar_of([*pair(0).items(), *list(pair(0).items())[1:]]))
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("bad header", "no end mark"),
        ("cut in a header", "no end mark"),
        ("cut in data", r"cut|no end mark|not a tar"),
        ("no end", "no end mark"),
        ("compressed", "unpack it"),
        ("empty", "not a tar"),
        ("key again", "comes again"),
        ("member again", "is there twice"),
    ],
)
def test_a_damaged_shard_stops_the_making_and_is_named(tmp_path, kind, said):
    paths = write_shards(tmp_path / "data", [3, 3, 3])
    damaged(kind, paths[1])
    with pytest.raises(BrokenShardsError, match=said) as caught:
        build_index(paths)
    assert list(caught.value.shards) == [str(paths[1])]
    assert not list((tmp_path / "data").glob("*.index*"))


def test_links_are_refused(tmp_path):
    import tarfile

    path = write_shards(tmp_path / "data", [1])[0]
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("00001.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(BrokenShardsError, match="link"):
        build_index(path)


def test_a_pattern_that_matches_nothing_and_shards_without_a_pair_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no shard matches"):
        open_index(tmp_path / "*.tar")
    with pytest.raises(ValueError, match="no pair in 1 shard"):
        open_index(write(tmp_path, {"a.txt": "a"}))


def test_the_report_counts_and_measures(tmp_path):
    paths = write_shards(tmp_path / "data", [3, 2], texts=2)
    (tmp_path / "data" / "00000_stats.json").write_text('{"successes": 4}')
    report = build_index(paths).report
    assert (report.shards, report.pictures, report.texts, report.verified) == (2, 5, 10, True)
    assert report.bytes == sum(path.stat().st_size for path in paths)
    assert (report.width.min, report.height.median, report.caption_words.max) == (16, 12, 7)
    assert report.notes == ["00000.tar: 00000_stats.json tells of 4 successes, the shard holds 3"]


def test_members_too_large_to_hold_are_left_out_unread(tmp_path, monkeypatch):
    monkeypatch.setattr("blip.datamodules.scan.MAX_BYTES", 10_000)
    monkeypatch.setattr("blip.datamodules.scan.MAX_TEXT_BYTES", 1_000)
    huge, long = {**pair(1), "00001.png": bytes(20_000)}, {**pair(2), "00002.txt": b"a picture " * 200}
    report = build_index([write(tmp_path / "data", {**pair(0), **huge, **long})]).report
    assert (report.pictures, report.skipped) == (1, {"picture too large": 1, "text too large": 1})


@pytest.mark.parametrize("told", ["", "[1]", "{}", '{"successes": null}'])
def test_statistics_of_other_tools_beside_a_shard_are_no_error(tmp_path, told):
    paths = write_shards(tmp_path / "data", [1])
    (tmp_path / "data" / "00000_stats.json").write_text(told)
    assert build_index(paths).report.notes == []


def test_an_index_is_made_once_beside_the_shards(tmp_path, monkeypatch):
    write_shards(tmp_path / "data", [3, 2])
    first = open_index(tmp_path / "data" / "*.tar")
    assert first.path.parent == tmp_path / "data"
    monkeypatch.setattr(module, "build_index", None)
    assert open_index([str(tmp_path / "data" / "{00000..00001}.tar")]).fingerprint == first.fingerprint


def test_an_index_is_made_in_the_cache_where_the_shards_are_read_only(tmp_path, cache):
    write_shards(tmp_path / "data", [3])
    (tmp_path / "data").chmod(0o555)
    try:
        index = open_index(tmp_path / "data" / "*.tar")
        assert index.path.is_relative_to(cache)
        assert open_index(tmp_path / "data" / "*.tar").path == index.path
    finally:
        (tmp_path / "data").chmod(0o755)


def test_many_who_need_an_index_at_once_get_one_made_once(tmp_path, monkeypatch):
    write_shards(tmp_path / "data", [20])
    made = []
    build = module.build_index
    monkeypatch.setattr(module, "build_index", lambda *args: made.append(1) or build(*args))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: open_index(tmp_path / "data" / "*.tar").fingerprint, range(6)))
    assert len(set(found)) == 1
    assert len(made) == 1


def test_fingerprint_is_of_the_content_wherever_it_lies(tmp_path):
    write_shards(tmp_path / "data", [3, 2])
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    write_shards(tmp_path / "other", [3, 2], first=1)
    here, there, other = (open_index(tmp_path / name / "*.tar").fingerprint for name in ("data", "copy", "other"))
    assert here == there != other


def test_a_changed_shard_is_an_error_and_a_copy_with_another_time_is_not(tmp_path):
    path = write_shards(tmp_path / "data", [3])[0]
    index = open_index(path)
    os.utime(path, (1, 1))
    assert open_index(path).fingerprint == index.fingerprint
    assert open_index(path).times[0] == 10**9, "the time is noted, so the bytes are compared once"

    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="bytes changed"):
        open_index(path)
    write_shards(tmp_path / "data", [30])
    with pytest.raises(ValueError, match="when its index was made"):
        open_index(path)


def test_an_index_made_elsewhere_serves_the_same_shards(tmp_path):
    paths = write_shards(tmp_path / "data", [3, 2])
    made = build_index(paths, tmp_path / "made.index")
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    moved = open_index(tmp_path / "moved" / "*.tar", tmp_path / "made.index")
    assert moved.fingerprint == made.fingerprint
    assert moved.location(1) == str(tmp_path / "moved" / "00001.tar")
    with pytest.raises(ValueError, match="this index is of 2 shards"):
        open_index(tmp_path / "moved" / "00000.tar", tmp_path / "made.index")


def test_a_cut_or_foreign_index_file_is_refused(tmp_path):
    path = write_shards(tmp_path / "data", [3])[0]
    index = open_index(path).path
    whole = index.read_bytes()
    for content, said in [(whole[:-64], "is cut"), (b"BLIP index 0\n" + whole[13:], "not an index of this version")]:
        index.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            open_index(path)


def test_an_index_whose_digests_could_name_other_files_is_refused(tmp_path):
    path = write_shards(tmp_path / "data", [3])[0]
    opened = open_index(path)
    digest = opened.shard(0).digest.encode()
    whole = opened.path.read_bytes()
    assert whole.count(digest) == 1
    opened.path.write_bytes(whole.replace(digest, b"../../" + digest[6:]))
    with pytest.raises(ValueError, match="a digest that is none"):
        open_index(path)


def test_workers_find_what_one_process_finds_and_progress_is_told(tmp_path):
    paths = write_shards(tmp_path / "data", [3, 2])
    told: list[tuple] = []
    alone = build_index(paths, progress=lambda *what: told.append(what))
    assert told == [(1, 2, "00000.tar"), (2, 2, "00001.tar")]
    assert build_index(paths, tmp_path / "other.index", workers=1).fingerprint == alone.fingerprint


def test_an_opened_index_is_opened_anew_in_another_process_not_copied(tmp_path):
    index = open_index(write_shards(tmp_path / "data", [30]))
    sent = pickle.dumps(index)
    assert len(sent) < 1000
    assert pickle.loads(sent).fingerprint == index.fingerprint


# records of other kinds

ROWS = {"questions": "question", "statements": "sentence", "rounds": "question"}


@pytest.mark.parametrize("kind", ROWS)
def test_an_index_enumerates_the_entries_of_the_records_asked_for(tmp_path, kind):
    write_records(tmp_path / "data", [3, 4], kind)
    index = open_index(tmp_path / "data" / "*.tar", records=kind)
    assert index.path.name.startswith(f"{kind}-")
    assert (index.kind.name, len(index.pictures), len(index)) == (kind, 7, 14)
    assert (index.report.records, index.report.texts) == (kind, 14)
    assert open_index(tmp_path / "data" / "*.tar", records=kind).fingerprint == index.fingerprint
    for number in range(7):
        shard, (*pictures, text), is_json = index.places(number)
        data = Path(index.location(shard)).read_bytes()
        shown = [data[at : at + size] for at, size in pictures]
        assert shown == [picture(number), picture(number + 500)][: 2 if kind == "statements" else 1]
        assert f"number {number} text" in data[text[0] : sum(text)].decode()
        assert is_json


def test_the_same_shards_have_an_index_for_each_kind(tmp_path):
    both = {"captions": ["one"], "questions": [{"id": i, "question": "q"} for i in range(3)]}
    path = write(tmp_path / "data", {"a.png": picture(0), "a.json": json.dumps(both)})
    pairs, questions = open_index(path), open_index(path, records="questions")
    assert (len(pairs), len(questions)) == (1, 3)
    assert pairs.path != questions.path
    assert pairs.fingerprint != questions.fingerprint
    with pytest.raises(ValueError, match="an index of pairs, not of questions"):
        open_index(path, pairs.path, records="questions")
    with pytest.raises(ValueError, match="there are pairs, questions"):
        open_index(path, records="captions")
    with pytest.raises(ValueError, match="no round in 1 shard"):
        open_index(path, records="rounds")


def test_what_an_index_of_pairs_says_is_what_it_always_said(tmp_path):
    made = open_index(write_shards(tmp_path / "data", [3, 1], texts=2)[:2])
    digest = hashlib.blake2b(b"BLIP index 1\n", digest_size=16)
    for array in (made.names, made.digests, made.shard_starts, made.text_starts, made.pictures):
        digest.update(array.tobytes())
    digest.update(np.array([0, 5, 10, 15, 20]).astype("<i8").tobytes() + b"00000000010000200003")
    assert made.fingerprint == digest.hexdigest()
    assert made.path.read_bytes().startswith(b"BLIP index 1\n")
    assert made.pictures.dtype.itemsize == 25


def test_two_pictures_are_needed_and_found_whatever_their_endings(tmp_path):
    said = json.dumps({"statements": [{"id": 1, "sentence": "s", "label": True}]})
    members = {
        **{"a.1.png": picture(1), "a.0.webp": picture(0), "a.json": said},
        **{"b.0.png": picture(0), "b.json": said, "c.0.png": picture(0), "c.0.jpg": picture(0)},
        **{"c.1.png": picture(1), "c.json": said, "d.png": picture(0), "d.json": said},
        **{"e.0.png": picture(0), "e.1.png": b"no picture", "e.json": said},
        **{"f.0.png": picture(0), "f.1.png": picture(1), "f.txt": "s"},
    }
    index = build_index(write(tmp_path, members), records="statements")
    assert [index.key(n) for n in range(len(index.pictures))] == ["a"]
    assert index.report.skipped == {
        "less than 2 pictures": 2, "more than one picture": 1, "picture not an image": 1, "no text": 1
    }  # fmt: skip
    _, (left, right, _), _ = index.places(0)
    data = (tmp_path / "00000.tar").read_bytes()
    assert [data[at : at + size] for at, size in (left, right)] == [picture(0), picture(1)]


def test_entries_that_are_not_as_they_should_be_are_counted_by_reason(tmp_path):
    good = {"id": 1, "question": "q"}
    members = {
        **{"a.png": picture(0), "a.json": json.dumps({"questions": [good, {"id": 2}, 3, good]})},
        **{"b.png": picture(0), "b.json": json.dumps({"questions": [{"question": "q"}]})},
        **{"c.png": picture(0), "c.json": json.dumps({"captions": ["q"]})},
        **{"d.png": picture(0), "d.json": json.dumps({"questions": []}), "e.png": picture(0), "e.txt": "q"},
    }
    index = build_index(write(tmp_path, members), records="questions")
    assert len(index) == 2
    assert index.report.skipped == {
        "question is empty": 1, "questions with an entry that is no object": 1, "entry without an id": 1,
        "no list of questions": 1, "text is empty": 1, "no text": 1,
    }  # fmt: skip
    assert index.report.skipped_names["entry without an id"] == ["00000.tar: b"]


def test_clips_are_told_from_pictures_and_damaged_ones_are_counted(tmp_path):
    pytest.importorskip("av", reason="clips need PyAV, the extra `video`")
    members = {**record(0, "clips"), **record(1, "clip_questions"), **pair(2)}
    members |= {"00003.mp4": clip(3)[:200], "00003.txt": "cut", "00004.mp4": clip(4), "00004.png": picture(4)}
    members |= {"00004.txt": "both", "00005.avi": clip(5, container="avi"), "00005.txt": "another"}
    path = write(tmp_path / "data", members)
    clips = open_index(path, records="clips")
    assert [clips.key(n) for n in range(len(clips.pictures))] == ["00000", "00004", "00005"]
    assert clips.report.skipped == {"text is empty": 1, "no clip": 1, "clip damaged": 1}
    assert (clips.report.width.max, clips.report.height.max) == (48, 32)
    assert [open_index(path, records=kind).key(0) for kind in ("clip_questions", "pairs")] == ["00001", "00002"]
    assert len(open_index(path)) == 2, "a clip beside a picture changes nothing for pairs"
    with pytest.raises(ValueError, match="no question in 1 shard"):
        open_index(path, records="questions")


def test_clips_too_large_are_left_out_unread(tmp_path, monkeypatch):
    monkeypatch.setattr("blip.datamodules.scan.MAX_CLIP_BYTES", 100)
    members = {**record(0, "clips"), "00001.mp4": b"x" * 50, "00001.txt": "t"}
    assert build_index(write(tmp_path, members), verify=False, records="clips").report.skipped == {"clip too large": 1}

"""MSR-VTT and MSVD as published become clips with captions or questions."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.datamodules.published import CLIP, pictures, shards, write


def test_the_1k_test_of_msrvtt_has_one_sentence_a_clip(tmp_path: Path, reference: Path):
    path = reference / "data/annotations/msrvtt/MSRVTT_JSFUSION_test.csv"
    with path.open() as file:
        published = list(csv.DictReader(file))
    folder = pictures(tmp_path / "videos", [f"all/{row['video_id']}.mp4" for row in published[:5]], CLIP)
    pictures(folder, [f"all/{published[0]['video_id']}.wav"], b"RIFF")  # its sound is no second clip
    built, records, members = shards("msrvtt", [folder, path], tmp_path / "out")
    assert records == {row["video_id"]: {"captions": [row["sentence"]]} for row in published[:5]}
    assert members == [f"{row['video_id']}.mp4" for row in published[:5]]
    assert built.reasons == {"clip is missing": [row["video_id"] for row in published[5:]]}


@pytest.fixture
def msrvtt_data(tmp_path: Path) -> Path:
    splits = {"video0": "train", "video1": "train", "video6513": "validate", "video7010": "test"}
    videos = [
        {"video_id": clip, "category": 9, "url": "", "start time": 0.5, "end time": 9, "split": split, "id": n}
        for n, (clip, split) in enumerate(splits.items())
    ]
    sentences = [{"sen_id": n, "video_id": clip, "caption": f"{clip} said {n}"} for n in (0, 1) for clip in splits]
    return write(tmp_path / "MSRVTT_data.json", {"info": {}, "videos": videos, "sentences": sentences})


def test_msrvtt_clips_are_chosen_by_split_and_by_list(tmp_path: Path, msrvtt_data: Path):
    folder = pictures(tmp_path / "videos", [f"video{n}.mp4" for n in (0, 1, 6513, 7010)], CLIP)
    _, records, _ = shards("msrvtt", [folder, msrvtt_data], tmp_path / "train", "train")
    assert records == {clip: {"captions": [f"{clip} said 0", f"{clip} said 1"]} for clip in ("video0", "video1")}
    nine = write(tmp_path / "MSRVTT_train.9k.csv", "video_id\nvideo7010\nvideo1\nvideo9\n")
    built, records, _ = shards("msrvtt", [folder, msrvtt_data, nine], tmp_path / "nine")
    assert list(records) == ["video7010", "video1"]
    assert built.left_out == [("clip without a caption", "video9")]
    with pytest.raises(ValueError, match=r"no clip of the split 'val': \{'train': 2"):
        shards("msrvtt", [folder, msrvtt_data], tmp_path / "val", "val")
    with pytest.raises(ValueError, match="no captions; a list of clips needs"):
        shards("msrvtt", [folder, nine], tmp_path / "none")


def test_the_released_list_of_msrvtt_is_read(tmp_path: Path):
    lines = [{"clip_name": f"video{n}", "caption": f"a clip {n}", "sen_id": n} for n in (7020, 7021)]
    path = write(tmp_path / "msrvtt_test.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    folder = pictures(tmp_path / "videos", ["video7020.mp4", "video7021.mp4"], CLIP)
    _, records, _ = shards("msrvtt", [folder, path], tmp_path / "out")
    assert records == {f"video{n}": {"captions": [f"a clip {n}"]} for n in (7020, 7021)}


def test_msrvtt_questions_name_clips_by_number(tmp_path: Path):
    rows = [
        {"answer": "couch", "category_id": 14, "id": 158581, "question": "what are three people sitting on?", "video_id": 7010},
        {"answer": "person", "category_id": 14, "id": 158582, "question": "who is it?", "video_id": 7010},
    ]  # fmt: skip
    path = write(tmp_path / "test_qa.json", rows)
    folder = pictures(tmp_path / "videos", ["video7010.mp4"], CLIP)
    _, records, _ = shards("msrvtt_qa", [folder, path], tmp_path / "out")
    assert records == {
        "video7010": {"questions": [{"id": r["id"], "question": r["question"], "answers": [r["answer"]]} for r in rows]}
    }


@pytest.mark.parametrize("youtube", [False, True])
def test_msvd_questions_find_clips_by_either_name(tmp_path: Path, reference: Path, youtube: bool):
    folder = reference / "data/annotations/msvd_qa"
    published = json.loads((folder / "train_qa.json").read_text())
    clips = dict(reversed(line.split()) for line in (folder / "youtube_mapping.txt").read_text().splitlines())  # type: ignore[misc]
    named = [clips[f"vid{n}"] if youtube else f"vid{n}" for n in (1, 2)]
    videos = pictures(tmp_path / "videos", [f"{name}.avi" for name in named], b"RIFF\0\0\0\0AVI LIST")
    files = [folder / "train_qa.json"] + [folder / "youtube_mapping.txt"] * youtube
    _, records, members = shards("msvd_qa", [videos, *files], tmp_path / "out")
    assert members == ["vid1.avi", "vid2.avi"]
    for number in (1, 2):
        assert records[f"vid{number}"]["questions"] == [
            {"id": row["id"], "question": row["question"], "answers": [row["answer"]]}
            for row in published
            if row["video_id"] == number
        ]


def test_msvd_descriptions_are_cut_by_a_list(tmp_path: Path):
    described = "# a header\n\n-4wsuPCjDBc_5_15 a squirrel is eating\n-4wsuPCjDBc_5_15 a chipmunk eats\nmv89psg6zh4_33_46 a bird\n"
    files = [
        write(tmp_path / "AllVideoDescriptions.txt", described),
        write(tmp_path / "youtube_mapping.txt", "-4wsuPCjDBc_5_15 vid1\nmv89psg6zh4_33_46 vid1970\n"),
    ]
    videos = pictures(tmp_path / "videos", ["-4wsuPCjDBc_5_15.avi", "vid1970.mp4"], CLIP)
    _, records, _ = shards("msvd", [videos, *files], tmp_path / "all")
    assert records == {
        "-4wsuPCjDBc_5_15": {"captions": ["a squirrel is eating", "a chipmunk eats"]},
        "mv89psg6zh4_33_46": {"captions": ["a bird"]},
    }
    listed = write(tmp_path / "test_list.txt", "mv89psg6zh4_33_46\n")
    assert list(shards("msvd", [videos, *files, listed], tmp_path / "test")[1]) == ["mv89psg6zh4_33_46"]


def test_files_that_are_no_clips_are_left_out(tmp_path: Path):
    path = write(
        tmp_path / "test.csv", "key,vid_key,video_id,sentence\n" + "".join(f"r,m,video{n},a\n" for n in range(4))
    )
    folder = pictures(tmp_path / "videos", ["video0.mp4"], CLIP)
    pictures(folder, ["video1.mp4"], b"<html>404</html>")
    pictures(folder, ["video2.mp4"], b"")
    built, records, _ = shards("msrvtt", [folder, path], tmp_path / "out")
    assert list(records) == ["video0"]
    assert built.left_out == [
        ("clip of a kind that shards do not hold", "video1.mp4"), ("clip empty", "video2.mp4"), ("clip is missing", "video3"),
    ]  # fmt: skip

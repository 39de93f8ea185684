"""Captions as published (COCO, Karpathy's splits, Flickr30k, NoCaps, the released lists) become pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blip.datamodules.layouts.published import LAYOUTS
from tests.datamodules.published import pictures, shards, write


def sentences(*raw: str) -> list[dict]:
    return [{"tokens": text.lower().split(), "raw": text, "imgid": 0, "sentid": n} for n, text in enumerate(raw)]


@pytest.fixture
def karpathy_coco(tmp_path: Path) -> Path:
    rows = [("train2014", 9, "train"), ("val2014", 25, "restval"), ("val2014", 42, "val"), ("val2014", 73, "test")]
    images = [
        {
            "filepath": folder,
            "sentids": [],
            "filename": f"COCO_{folder}_{number:012d}.jpg",
            "imgid": 0,
            "split": split,
            "sentences": sentences(f"A dog, number {number}.", "Another caption"),
            "cocoid": number,
        }
        for folder, number, split in rows
    ]
    return write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})


def test_karpathys_train_is_with_restval_and_keys_are_cocos_ids(tmp_path: Path, karpathy_coco: Path):
    names = ["train2014/COCO_train2014_000000000009.jpg", "val2014/COCO_val2014_000000000025.jpg"]
    coco = pictures(tmp_path / "coco", [*names, "val2014/COCO_val2014_000000000073.jpg"])
    built, records, members = shards("karpathy", [coco, karpathy_coco], tmp_path / "train", "train")
    assert records == {str(number): {"captions": [f"A dog, number {number}.", "Another caption"]} for number in (9, 25)}
    assert members == ["9.png", "25.png"]
    assert (built.pictures, built.captions, built.left_out) == (2, 4, [])
    assert list(shards("karpathy", [coco, karpathy_coco], tmp_path / "test", "test")[1]) == ["73"]
    built, records, _ = shards("karpathy", [coco, karpathy_coco], tmp_path / "all")
    assert list(records) == ["9", "25", "73"]
    assert built.left_out == [("picture is missing", "val2014/COCO_val2014_000000000042.jpg")]
    with pytest.raises(ValueError, match=r"no picture of the split 'dev'; found \{'train': 1, 'restval': 1"):
        shards("karpathy", [coco, karpathy_coco], tmp_path / "dev", "dev")


def test_pictures_may_lie_in_several_folders_and_have_the_names_of_2017(tmp_path: Path, karpathy_coco: Path):
    train = pictures(tmp_path / "a", ["COCO_train2014_000000000009.jpg"])
    val = pictures(tmp_path / "b", ["000000000025.jpg"])
    assert list(shards("karpathy", [train, val, karpathy_coco], tmp_path / "out", "train")[1]) == ["9", "25"]


def test_karpathys_flickr_has_names_for_keys(tmp_path: Path, reference: Path):
    path = reference / "data/annotations/karpathy/dataset_flickr8k.json"
    published = json.loads(path.read_text())["images"]
    images = pictures(tmp_path / "images", [image["filename"] for image in published[:3]])
    built, records, _ = shards("karpathy", [images, path], tmp_path / "out", "train")
    assert records == {
        image["filename"].removesuffix(".jpg"): {"captions": [s["raw"].strip() for s in image["sentences"]]}
        for image in published[:3]
    }
    assert built.reasons == {"picture is missing": [image["filename"] for image in published[3:]]}


def test_flickrs_token_file_is_cut_by_a_list_of_names(tmp_path: Path):
    tokens = write(
        tmp_path / "results_20130124.token",
        "10.jpg#0\tTwo men .\n10.jpg#1\tMen talk .\n11.jpg#0\tA dog .\n12.jpg#0\tA cat\n",
    )
    listed = write(tmp_path / "test.txt", "12\n10.jpg\n99.jpg\n")
    images = pictures(tmp_path / "flickr30k-images", ["10.jpg", "11.jpg", "12.jpg"])
    assert list(shards("flickr", [images, tokens], tmp_path / "all")[1]) == ["10", "11", "12"]
    built, records, _ = shards("flickr", [images, tokens, listed], tmp_path / "test")
    assert records == {"10": {"captions": ["Two men .", "Men talk ."]}, "12": {"captions": ["A cat"]}}
    assert built.left_out == [("picture without a caption", "99")]
    with pytest.raises(ValueError, match=r"line 1: NAME\.jpg#NUMBER, a tab and a caption"):
        shards("flickr", [images, write(tmp_path / "x.token", "10.jpg Two men\n")], tmp_path / "none")


def test_coco_captions_are_grouped_by_picture(tmp_path: Path):
    path = write(
        tmp_path / "captions_val2014.json",
        {
            "info": {"year": 2014},
            "images": [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg", "license": 3} for n in (42, 73, 74)],
            "licenses": [{"id": 1}],
            "annotations": [
                {"image_id": 73, "id": 1, "caption": "one "},
                {"image_id": 42, "id": 2, "caption": "two"},
                {"image_id": 73, "id": 3, "caption": "three"},
                {"image_id": 99, "id": 4, "caption": "of no picture"},
                {"image_id": 73, "id": 5, "caption": " . "},
            ],
        },
    )
    images = pictures(tmp_path / "val2014", [f"COCO_val2014_{n:012d}.jpg" for n in (42, 73, 74)])
    built, records, _ = shards("coco_captions", [images, path], tmp_path / "out")
    assert records == {"42": {"captions": ["two"]}, "73": {"captions": ["one", "three"]}}
    assert sorted(built.left_out) == [
        ("caption is empty", "COCO_val2014_000000000073.jpg"),
        ("captions of a picture that is not listed", "99"),
        ("picture without a caption", "COCO_val2014_000000000074.jpg"),
    ]


def test_the_real_excerpt_of_coco_gives_all_its_captions(reference: Path):
    path = reference / "data/annotations/coco/captions_val2017.json"
    published = json.loads(path.read_text())
    entries = list(LAYOUTS["coco_captions"].entries([path]))
    assert [entry.key for entry in entries] == [str(image["id"]) for image in published["images"]]
    said = sorted(caption for entry in entries for caption in entry.record["captions"])
    assert said == sorted(annotation["caption"] for annotation in published["annotations"])


def test_nocaps_has_domains_and_a_test_part_without_captions(tmp_path: Path):
    domains = ["in-domain", "near-domain", "near-domain"]
    images = [{"id": n, "file_name": f"{n:016x}.jpg", "domain": domain} for n, domain in enumerate(domains)]
    said = [{"image_id": n, "id": n * 10 + i, "caption": f"caption {i}"} for n in range(3) for i in range(10)]
    val = write(tmp_path / "nocaps_val_4500_captions.json", {"images": images, "annotations": said})
    test = write(tmp_path / "nocaps_test_image_info.json", {"images": [{"id": 4500, "file_name": f"{0:016x}.jpg"}]})
    folder = pictures(tmp_path / "images", [image["file_name"] for image in images])
    _, records, _ = shards("nocaps", [folder, val], tmp_path / "val")
    assert [record["domain"] for record in records.values()] == domains
    assert {len(record["captions"]) for record in records.values()} == {10}
    assert list(shards("nocaps", [folder, val], tmp_path / "near", "near-domain")[1]) == ["1", "2"]
    assert shards("nocaps", [folder, test], tmp_path / "test")[1] == {"4500": {"captions": []}}
    with pytest.raises(ValueError, match=r"no picture of the domain 'far'; found \{'near-domain': 2"):
        shards("nocaps", [folder, val], tmp_path / "far", "far")


def test_nocaps_of_the_download_page_is_read(tmp_path: Path, reference: Path):
    path = reference / "data/annotations/nocaps/nocaps_val_4500_captions.json"
    folder = pictures(tmp_path / "val", ["0013ea2087020901.jpg"])
    records = shards("nocaps", [folder, path], tmp_path / "out")[1]
    assert records == {"0": {"captions": ["A baby is standing in front of a house."]}}


def test_released_training_lists_have_one_record_a_caption(tmp_path: Path):
    path = write(
        tmp_path / "coco_karpathy_train.json",
        [
            {"image": "val2014/COCO_val2014_000000522418.jpg", "caption": "A woman", "image_id": "coco_522418"},
            {"image": "train2014/COCO_train2014_000000000009.jpg", "caption": "A box", "image_id": "coco_9"},
            {"image": "val2014/COCO_val2014_000000522418.jpg", "caption": "A cake", "image_id": "coco_522418"},
        ],
    )
    names = ["val2014/COCO_val2014_000000522418.jpg", "train2014/COCO_train2014_000000000009.jpg"]
    _, records, _ = shards("blip_captions", [pictures(tmp_path / "coco", names), path], tmp_path / "out")
    assert records == {"522418": {"captions": ["A woman", "A cake"]}, "9": {"captions": ["A box"]}}


def test_released_lists_of_the_real_data_sets_are_read(tmp_path: Path, reference: Path):
    lists = reference / "data/annotations/blip"
    for name, count in (
        ("coco_karpathy_val", 300),
        ("coco_karpathy_test", 300),
        ("nocaps_val", 1000),
        ("nocaps_test", 1000),
    ):
        published = json.loads((lists / f"{name}.json").read_text())
        entries = list(LAYOUTS["blip_captions"].entries([lists / f"{name}.json"]))
        assert len(entries) == count
        assert [entry.record["captions"] for entry in entries] == [row.get("caption", []) for row in published]
        assert [entry.media[0][0] for entry in entries] == [row["image"] for row in published]
    assert [entry.key for entry in entries[:2]] == ["4500", "4501"]  # what NoCaps' server asks for
    folder = pictures(tmp_path / "nocaps", [published[0]["image"]])
    built, records, _ = shards("blip_captions", [folder, lists / "nocaps_test.json"], tmp_path / "out")
    assert records == {"4500": {"captions": []}}
    assert len(built.reasons["picture is missing"]) == 999

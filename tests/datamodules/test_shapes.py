"""The embedded world: what a caption says is what the picture shows, and what is held out stays held out."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from blip.datamodules import shapes
from blip.datamodules.shapes import ShapesDataModule, write_world
from blip.datamodules.shapes_language import (
    CAPTION_WORDS,
    NOISE,
    WORDS,
    attribute_scores,
    caption_slots,
    captions,
    noise,
    parse,
    wrong_attribute,
)
from blip.datamodules.shapes_scenes import (
    COLOURS,
    OUTLINES,
    RADII,
    RESERVED,
    SHAPES,
    SIDE,
    Description,
    Scene,
    Thing,
    draw_scene,
    render,
)

SIZES = {"train": 90, "web": 150, "val": 30, "test": 30, "reserved": 30}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("worlds") / "world", seed=3, sizes=SIZES, processes=2)


def records(folder: Path) -> Iterator[dict]:
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    yield json.load(tar.extractfile(member))


def described(record: dict) -> Description:
    scene = record["scene"]
    things = tuple(Thing(*(thing[slot] for slot in Thing._fields)) for thing in scene["objects"])
    chain = tuple((index, relation, index + 1) for index, relation in enumerate(scene["relations"]))
    return Description(things, chain, scene["background"])


def some_scenes(count: int, things: int, reserved: bool = False) -> list[Scene]:
    return [draw_scene(random.Random(f"{things}/{number}"), things, reserved) for number in range(count)]


# --- scenes and pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("things", [2, 3])
def test_relations_are_true_of_the_coordinates_by_a_clear_margin(things: int) -> None:
    for scene in some_scenes(300, things):
        for first, relation, second in scene.description.relations:
            (x, y, r), (u, v, q) = scene.places[first], scene.places[second]
            along = {"left": u - x, "right": x - u, "above": v - y, "below": y - v}[relation]
            beside = abs(v - y) if relation in ("left", "right") else abs(u - x)
            assert along >= r + q + 1.9
            assert beside <= 0.31 * along


@pytest.mark.parametrize("things", [1, 2, 3])
def test_nothing_overlaps_or_leaves_the_picture(things: int) -> None:
    for scene in some_scenes(300, things):
        for number, (x, y, r) in enumerate(scene.places):
            assert min(x - r, y - r, SIDE - x - r, SIDE - y - r) >= 1.4
            for u, v, q in scene.places[:number]:
                assert max(abs(x - u), abs(y - v)) >= r + q


def test_every_thing_is_12_pixels_wide_and_high_and_big_ones_are_clearly_bigger() -> None:
    for outlines in OUTLINES.values():
        extent = np.ptp(outlines[0], axis=0)
        assert extent.min() * min(sizes["small"][0] for sizes in RADII.values()) >= 12
    assert all(sizes["big"][0] > 1.25 * sizes["small"][1] for sizes in RADII.values())


def test_pictures_show_the_colour_where_a_plain_thing_stands_and_the_background_elsewhere() -> None:
    said = Description((Thing("square", "blue", "big", "plain"),), (), "white")
    picture = render(Scene(said, ((20.0, 40.0, 16.0),)), random.Random(0)).astype(int)
    assert picture.shape == (64, 64, 3)
    assert np.abs(picture[36:44, 16:24].mean((0, 1)) - COLOURS["blue"]).max() < 30
    assert picture[5:15, 40:60].min() > 180


def test_the_eight_shapes_cover_clearly_different_pixels() -> None:
    black = [
        render(
            Scene(Description((Thing(s, "yellow", "small", "plain"),), (), "black"), ((32, 32, 6.75),)),
            random.Random(0),
        )
        for s in SHAPES
    ]
    masks = [picture[..., 0] > 120 for picture in black]
    for number, mask in enumerate(masks):
        assert mask.any(0).sum() >= 11  # the outermost of 12 pixels may be covered by less than a half
        for other in masks[:number]:
            assert (mask ^ other).sum() > 0.2 * (mask | other).sum()


def test_reserved_pairs_stand_in_reserved_scenes_alone() -> None:
    assert len(set(RESERVED)) == len(set(RESERVED.values())) == 8
    for things in (1, 2, 3):
        for reserved in (False, True):
            for scene in some_scenes(200, things, reserved):
                pairs = [RESERVED[thing.colour] == thing.shape for thing in scene.description.things]
                assert sum(pairs) == int(reserved)


def test_a_world_without_room_for_more_scenes_says_so() -> None:
    excluded = {draw_scene(random.Random(n), 1).description.content for n in range(40_000)}
    with pytest.raises(ValueError, match="no scene of 1 things is left"):
        draw_scene(random.Random(1), 1, excluded=excluded)


# --- language ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("things", [1, 2, 3])
def test_captions_vary_in_wording_and_parse_back_to_the_same_meaning(things: int) -> None:
    for scene in some_scenes(200, things):
        texts = captions(scene.description, random.Random(7), 5)
        assert len(set(texts)) == 5
        assert all(parse(text).meaning == scene.description.meaning for text in texts)
        assert max(len(text.split()) for text in texts) <= 25


def test_captions_use_every_relation_order_and_word_of_the_grammar() -> None:
    texts = [text for scene in some_scenes(300, 3) + some_scenes(100, 2) for text in captions(scene.description, random.Random(1), 5)]  # fmt: skip
    assert {word for text in texts for word in text.split()} == CAPTION_WORDS


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle on grey",
        "a small red plain circle",
        "a small red plain circle on pink",
        "a small red plain circle left a big blue plain ring on grey",
        "on grey a small red plain circle on grey",
        "a small red plain circle on grey and more",
    ],
)
def test_text_outside_the_grammar_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        parse(text)


def test_both_ways_to_chain_three_things_are_read_alike() -> None:
    a, b, c = "a small red plain circle", "a big blue striped ring", "a small green dotted star"
    along = parse(f"{a} left of {b} which is above {c} on grey")
    middle = parse(f"on a grey background {b} to the right of {a} and over {c}".replace("to the right of", "right of"))
    back = parse(f"{c} under {b} which is right of {a} on grey")
    other = parse(f"{a} left of {b} and above {c} on grey")
    assert along.meaning == middle.meaning == back.meaning != other.meaning


def test_broken_captions_are_read_as_far_as_they_go() -> None:
    assert caption_slots("photo of red stars, free shipping") == Description((Thing(None, "red"),), (), None)
    assert caption_slots("a small red blue circle").things == (Thing(None, "red", "small"), Thing("circle", "blue"))
    assert caption_slots("left of a circle on the black and white") == Description((Thing("circle"),), (), "several")


@pytest.mark.parametrize("kind", NOISE)
def test_noise_never_describes_the_picture(kind: str) -> None:
    for number, scene in enumerate(some_scenes(60, 2)):
        other = some_scenes(61, 2)[number + 1].description
        text = noise(kind, scene.description, other, random.Random(number), frozenset())
        assert text
        assert caption_slots(text).meaning != scene.description.meaning


def test_one_wrong_attribute_changes_one_slot_and_makes_no_reserved_pair() -> None:
    for number, scene in enumerate(some_scenes(200, 3)):
        truth, wrong = scene.description, wrong_attribute(scene.description, random.Random(number))
        changed = [a != b for mine, other in zip(truth.things, wrong.things, strict=True) for a, b in zip(mine, other, strict=True)]  # fmt: skip
        changed += [a != b for a, b in zip(truth.relations, wrong.relations, strict=True)]
        assert sum(changed) + (truth.background != wrong.background) == 1
        assert all(RESERVED[thing.colour] != thing.shape for thing in wrong.things)


# --- scores --------------------------------------------------------------------------------------------------------

TRUTH = "a small red plain circle left of a big blue striped ring which is left of a small green dotted star on grey"


def score(text: str, truth: str = TRUTH) -> dict[str, float]:
    return attribute_scores([[truth]], [text])


def test_other_wordings_of_the_truth_score_full() -> None:
    for things in (1, 2, 3):
        for scene in some_scenes(30, things):
            first, *others = captions(scene.description, random.Random(0), 5)
            for other in others:
                assert set(score(other, first).values()) == {100.0}


def test_a_relation_that_follows_along_a_straight_chain_is_right() -> None:
    said = "a small red plain circle left of a big blue striped ring and left of a small green dotted star on grey"
    assert score(said)["attributes"] == 100


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (("circle", "heart"), "shape"),
        (("red", "pink"), "colour"),
        (("big", "small"), "size"),
        (("dotted", "plain"), "texture"),
        (("left", "right"), "relation"),
        (("grey", "white"), "background"),
    ],
)
def test_one_wrong_attribute_lowers_its_own_score_alone(change: tuple[str, str], kind: str) -> None:
    scores = score(TRUTH.replace(*change, 1))
    assert scores["attributes"] == pytest.approx(100 * 14 / 15)
    assert [name for name, value in scores.items() if value < 100] == [
        "attributes",
        f"attributes_{kind}",
        "attributes_3_objects",
    ]


def test_leaving_out_and_inventing_count_as_wrong() -> None:
    full, left_out = score(TRUTH)["attributes"], score(TRUTH.replace("striped ", ""))["attributes"]
    missing = score("a small red plain circle left of a big blue striped ring on grey")["attributes"]
    invented = score(
        "a small red plain circle left of a big blue plain ring on grey", "a small red plain circle on grey"
    )
    assert full == 100
    assert left_out == pytest.approx(200 * 14 / 29)
    assert missing == pytest.approx(200 * 10 / 25)
    assert invented["attributes"] == pytest.approx(200 * 5 / 15)
    assert score("")["attributes"] == 0


def test_saying_a_thing_twice_gains_nothing() -> None:
    truth = "a small red plain circle on grey"
    assert score(truth + " a small red plain circle", truth)["attributes"] == pytest.approx(200 * 5 / 14)


def test_scores_are_pooled_over_the_pictures_and_split_by_their_number_of_things() -> None:
    one = "a small red plain circle on grey"
    scores = attribute_scores([[TRUTH], [one]], [TRUTH, "a small blue plain circle on grey"])
    assert scores["attributes"] == pytest.approx(100 * 19 / 20)
    assert scores["attributes_1_objects"] == pytest.approx(80)
    assert scores["attributes_3_objects"] == 100
    assert "attributes_2_objects" not in scores
    with pytest.raises(ValueError, match="one for each"):
        attribute_scores([[one]], [])


# --- the world on disk ---------------------------------------------------------------------------------------------


def test_every_caption_of_the_world_is_true_and_every_picture_has_64_pixels(world: Path) -> None:
    for split in ("human", "val", "test", "reserved"):
        found = list(records(world / split))
        assert len(found) == SIZES["train" if split == "human" else split]
        for record in found:
            assert len(record["captions"]) == 5
            assert {parse(text).meaning for text in record["captions"]} == {described(record).meaning}
    with tarfile.open(world / "val" / "00000.tar") as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                assert Image.open(io.BytesIO(tar.extractfile(member).read())).size == (64, 64)


def test_held_out_captions_are_false_for_all_other_scenes(world: Path) -> None:
    held_out = [described(record).content for split in ("val", "test", "reserved") for record in records(world / split)]
    training = {described(record).content for split in ("human", "web") for record in records(world / split)}
    assert len(set(held_out)) == len(held_out) == 90
    assert not training & set(held_out)


def test_reserved_pairs_occur_in_no_picture_or_caption_outside_their_split(world: Path) -> None:
    for split in ("human", "web", "val", "test", "reserved"):
        for record in records(world / split):
            said = [described(record), *(caption_slots(text) for text in record["captions"])]
            for description in said:
                hit = any(RESERVED.get(thing.colour, "") == thing.shape for thing in description.things)
                assert hit == (split == "reserved")


def test_training_shards_are_ordered_by_the_number_of_things(world: Path) -> None:
    for split, size in (("human", 90), ("web", 150)):
        for things in (1, 2, 3):
            with_things = [
                len(record["scene"]["objects"])
                for path in (world / split).glob(f"{things}-*.tar")
                for record in records_of(path)
            ]
            assert with_things == [things] * (size // 3)


def records_of(path: Path) -> list[dict]:
    with tarfile.open(path) as tar:
        return [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]


def test_half_of_the_web_is_noise_and_the_truth_stands_beside(world: Path) -> None:
    found = list(records(world / "web"))
    for record in found:
        (text,) = record["captions"]
        assert record["truth"] == (record["kind"] == "true")
        assert record["truth"] == (caption_slots(text).meaning == described(record).meaning)
    assert 0.35 < sum(record["truth"] for record in found) / len(found) < 0.65
    assert {record["kind"] for record in found} == {"true", *NOISE}


def test_words_of_the_grammar_are_whole_pieces_and_nothing_is_unknown(world: Path) -> None:
    tokenizer = Tokenizer.from_file(str(world / "tokenizer.json"))
    assert all(len(tokenizer.encode(word, add_special_tokens=False).ids) == 1 for word in WORDS)
    texts = [text for split in ("web", "val", "reserved") for record in records(world / split) for text in record["captions"]]  # fmt: skip
    for text in [*texts, "Zyx_098~{Q}; $5 @ [w]"]:
        assert "[UNK]" not in tokenizer.encode(text).tokens
    assert max(len(tokenizer.encode(text).ids) for text in texts if "a" in text.split()) <= 30


def test_a_larger_web_leaves_the_vocabulary_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "PAIRS_A_SHARD", 10)
    small, large = (write_world(tmp_path / str(web), 3, SIZES | {"web": web}, processes=1) for web in (30, 120))
    assert len(list((large / "web").iterdir())) > len(list((small / "web").iterdir()))
    assert (small / "tokenizer.json").read_bytes() == (large / "tokenizer.json").read_bytes()


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_processes(world: Path, tmp_path: Path) -> None:
    again = write_world(tmp_path / "again", seed=3, sizes=SIZES, processes=1)
    paths = sorted(path.relative_to(world) for path in world.rglob("*") if path.is_file())
    assert paths == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for path in paths:
        assert (world / path).read_bytes() == (again / path).read_bytes(), path


def test_a_written_world_is_kept_and_another_one_is_refused(world: Path, tmp_path: Path) -> None:
    before = (world / "world.json").stat().st_mtime_ns
    assert write_world(world, seed=3, sizes=SIZES) == world
    assert (world / "world.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="asked for"):
        write_world(world, seed=4, sizes=SIZES)
    (tmp_path / "mine.txt").write_text("dear")
    with pytest.raises(ValueError, match="something else"):
        write_world(tmp_path, seed=3, sizes=SIZES)
    with pytest.raises(ValueError, match="a number for each"):
        write_world(tmp_path / "new", seed=3, sizes={"train": 3})


def test_a_world_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(texts: list[str]) -> Tokenizer:
        raise OSError("no space left on device")

    few = {split: 3 for split in SIZES}
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "train_vocabulary", fail)
        with pytest.raises(OSError, match="no space"):
            write_world(tmp_path / "world", seed=0, sizes=few, processes=1)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    (tmp_path / "world.partial").mkdir()  # what a killed process leaves behind
    (tmp_path / "world.partial" / "rest.tar").write_bytes(b"half")
    write_world(tmp_path / "world", seed=0, sizes=few, processes=1)
    assert not list(tmp_path.rglob("rest.tar"))
    assert (tmp_path / "world" / "tokenizer.json").is_file()


def test_the_datamodule_draws_its_world_and_streams_it(tmp_path: Path) -> None:
    folder = tmp_path / "world"
    data = ShapesDataModule(
        folder,
        world_seed=3,
        sizes={**SIZES, "web": 0},
        sources=[{"name": "human", "shards": f"{folder}/human/*.tar"}],
        val={"main": {"shards": f"{folder}/val/*.tar", "captions": "first"}},
        tokenizer=folder / "tokenizer.json",
        image_size=64,
        batch_size=15,
        eval_batch_size=30,
        seed=0,
        max_words=30,
        max_tokens=30,
        captions="one",
    )
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len({key for batch in batches for key in batch.keys}) == SIZES["train"]
    assert all(parse(text) for batch in batches for text in batch.texts)
    (held_out,) = data.val_dataloader()[0]
    assert held_out.image.shape == (30, 3, 64, 64)
    assert attribute_scores(held_out.references, held_out.texts)["attributes"] == 100

"""Parts of the embedded world: what their records say is true of the coordinates, words alone do not tell it, held out stays so."""

from __future__ import annotations

import json
import random
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from blip.datamodules.drawn import drawn
from blip.datamodules.shapes import HELD_OUT, held_out_scenes, train_vocabulary, write_world
from blip.datamodules.shapes_dialogues import OPTIONS, ROUNDS, Facts, imagined
from blip.datamodules.shapes_language import WORDS, captions, parse
from blip.datamodules.shapes_parts import PARTS, PEOPLE, ShapesClips, ShapesQuestions, write_part
from blip.datamodules.shapes_questions import fits
from blip.datamodules.shapes_scenes import RESERVED, Thing, draw_scene
from blip.datamodules.video import frames_of
from tests.chance import Item, blind, items, records
from tests.datamodules.oracle import answer, holds, is_such, meaning, reply

WORLD = {"train": 0, "web": 0, "val": 12, "test": 60, "reserved": 6}
SIZES = {
    "questions": {"train": 240, "val": 3, "test": 60},
    "statements": {"train": 240, "val": 3, "test": 60},
    "rounds": {"train": 60, "val": 3, "test": 30},
    "clips": {"val": 3, "test": 12},
}
STREAM = {"image_size": 64, "batch_size": 8, "eval_batch_size": 6, "seed": 0, "max_words": 60, "max_tokens": 60}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for part, sizes in SIZES.items():
        write_part(folder / part, part, 3, sizes, WORLD, processes=2)
    return folder


def found(world: Path, part: str) -> list[dict]:
    return [record for split in SIZES[part] for record in records(world / part / split)]


def scenes_of(record: dict) -> list[dict]:
    return record.get("scenes") or [record["scene"]]


def content(scene: dict) -> tuple:
    return scene["background"], frozenset(Thing(*(thing[slot] for slot in Thing._fields)) for thing in scene["objects"])


# --- truth ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["questions", "clips"])
def test_answers_are_true_of_the_coordinates(world: Path, part: str) -> None:
    for record in found(world, part):
        assert len(record["questions"]) >= 3
        for entry in record["questions"]:
            assert entry["answers"] == [answer(record["scene"], entry["question"])] * PEOPLE, entry


def test_statements_are_true_or_false_as_the_two_scenes_are(world: Path) -> None:
    for record in found(world, "statements"):
        for entry in record["statements"]:
            assert entry["label"] == holds(record["scenes"], entry["sentence"]), entry


def test_of_a_round_s_options_those_with_the_scene_s_answer_are_relevant_and_no_others(world: Path) -> None:
    for record in found(world, "rounds"):
        topic: str | None = None
        for entry in record["rounds"]:
            true, topic = reply(record["scene"], entry["question"], topic)
            said = meaning(entry["answer"])
            if "look like" in entry["question"]:  # says what is not yet known
                assert {"and"} | set(said.split()) <= {"and"} | set(true.split()), (entry, record["scene"])
            else:
                assert said == true, (entry, record["scene"])
            assert entry["options"][entry["answer_index"]] == entry["answer"]
            relevant = [float(meaning(option) == meaning(entry["answer"])) for option in entry["options"]]
            assert entry.get("relevance", [float(option == entry["answer"]) for option in entry["options"]]) == relevant


def test_a_dialogue_s_caption_is_true_and_names_one_thing(world: Path) -> None:
    for record in found(world, "rounds"):
        said = re.fullmatch(r"three things on a (\w+) background and one is (?:a )?(\w+)", record["caption"])
        assert said
        assert said[1] == record["scene"]["background"]
        assert sum(is_such(thing, said[2]) for thing in record["scene"]["objects"]) == 1


def test_captions_of_a_clip_say_what_its_frames_show_together(world: Path) -> None:
    for record in found(world, "clips"):
        for caption in record["captions"]:
            assert parse(caption).content == content(record["scene"])


# --- what words tell -----------------------------------------------------------------------------------------------


def test_answers_are_even_among_questions_of_a_kind(world: Path) -> None:
    most = {
        "exists": 0.55,
        "count": 0.45,
        "colour": 0.25,
        "shape": 0.25,
        "size": 0.6,
        "texture": 0.45,
        "relation": 0.45,
    }
    for kind, share in most.items():
        answers = Counter(item.answer for item in items(world / "questions" / "train") if item.kind == kind)
        assert answers.most_common(1)[0][1] <= share * answers.total(), (kind, answers)


def test_half_of_the_statements_of_each_kind_are_true(world: Path) -> None:
    for kind in ("both", "neither", "each", "one", "count", "same"):
        labels = Counter(item.answer for item in items(world / "statements" / "train") if item.kind == kind)
        assert 0.4 < labels[True] / labels.total() < 0.6, (kind, labels)


def test_the_words_of_training_do_not_tell_the_answers_of_the_test(world: Path) -> None:
    for part, chance in (("questions", 32), ("statements", 50), ("rounds", 100 / OPTIONS)):
        train, test = items(world / part / "train"), items(world / part / "test")
        for by_words in (False, True):
            rate = blind(train, test, by_words)["all"]
            error = 100 * (0.25 / len(test)) ** 0.5
            assert rate < chance + 4 * error, (part, by_words, rate)


def test_the_blind_baseline_finds_an_answer_that_words_give_away() -> None:
    told = [Item("colour", f"what colour is thing {n}?", (), ("red", "blue")[n % 2]) for n in range(10)]
    assert blind(told, told, by_words=False)["all"] == 50
    assert blind(told, told, by_words=True)["all"] == 100
    offered = [Item("rounds", "what", (f"no {n}", "true", f"nor {n}"), "true") for n in range(10)]
    assert blind(offered, offered, by_words=False)["rounds"] == 100


def test_rounds_have_equally_many_different_options_and_the_answer_anywhere_among_them(world: Path) -> None:
    rounds = [entry for record in found(world, "rounds") for entry in record["rounds"]]
    assert {len(set(entry["options"])) for entry in rounds} == {OPTIONS}
    assert {entry["answer_index"] for entry in rounds} == set(range(OPTIONS))
    lengths = [len(record["rounds"]) for record in found(world, "rounds")]
    assert ROUNDS[0] <= min(lengths) < max(lengths) <= ROUNDS[1]
    assert all(sum("relevance" in entry for entry in record["rounds"]) == 1 for record in found(world, "rounds"))


def test_options_are_answers_in_scenes_of_which_all_that_is_known_is_true() -> None:
    rng = random.Random(0)
    for number in range(50):
        said = draw_scene(random.Random(number), 3).description
        name = Thing(colour=said.things[0].colour)
        known = Facts(frozenset({(0, "colour"), (1, "shape"), (2, "texture")}), frozenset({1}), frozenset({(name, 0)}))
        others = [imagined(said, known, rng) for _ in range(20)]
        for other in others:
            assert other.background == said.background
            assert (other.things[0].colour, other.things[1].shape) == (said.things[0].colour, said.things[1].shape)
            assert other.things[2].texture == said.things[2].texture
            assert other.relations[1] == said.relations[1]
            assert [fits(name, thing) for thing in other.things] == [True, False, False]
            assert all(RESERVED[thing.colour] != thing.shape for thing in other.things)
        assert len({other.meaning for other in others}) > 15


# --- moving scenes -------------------------------------------------------------------------------------------------


def test_a_clip_shows_each_thing_at_its_place_in_its_turn_and_no_two_at_rest_together(world: Path) -> None:
    with tarfile.open(world / "clips" / "test" / "00000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    for name in (name for name in members if name.endswith(".mp4")):
        record = json.loads(members[name.replace(".mp4", ".json")])
        frames = frames_of(members[name], 24)
        assert frames[0].shape == (64, 64, 3)
        things, turns = record["scene"]["objects"], record["tracks"]
        assert len(things) == len(turns) in (2, 3)
        resting = [range(turn["first"] + 3 * (turn["first"] > 0), turn["last"]) for turn in turns]
        assert sum(len(set(frames)) for frames in resting) == len({n for frames in resting for n in frames})
        assert {n for turn in turns for n in range(turn["first"], turn["last"])} == set(range(24))
        for thing, rest in zip(things, resting, strict=True):
            x, y, r = (round(thing[key]) for key in ("x", "y", "radius"))
            places = [frame[y - r + 2 : y + r - 2, x - r + 2 : x + r - 2].astype(int) for frame in frames]
            while_there, before = places[rest[len(rest) // 2]], [p for n, p in enumerate(places) if n < rest[0] - 3]
            for other in before:
                assert abs(other - while_there).mean() > 15
            assert abs(places[rest[0]] - places[rest[-1]]).mean() < 5


# --- on disk -------------------------------------------------------------------------------------------------------


def test_val_and_test_show_the_contents_that_the_world_holds_out_and_training_none_of_them(world: Path) -> None:
    held_out = {
        split: {content(scene.to_json()) for scene in scenes} for split, scenes in held_out_scenes(3, WORLD).items()
    }
    for part, sizes in SIZES.items():
        for split in sizes:
            shown = {content(scene) for record in records(world / part / split) for scene in scenes_of(record)}
            if split == "train":
                assert not shown & set.union(*(held_out[other] for other in HELD_OUT))
            else:
                assert shown <= held_out[split]


def test_pictures_of_a_part_are_not_those_of_the_pairs(world: Path) -> None:
    places = {str(scene.to_json()["objects"]) for scene in held_out_scenes(3, WORLD)["test"]}
    assert not places & {str(record["scene"]["objects"]) for record in records(world / "questions" / "test")}


def test_every_word_of_every_part_is_one_piece_of_the_world_s_vocabulary(world: Path) -> None:
    tokenizer = train_vocabulary(
        [captions(draw_scene(random.Random(n), 2).description, random.Random(n), 1)[0] for n in range(50)]
    )
    texts = []
    for part in SIZES:
        for record in found(world, part):
            texts += [entry["question"] for entry in record.get("questions", []) + record.get("rounds", [])]
            texts += [answer for entry in record.get("questions", []) for answer in entry["answers"]]
            texts += [entry["sentence"] for entry in record.get("statements", [])]
            texts += [option for entry in record.get("rounds", []) for option in entry["options"]]
            texts += record.get("captions", [record.get("caption", "")])
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    assert words <= {*WORDS, "0", "1", "2", "3"}
    assert all(len(tokenizer.encode(word, add_special_tokens=False).ids) == 1 for word in words)


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_processes(world: Path, tmp_path: Path) -> None:
    for part in PARTS:
        again = write_part(tmp_path / part, part, 3, SIZES[part], WORLD, processes=1)
        paths = sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
        assert paths == sorted(path.relative_to(world / part) for path in (world / part).rglob("*") if path.is_file())
        assert all((again / path).read_bytes() == (world / part / path).read_bytes() for path in paths)


def test_a_drawn_part_is_kept_and_another_one_is_refused(world: Path) -> None:
    before = (world / "clips" / "world.json").stat().st_mtime_ns
    write_part(world / "clips", "clips", 3, SIZES["clips"], WORLD)
    assert (world / "clips" / "world.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="asked for"):
        write_part(world / "clips", "clips", 4, SIZES["clips"], WORLD)
    with pytest.raises(ValueError, match="asked for"):  # another world holds out other scenes
        write_part(world / "clips", "clips", 3, SIZES["clips"], {**WORLD, "val": 15})


def test_a_part_is_whole_or_not_at_all(tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "00000.tar").write_bytes(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        drawn(tmp_path / "part", {"part": "mine"}, half)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_what_is_no_part_or_has_no_scenes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'riddles' is no part of the world; there are questions, statements"):
        write_part(tmp_path / "riddles", "riddles", 0, {}, WORLD)
    with pytest.raises(ValueError, match="sizes of clips: a number for each of val, test is needed"):
        write_part(tmp_path / "clips", "clips", 0, {"train": 1, "val": 1, "test": 1}, WORLD)
    with pytest.raises(ValueError, match="the world's test has no scene of 3 things; make it larger"):
        write_part(tmp_path / "rounds", "rounds", 0, {"train": 0, "val": 0, "test": 1}, {**WORLD, "test": 2})


def test_the_datamodules_draw_world_and_part_and_stream_them(tmp_path: Path) -> None:
    folder, few = tmp_path / "world", {"train": 6, "web": 0, "val": 6, "test": 6, "reserved": 0}
    tokenizer = folder / "tokenizer.json"
    questions = ShapesQuestions(
        folder,
        world_seed=1,
        sizes=few,
        part_sizes={"train": 12, "val": 0, "test": 6},
        sources=[{"name": "questions", "shards": f"{folder}/questions/train/*.tar"}],
        test={"main": {"shards": f"{folder}/questions/test/*.tar"}},
        tokenizer=tokenizer,
        **STREAM,
    )
    questions.prepare_data()
    batch = next(iter(questions.train_dataloader()))
    assert batch.image.shape == (8, 3, 64, 64)
    assert batch.weights.tolist() == [1.0] * 8
    clips = ShapesClips(
        folder,
        world_seed=1,
        sizes=few,
        part_sizes={"val": 0, "test": 6},
        sources=[],
        test={"main": {"shards": f"{folder}/clips/test/*.tar", "captions": "first", "frames": 4}},
        tokenizer=tokenizer,
        **STREAM,
    )
    clips.prepare_data()
    (batch,) = clips.test_dataloader()[0]
    assert batch.image.shape == (6, 4, 3, 64, 64)
    assert write_world(folder, 1, few) == folder  # parts beside the pairs do not make it another world

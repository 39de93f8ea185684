"""Truth in the embedded world: what the web records holds by the grammar, and a caption is true exactly if all of it is so."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from blip.datamodules.shapes import _as_on_the_web
from blip.datamodules.shapes_language import KINDS, NOISE, VALUES, attribute_scores, caption, captions
from blip.datamodules.shapes_scenes import Description, Scene, draw_scene
from blip.datamodules.shapes_truth import DEVIATIONS, compare, described, truth


def scenes(count: int) -> list[Scene]:
    return [draw_scene(random.Random(f"truth/{number}"), number % 3 + 1) for number in range(count)]


def kind_of(scene: Description, text: str) -> str:
    return compare(scene, text).kind


def record(scene: Scene) -> dict:
    return {"captions": ["any"], "scene": scene.to_json()}


def test_a_record_gives_back_the_scene_that_it_was_made_of() -> None:
    for scene in scenes(60):
        assert described(record(scene)) == scene.description


def test_every_wording_of_a_scene_is_true_of_it_and_of_no_other() -> None:
    shown = scenes(60)
    for scene, other in pairwise(shown):
        for text in captions(scene.description, random.Random(0), 5):
            assert truth(record(scene), "synthetic", text) == (True, "true")
            false = truth(record(other), "synthetic", text)
            assert false is not None
            assert not false[0]


def test_what_the_web_records_agrees_with_what_is_read() -> None:
    rng = random.Random(4)
    kinds = set()
    for scene in scenes(400):
        told = _as_on_the_web(
            {"captions": captions(scene.description, rng, 5), "scene": scene.to_json()}, scene, rng, set()
        )
        (text,) = told["captions"]
        recorded = truth(told, "web", text)
        assert recorded == (told["truth"], told["kind"])
        assert (kind_of(scene.description, text) == "true") == told["truth"]
        if told["kind"] == "attribute":
            assert kind_of(scene.description, text) in KINDS
        kinds.add(told["kind"])
    assert kinds == {"true", *NOISE}


@pytest.mark.parametrize("kind", KINDS)
def test_one_wrong_slot_is_told_by_its_kind(kind: str) -> None:
    scene = next(scene for scene in scenes(9) if len(scene.description.things) == 2)
    things, ((a, relation, b),), background = scene.description
    wrong = {
        "relation": lambda value: scene.description._replace(relations=((a, value, b),)),
        "background": lambda value: scene.description._replace(background=value),
    }.get(kind, lambda value: scene.description._replace(things=(things[0]._replace(**{kind: value}), things[1])))
    right = {"relation": relation, "background": background}.get(kind) or getattr(things[0], kind)
    taken = {thing.colour for thing in things}  # each thing has a colour of its own
    value = next(value for value in VALUES[kind] if value != right and value not in taken)
    assert kind_of(scene.description, caption(wrong(value), random.Random(1))) == kind


def test_what_is_left_out_invented_or_said_twice_is_not_true() -> None:
    scene = next(scene for scene in scenes(9) if len(scene.description.things) == 2).description
    text = caption(scene, random.Random(2))
    first, second = scene.things
    told = f"a {first.size} {first.colour} {first.texture} {first.shape}"
    assert kind_of(scene, told) == "incomplete"
    assert kind_of(scene, f"{text} {told}") == "number of things"
    assert kind_of(scene, f"{second.shape}") == "incomplete"
    assert kind_of(scene, "IMG_2041.jpg") == kind_of(scene, "") == "nothing said"
    assert {kind_of(scene, caption(other.description, random.Random(3))) for other in scenes(80)} <= {
        *DEVIATIONS,
        "true",
    }


def test_a_text_is_true_exactly_if_its_attribute_f1_is_100() -> None:
    rng = random.Random(5)
    shown = scenes(60)
    for scene in shown:
        said = caption(rng.choice([scene, rng.choice(shown)]).description, rng)
        f1 = attribute_scores([[caption(scene.description, rng)]], [said])["attributes"]
        kind, agreeing, slots = compare(scene.description, said)
        assert (kind == "true") == (f1 == 100.0)
        assert 200 * agreeing / slots == pytest.approx(f1)


@pytest.mark.parametrize("scene", [None, 3, [], {}, {"objects": 1}, {"objects": [], "relations": [], "background": "x"},
                                   {"objects": [{"shape": "ring"}], "relations": [], "background": "white"}])  # fmt: skip
def test_records_of_other_worlds_have_no_truth(scene: object) -> None:
    assert truth({"captions": ["a dog"], "truth": True, "kind": "true", "scene": scene}, "web", "a dog") is None
    assert truth({"captions": ["a dog"]}, "web", "a dog") is None

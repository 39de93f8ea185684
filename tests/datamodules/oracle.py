"""Reads questions and statements about the embedded world anew, and answers them from the coordinates that KEY.json keeps."""

from __future__ import annotations

import re
from collections.abc import Sequence

SLOTS = {
    "shape": ["circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart"],
    "colour": ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"],
    "size": ["small", "big"],
    "texture": ["plain", "striped", "dotted"],
}
SAME = {"little": "small", "large": "big", "spotted": "dotted", "crosses": "cross", "over": "above", "under": "below"}
SAME |= {f"{shape}s": shape for shape in SLOTS["shape"] if shape != "cross"}
SIDE = r"(left of|right of|above|over|below|under)"
NUMBERS = {"three": 3, "four": 4, "five": 5}


def meant(word: str) -> str:
    return SAME.get(word, word)


def is_such(thing: dict, words: str) -> bool:
    """Whether a thing is all that the words say of it."""
    values = {meant(word) for word in words.split()} - {"a", "an", "the", "thing", "things"}
    assert values <= {value for slot in SLOTS.values() for value in slot}, words
    return all(value in thing.values() for value in values)


def lies(one: dict, side: str, other: dict) -> bool:
    """Whether `one` is on that side of `other`, and rather there than on another."""
    dx, dy = one["x"] - other["x"], one["y"] - other["y"]
    along, beside = {"left": (-dx, dy), "right": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[
        meant(side.split()[0])
    ]
    return along > abs(beside)


def the(scene: dict, words: str) -> dict:
    """The one thing that the words name."""
    named = re.fullmatch(rf"the thing {SIDE} (the .+)", words)
    if named:
        other = the(scene, named[2])
        found = [thing for thing in scene["objects"] if thing is not other and lies(thing, named[1], other)]
    else:
        found = [thing for thing in scene["objects"] if is_such(thing, words)]
    assert len(found) == 1, (words, scene)
    return found[0]


def answer(scene: dict, question: str) -> str:
    things = scene["objects"]
    asked = question.removesuffix("?")
    if found := re.fullmatch(r"is there (an? .+)", asked):
        return "yes" if any(is_such(thing, found[1]) for thing in things) else "no"
    if found := re.fullmatch(r"how many (.+) are there", asked):
        return str(sum(is_such(thing, found[1]) for thing in things))
    if asked == "what colour is the background":
        return scene["background"]
    if found := re.fullmatch(r"what (\w+) is (the .+)", asked):
        return the(scene, found[2])[found[1]]
    if found := re.fullmatch(rf"is (the .+) {SIDE} (the .+)", asked):
        return "yes" if lies(the(scene, found[1]), found[2], the(scene, found[3])) else "no"
    found = re.fullmatch(r"on which side of (the .+) is (the .+)", asked)
    assert found, question
    sides = [s for s in ("left", "right", "above", "below") if lies(the(scene, found[2]), s, the(scene, found[1]))]
    assert len(sides) == 1
    return sides[0]


def holds(scenes: Sequence[dict], sentence: str) -> bool:
    """Whether a statement about a left and a right picture is true."""
    counts = [len(scene["objects"]) for scene in scenes]
    if found := re.fullmatch(
        r"the (left|right) picture has (more|fewer|as many) things (?:than|as) the \w+ picture", sentence
    ):
        here, there = counts if found[1] == "left" else counts[::-1]
        return {"more": here > there, "fewer": here < there, "as many": here == there}[found[2]]
    if found := re.fullmatch(r"there are exactly (\w+) things in the two pictures", sentence):
        return sum(counts) == NUMBERS[found[1]]
    if "background" in sentence:
        return (scenes[0]["background"] == scenes[1]["background"]) == ("same" in sentence)
    if found := re.fullmatch(r"(the .+) has the same (\w+) in both pictures", sentence):
        return len({the(scene, found[1])[found[2]] for scene in scenes}) == 1
    if found := re.fullmatch(r"the left picture has (.+) and the right picture has (.+)", sentence):
        return all(
            any(is_such(t, words) for t in scene["objects"])
            for scene, words in zip(scenes, found.groups(), strict=True)
        )
    for before, after, wanted in (
        ("neither picture has ", "", 0),
        ("both pictures have ", "", 2),
        ("there is ", " in both pictures", 2),
        ("there is ", " in each picture", 2),
        ("exactly one picture has ", "", 1),
        ("only one of the two pictures has ", "", 1),
        ("there is ", " in exactly one of the pictures", 1),
    ):
        if sentence.startswith(before) and sentence.endswith(after):
            words = sentence.removeprefix(before).removesuffix(after) if after else sentence.removeprefix(before)
            return sum(any(is_such(thing, words) for thing in scene["objects"]) for scene in scenes) == wanted
    raise AssertionError(sentence)


def meaning(text: str) -> str:
    """An answer of a dialogue without what only its wording adds."""
    text = text.removeprefix("it is ")
    if found := re.fullmatch(r"one is (.+) and the other is (.+)", text):
        text = f"{found[1]} and {found[2]}"
    return text.removeprefix("an ").removeprefix("a ").replace(" of the ", " the ")


def reply(scene: dict, question: str, topic: str | None) -> tuple[str, str | None]:
    """(meaning of the answer to a question of a dialogue, what "it" is from then on)."""
    asked = question.removesuffix("?")
    if topic:
        asked = re.sub(r"\bit\b", topic, asked)
    if found := re.fullmatch(r"what size and texture are (the .+) and (the .+)", asked):
        return " and ".join(
            f"{thing['size']} {thing['texture']}" for thing in (the(scene, n) for n in found.groups())
        ), None
    if found := re.fullmatch(r"where is (the .+)", asked):
        number = scene["objects"].index(the(scene, found[1]))
        other = scene["objects"][1]
        assert number != 1
        (side,) = (s for s in ("left", "right", "above", "below") if lies(scene["objects"][number], s, other))
        return f"{side} the {other['colour']} thing", found[1]
    if found := re.fullmatch(r"what does (the .+) look like", asked):
        thing = the(scene, found[1])
        return " ".join(thing[slot] for slot in ("size", "colour", "texture", "shape")), found[1]
    found = re.fullmatch(r"what (\w+) and (\w+) is (the .+)", asked)
    assert found, question
    thing = the(scene, found[3])
    joint = " " if found[2] == "shape" else " and "
    return joint.join((thing[found[1]], thing[found[2]])), found[3]

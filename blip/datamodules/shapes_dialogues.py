"""Dialogues about scenes of the embedded world: a caption that says little, then questions that find out more.

The options of a round are the answers in scenes of which all that was said so far is true as well, the picture's own among
them, drawn alike. So neither the words of an answer nor the dialogue before it tell which one is right: it takes the
picture. In one round of each dialogue every option comes in two wordings, and the answer's twin is as relevant as itself.
"""

import random
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

from blip.datamodules.shapes_language import spoken
from blip.datamodules.shapes_questions import directly, fits, is_reserved, named, said_slots, with_article
from blip.datamodules.shapes_scenes import (
    COLOURS,
    INVERSE,
    RELATIONS,
    RESERVED,
    SHAPES,
    SIZES,
    TEXTURES,
    Description,
    Scene,
    Thing,
)

OPTIONS = 12
THINGS = 3  # of a scene: fewer hold too little to ask for
NAMING = ("colour", "shape")  # slots that a thing may be called by
ROUNDS = (4, 6)  # at least and at most
_DRAWS = 6 * OPTIONS  # of other scenes, until a question is given up that has too few answers
_TRIES = 200


class Facts(NamedTuple):
    """What was said of a scene: slots of things by their number; links of the chain; patterns that one thing alone fits."""

    slots: frozenset[tuple[int, str]] = frozenset()
    links: frozenset[int] = frozenset()
    names: frozenset[tuple[Thing, int]] = frozenset()

    def joined(self, other: "Facts") -> "Facts":
        return Facts(self.slots | other.slots, self.links | other.links, self.names | other.names)


class Ask(NamedTuple):
    """A question; `things` and `slots` say what it asks for, `where` that it asks for a place; asking says `told`."""

    text: str
    things: tuple[int, ...]
    slots: tuple[str, ...]
    told: Facts

    def answer(self, said: Description) -> tuple[str, ...]:
        """The true answer as values and small words: equal for two scenes exactly if it means the same."""
        if not self.slots:
            (end,) = self.things
            relation = said.relations[0][1] if end == 0 else INVERSE[said.relations[-1][1]]
            return (relation, "the", said.things[1].colour or "", "thing")
        values = [[getattr(said.things[number], slot) for slot in self.slots] for number in self.things]
        if len(values) == 2:
            return (*values[0], "and", *values[1])
        return ("a", *values[0]) if "shape" in self.slots else (*values[0][:-1], "and", values[0][-1])

    def answered(self) -> Facts:
        """What is known once it is answered."""
        if not self.slots:
            (end,) = self.things
            return self.told.joined(Facts(frozenset({(1, "colour")}), frozenset({0 if end == 0 else 1})))
        return self.told.joined(Facts(frozenset((number, slot) for number in self.things for slot in self.slots)))


def dialogue(scene: Scene, rng: random.Random) -> dict:
    """Caption and rounds about a scene of three things: {"caption", "rounds": [{"question", "answer", "options", ...}]}."""
    for _ in range(_TRIES):
        found = _dialogue(scene, rng)
        if len(found["rounds"]) >= ROUNDS[0]:
            return found
    raise AssertionError(f"{scene}: no dialogue of {ROUNDS[0]} rounds was found")


def _dialogue(scene: Scene, rng: random.Random) -> dict:
    said = scene.description
    first = [(n, Thing(**{slot: getattr(thing, slot)})) for n, thing in enumerate(said.things) for slot in NAMING]
    number, pattern = rng.choice([(n, p) for n, p in first if sum(fits(p, thing) for thing in said.things) == 1])
    (slot,) = said_slots(pattern)
    known = Facts(frozenset({(number, slot)}), frozenset(), frozenset({(pattern, number)}))
    about = "is " + (pattern.colour or f"a {pattern.shape}")
    rounds: list[dict] = []
    topic: int | None = None
    twins = rng.randrange(ROUNDS[0])  # the round of two wordings
    while len(rounds) < ROUNDS[1]:
        for ask in _questions(scene, known, topic, rng):
            options = _options(ask, said, known.joined(ask.told), len(rounds) == twins, rng)
            if options:
                rounds.append({"question": ask.text, **options})
                known, topic = known.joined(ask.answered()), ask.things[0] if len(ask.things) == 1 else None
                break
        else:
            break
    return {"caption": f"three things on a {said.background} background and one {about}", "rounds": rounds}


def _questions(scene: Scene, known: Facts, topic: int | None, rng: random.Random) -> list[Ask]:
    """All that may be asked, in an order that is drawn."""
    asks: list[Ask] = []
    for number in range(len(scene.places)):
        open_slots = [slot for slot in _SAID if (number, slot) not in known.slots]
        for name, told in _names(scene, known, number, topic, rng):
            for slots in _PAIRS:
                if set(slots) <= set(open_slots):
                    asks.append(Ask(f"what {' and '.join(slots)} is {name}?", (number,), slots, told))
            if len(open_slots) > 2:
                asks.append(Ask(f"what does {name} look like?", (number,), tuple(open_slots), told))
            link = 0 if number == 0 else 1
            if number != 1 and link not in known.links | told.links and (1, "colour") not in known.slots:
                asks.append(Ask(f"where is {name}?", (number,), (), told))
    for one, other in combinations(range(len(scene.places)), 2):
        if not {(n, slot) for n in (one, other) for slot in ("size", "texture")} & known.slots:
            for (name, told), (second, more) in zip(
                _names(scene, known, one, None, rng), _names(scene, known, other, None, rng), strict=False
            ):
                text = f"what size and texture are {name} and {second}?"
                asks.append(Ask(text, (one, other), ("size", "texture"), told.joined(more)))
    return sorted(asks, key=lambda ask: len(ask.slots) + 2 * rng.random())  # rather little at a time


_PAIRS = ("size", "colour"), ("size", "shape"), ("colour", "texture"), ("colour", "shape"), ("texture", "shape")
_SHAPES = {colour: [shape for shape in SHAPES if shape != RESERVED[colour]] for colour in COLOURS}
_SAID = ("size", "colour", "texture", "shape")  # slots in the order of words


def _names(
    scene: Scene, known: Facts, number: int, topic: int | None, rng: random.Random
) -> Iterator[tuple[str, Facts]]:
    """What a thing can be called, and what calling it so says."""
    if number == topic:
        yield "it", Facts()
    for own, facts in _own_names(scene, known, number, rng):
        yield own, facts
    for other in range(len(scene.places)):
        for relation in RELATIONS:
            if abs(other - number) == 1 and directly(scene, other, relation) == number:
                for name, facts in _own_names(scene, known, other, rng):
                    beside = rng.choice(spoken(relation))
                    yield f"the thing {beside} {name}", facts.joined(Facts(links=frozenset({min(number, other)})))


def _own_names(scene: Scene, known: Facts, number: int, rng: random.Random) -> Iterator[tuple[str, Facts]]:
    things = scene.description.things
    slots = [slot for slot in NAMING if (number, slot) in known.slots]
    pattern = Thing(**{slot: getattr(things[number], slot) for slot in slots})
    if slots and sum(fits(pattern, thing) for thing in things) == 1:
        yield f"the {named(pattern, rng)}", Facts(names=frozenset({(pattern, number)}))


def _options(ask: Ask, said: Description, known: Facts, twins: bool, rng: random.Random) -> dict | None:
    """Answer, options, its index and their relevance; None where too few answers are possible."""
    meanings = {ask.answer(said): None}
    for _ in range(_DRAWS):
        meanings[ask.answer(imagined(said, known, rng))] = None
        if len(meanings) == OPTIONS:
            break
    else:
        return None
    true, *others = meanings
    if twins:
        worded = [(meaning, long) for meaning in (true, *others[: OPTIONS // 2 - 1]) for long in (False, True)]
    else:
        worded = [(meaning, rng.random() < 0.5) for meaning in meanings]
    (answer,) = rng.sample([option for option in worded if option[0] == true], 1)
    rng.shuffle(worded)
    return {
        "answer": _in_words(*answer),
        "options": [_in_words(*option) for option in worded],
        "answer_index": worded.index(answer),
    } | ({"relevance": [float(meaning == true) for meaning, _ in worded]} if twins else {})


def _in_words(meaning: tuple[str, ...], long: bool) -> str:
    text = with_article(" ".join(meaning[1:])) if meaning[0] == "a" else " ".join(meaning)
    text = text.replace("left the", "left of the").replace("right the", "right of the")
    if long and len(meaning) == 5:
        one, other = text.split(" and ")
        return f"one is {one} and the other is {other}"
    return f"it is {text}" if long else text


def imagined(said: Description, known: Facts, rng: random.Random) -> Description:
    """Another scene, drawn as scenes are, of which all that is known of this one is true."""
    taken = {thing.colour for n, thing in enumerate(said.things) if (n, "colour") in known.slots}
    free = [colour for colour in COLOURS if colour not in taken]
    while True:
        colours = rng.sample(free, len(said.things) - len(taken))
        things = []
        for n, thing in enumerate(said.things):
            colour = thing.colour if (n, "colour") in known.slots else colours.pop()
            drawn = Thing(rng.choice(_SHAPES[colour or ""]), colour, rng.choice(SIZES), rng.choice(TEXTURES))
            told = {slot: getattr(thing, slot) for slot in ("shape", "size", "texture") if (n, slot) in known.slots}
            things.append(drawn._replace(**told))
        relations = tuple((a, r if a in known.links else rng.choice(RELATIONS), b) for a, r, b in said.relations)
        if (
            relations[0][1] != INVERSE[relations[1][1]]
            and not any(is_reserved(thing) for thing in things)
            and all(sum(fits(name, thing) for thing in things) == 1 for name, _ in known.names)
        ):
            return Description(tuple(things), relations, said.background)

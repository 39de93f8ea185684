"""Questions about scenes of the embedded world, with answers that hold of the scene whatever the words.

Seven kinds: whether there is such a thing, how many, which colour, shape, size and texture, and where things stand to
each other. `ask` gives out answers evenly among questions of one wording, so that the words do not tell the answer.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

from blip.datamodules.shapes_language import SLOTS, VALUES, spoken
from blip.datamodules.shapes_scenes import INVERSE, RELATIONS, RESERVED, SHAPES, Scene, Thing

KINDS = ("exists", "count", "colour", "shape", "size", "texture", "relation")
ANSWER_TYPES = {"exists": "yes/no", "count": "number"}  # else "other"; VQA v2's names
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}


class Question(NamedTuple):
    """One question with its true answer.

    group: questions among which an answer tells nothing; words: what it asks for, in whatever wording;
    answers: all that could be true of some scene.
    """

    kind: str
    group: Hashable
    words: Hashable
    text: str
    answer: str
    answers: tuple[str, ...]


class Balance:
    """Which answers are due, so that none is more frequent than another among the same words, nor in a group."""

    def __init__(self) -> None:
        self.counts: defaultdict[Hashable, Counter[Hashable]] = defaultdict(Counter)

    def takes(self, group: Hashable, words: Hashable, answer: Hashable, shares: Mapping[Any, int]) -> bool:
        """Whether `answer`, one of `shares` and as frequent as these say, is due; counted if so."""

        def due(key: Hashable, slack: int) -> bool:
            least = min(self.counts[key][other] / share for other, share in shares.items())
            return self.counts[key][answer] / shares[answer] < least + slack

        keys = ("group", group), ("words", group, words)
        if not (due(keys[0], 1) and due(keys[1], 2)):
            return False
        for key in keys:
            self.counts[key][answer] += 1
        return True


def ask(scene: Scene, rng: random.Random, balance: Balance, count: int) -> list[Question]:
    """At most `count` questions of different kinds about a scene, whose answers are due by `balance`."""
    asked: list[Question] = []
    for kind in rng.sample(KINDS, len(KINDS)):
        candidates = list(_CANDIDATES[kind](scene, rng))
        rng.shuffle(candidates)
        for question in candidates:
            if balance.takes(
                (kind, question.group), question.words, question.answer, dict.fromkeys(question.answers, 1)
            ):
                asked.append(question)
                break
        if len(asked) == count:
            break
    return asked


# --- things as they are named --------------------------------------------------------------------------------------


def fits(pattern: Thing, thing: Thing) -> bool:
    """Whether a thing is all that the pattern says; None says nothing."""
    return all(wanted in (None, value) for wanted, value in zip(pattern, thing, strict=True))


def named(pattern: Thing, rng: random.Random, many: bool = False) -> str:
    """The words for such a thing: "little red thing", for many "striped circles"."""
    adjectives = [rng.choice(spoken(value)) for value in (pattern.size, pattern.colour, pattern.texture) if value]
    noun = pattern.shape or "thing"
    return " ".join([*adjectives, (PLURALS.get(noun) or "things") if many else noun])


def a_named(pattern: Thing, rng: random.Random) -> str:
    return with_article(named(pattern, rng))


def with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def parts(thing: Thing, most: int = 2, without: str | None = None) -> Iterator[Thing]:
    """All patterns of one to `most` slots of a thing."""
    slots = [slot for slot in said_slots(thing) if slot != without]
    for size in range(1, most + 1):
        for chosen in combinations(slots, size):
            yield Thing(**{slot: getattr(thing, slot) for slot in chosen})


def said_slots(pattern: Thing) -> tuple[str, ...]:
    return tuple(slot for slot in SLOTS if getattr(pattern, slot) is not None)


def is_reserved(pattern: Thing) -> bool:
    return pattern.colour is not None and RESERVED[pattern.colour] == pattern.shape


def directly(scene: Scene, one: int, relation: str) -> int | None:
    """The only thing that can be meant by "the thing left of" thing `one`: none beside it is anywhere near that side."""
    said = {(a, b): r for a, r, b in scene.description.relations}
    said |= {(b, a): INVERSE[r] for (a, b), r in said.items()}
    found = [other for other in range(len(scene.places)) if other != one and _on_side(scene, one, other, relation)]
    return found[0] if len(found) == 1 and said.get((found[0], one)) == relation else None


def _on_side(scene: Scene, one: int, other: int, relation: str) -> bool:
    (x, y, _), (u, v, _) = scene.places[one], scene.places[other]
    along = {"left": x - u, "right": u - x, "above": y - v, "below": v - y}[relation]
    beside = abs(v - y) if relation in ("left", "right") else abs(u - x)
    return along > 0.7 * beside


# --- kinds ---------------------------------------------------------------------------------------------------------


def _exists(scene: Scene, rng: random.Random) -> Iterator[Question]:
    things = scene.description.things
    for thing in things:
        for pattern in parts(thing):
            slot = rng.choice(said_slots(pattern))  # and one that differs in a single slot
            other = pattern._replace(**{slot: rng.choice([v for v in VALUES[slot] if v != getattr(pattern, slot)])})
            for asked in (pattern, other):
                if not is_reserved(asked):
                    text = f"is there {a_named(asked, rng)}?"
                    yes = any(fits(asked, thing) for thing in things)
                    yield Question("exists", said_slots(asked), asked, text, "yes" if yes else "no", ("yes", "no"))


def _count(scene: Scene, rng: random.Random) -> Iterator[Question]:
    things = scene.description.things
    yield Question("count", "all", "all", "how many things are there?", str(len(things)), ("1", "2", "3"))
    for slot in ("shape", "size", "texture"):
        for value in VALUES[slot]:
            pattern = Thing(**{slot: value})
            number = sum(fits(pattern, thing) for thing in things)
            if number < 3:  # three of a shape are too rare to be even
                text = f"how many {named(pattern, rng, many=True)} are there?"
                yield Question("count", slot, pattern, text, str(number), ("0", "1", "2"))


def _slot(slot: str, scene: Scene, rng: random.Random) -> Iterator[Question]:
    things = scene.description.things
    for thing in things:
        for pattern in parts(thing, without=slot):
            if sum(fits(pattern, other) for other in things) == 1:
                text = f"what {slot} is the {named(pattern, rng)}?"
                answer = getattr(thing, slot)
                yield Question(slot, said_slots(pattern), pattern, text, answer, _possible(slot, pattern))
    if slot == "colour" and (ground := scene.description.background):
        yield Question(slot, "background", "background", "what colour is the background?", ground, VALUES["background"])


def _possible(slot: str, pattern: Thing) -> tuple[str, ...]:
    return tuple(value for value in VALUES[slot] if not is_reserved(pattern._replace(**{slot: value})))


def _relation(scene: Scene, rng: random.Random) -> Iterator[Question]:
    things = scene.description.things
    stated = [*scene.description.relations]
    stated += [(b, INVERSE[relation], a) for a, relation, b in stated]
    for a, relation, b in stated:
        one, other = (rng.choice(list(_unique(scene, thing))) for thing in (a, b))
        who, whom = named(one, rng), named(other, rng)
        for said, answer in ((relation, "yes"), (INVERSE[relation], "no")):
            text = f"is the {who} {rng.choice(spoken(said))} the {whom}?"
            yield Question("relation", "is", said, text, answer, ("yes", "no"))
        yield Question("relation", "side", "side", f"on which side of the {whom} is the {who}?", relation, RELATIONS)
        if directly(scene, b, relation) == a:
            for slot in ("colour", "shape"):
                text = f"what {slot} is the thing {rng.choice(spoken(relation))} the {whom}?"
                possible = tuple(value for value in VALUES[slot] if value != other.colour)
                yield Question("relation", slot, (slot, other), text, getattr(things[a], slot), possible)


def _unique(scene: Scene, number: int) -> Iterator[Thing]:
    """Patterns of colour, of shape or of both that only this thing of the scene fits."""
    things = scene.description.things
    for pattern in parts(things[number]._replace(size=None, texture=None)):
        if sum(fits(pattern, thing) for thing in things) == 1:
            yield pattern


_CANDIDATES: dict[str, Callable[[Scene, random.Random], Iterator[Question]]] = {
    "exists": _exists,
    "count": _count,
    "colour": partial(_slot, "colour"),
    "shape": partial(_slot, "shape"),
    "size": partial(_slot, "size"),
    "texture": partial(_slot, "texture"),
    "relation": _relation,
}

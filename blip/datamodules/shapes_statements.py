"""Statements about two pictures of the embedded world, true or false, half of them each.

Six kinds: whether both, neither or exactly one of the pictures have such a thing, whether each has its own, how many things
there are, and whether the background or a thing of both is the same. What one of the pictures shows is, as far as the kind
allows, as frequent with true as with false statements, so that it takes both.
"""

import random
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

from blip.datamodules.shapes_language import SLOTS, VALUES
from blip.datamodules.shapes_questions import Balance, a_named, fits, is_reserved, named, parts, said_slots
from blip.datamodules.shapes_scenes import Description, Thing

USUAL = ("both", "both", "each")  # of two pictures: what a small model learns in minutes
RARE = ("neither", "one", "count", "same")  # one of these: what takes it longer
_NUMBERS = {3: "three", 4: "four", 5: "five"}
_BOTH = ("both pictures have {}", "there is {} in both pictures", "there is {} in each picture")
_ONE = (
    "exactly one picture has {}",
    "only one of the two pictures has {}",
    "there is {} in exactly one of the pictures",
)
# shares of (such a thing is in the left picture, in the right one), half of them true
_HALF_BOTH = {(True, True): 2, (True, False): 1, (False, True): 1}
_HALF_NEITHER = {(False, False): 2, (True, False): 1, (False, True): 1}
_ALL_EVEN = dict.fromkeys([(True, True), (True, False), (False, True), (False, False)], 1)


class Statement(NamedTuple):
    """One statement and whether it holds.

    group: statements among which the cases are even; words: what it says, in whatever wording; case: what of the two
    pictures makes it true or false; cases: all there are, with their shares.
    """

    kind: str
    group: Hashable
    words: Hashable
    text: str
    truth: bool
    case: Hashable
    cases: Mapping[Any, int]


def state(left: Description, right: Description, rng: random.Random, balance: Balance) -> list[Statement]:
    """Statements about two pictures, at most one for each of USUAL and one of RARE kinds, whose cases are due by `balance`."""
    stated: list[Statement] = []
    for kind in (*USUAL, rng.choice(RARE)):
        candidates = list(_CANDIDATES[kind](left, right, rng))
        rng.shuffle(candidates)
        told = {said.words for said in stated}
        for said in candidates:
            if said.words not in told and balance.takes((kind, said.group), said.words, said.case, said.cases):
                stated.append(said)
                break
    return stated


def _even(kind: str, group: Hashable, words: Hashable, text: str, truth: bool) -> Statement:
    return Statement(kind, group, words, text, truth, truth, {True: 1, False: 1})


def _count(left: Description, right: Description, rng: random.Random) -> Iterator[Statement]:
    here, there = len(left.things), len(right.things)
    for one, other, more in (("left", "right", here - there), ("right", "left", there - here)):
        for words, truth in (("more", more > 0), ("fewer", more < 0), ("as many", more == 0)):
            joint = "as" if words == "as many" else "than"
            text = f"the {one} picture has {words} things {joint} the {other} picture"
            yield _even("count", words, one, text, truth)
    for total, word in _NUMBERS.items():
        if 1 <= total - here <= 3 and 1 <= total - there <= 3:  # neither picture alone makes it false
            text = f"there are exactly {word} things in the two pictures"
            yield _even("count", ("total", here), total, text, here + there == total)


def _patterns(left: Description, right: Description, rng: random.Random) -> Iterator[Thing]:
    """What could be in a picture: each value, and pairs of slots as things of the two have them or nearly so."""
    for slot in SLOTS:
        for value in VALUES[slot]:
            yield Thing(**{slot: value})
    for thing in (*left.things, *right.things):
        for pattern in parts(thing):
            if len(said_slots(pattern)) == 2:
                slot = rng.choice(said_slots(pattern))
                other = rng.choice([value for value in VALUES[slot] if value != getattr(pattern, slot)])
                yield from (p for p in (pattern, pattern._replace(**{slot: other})) if not is_reserved(p))


def _both(left: Description, right: Description, rng: random.Random) -> Iterator[Statement]:
    for pattern, shown in _shown(left, right, rng):
        if any(shown):
            text = rng.choice(_BOTH).format(a_named(pattern, rng))
            yield Statement("both", said_slots(pattern), pattern, text, all(shown), shown, _HALF_BOTH)


def _neither(left: Description, right: Description, rng: random.Random) -> Iterator[Statement]:
    for pattern, shown in _shown(left, right, rng):
        if not all(shown):
            text = f"neither picture has {a_named(pattern, rng)}"
            yield Statement("neither", said_slots(pattern), pattern, text, not any(shown), shown, _HALF_NEITHER)


def _each(left: Description, right: Description, rng: random.Random) -> Iterator[Statement]:
    patterns = list(_shown(left, right, rng))
    for (one, (here, _)), (other, (_, there)) in zip(patterns, rng.sample(patterns, len(patterns)), strict=True):
        if (here or there) and one != other:
            names = a_named(one, rng), a_named(other, rng)
            text = "the left picture has {} and the right picture has {}".format(*names)
            words = frozenset((one, other))
            yield Statement("each", "each", words, text, here and there, (here, there), _HALF_BOTH)


def _one(left: Description, right: Description, rng: random.Random) -> Iterator[Statement]:
    for pattern, shown in _shown(left, right, rng):
        text = rng.choice(_ONE).format(a_named(pattern, rng))
        yield Statement("one", said_slots(pattern), pattern, text, shown[0] != shown[1], shown, _ALL_EVEN)


def _shown(left: Description, right: Description, rng: random.Random) -> Iterator[tuple[Thing, tuple[bool, bool]]]:
    """Patterns, and whether the left and the right picture show such a thing."""
    for pattern in _patterns(left, right, rng):
        here, there = (any(fits(pattern, thing) for thing in said.things) for said in (left, right))
        yield pattern, (here, there)


def _same(left: Description, right: Description, rng: random.Random) -> Iterator[Statement]:
    same = left.background == right.background
    yield _even("same", "same", "same", "the background is the same in both pictures", same)
    yield _even("same", "different", "different", "the two pictures have a different background", not same)
    for slot in ("colour", "shape"):
        for value in VALUES[slot]:
            pattern = Thing(**{slot: value})
            here, there = ([thing for thing in said.things if fits(pattern, thing)] for said in (left, right))
            if len(here) == len(there) == 1:
                for other in ("colour", "shape", "texture"):  # big is big among the things of a picture
                    if other != slot:
                        same = getattr(here[0], other) == getattr(there[0], other)
                        text = f"the {named(pattern, rng)} has the same {other} in both pictures"
                        yield _even("same", (slot, other), pattern, text, same)


_CANDIDATES: dict[str, Callable[[Description, Description, random.Random], Iterator[Statement]]] = {
    "both": _both,
    "neither": _neither,
    "each": _each,
    "one": _one,
    "count": _count,
    "same": _same,
}

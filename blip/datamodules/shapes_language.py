"""Language of the embedded world: captions, what the web makes of them, and how a caption is read and scored.

A caption is a complete description: shape, colour, size and texture of each thing, the relations of its chain, the
background. Wording varies (order of the things, synonyms, place of the background), its meaning does not: `parse`
reads back exactly what was said. `caption_slots` reads whatever a model says, as far as it can be read.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import permutations

from blip.datamodules.shapes_scenes import (
    BACKGROUNDS,
    COLOURS,
    INVERSE,
    RELATIONS,
    RESERVED,
    SHAPES,
    SIZES,
    TEXTURES,
    Description,
    Thing,
)

SYNONYMS = {
    "small": ("small", "little"),
    "big": ("big", "large"),
    "dotted": ("dotted", "spotted"),
    "left": ("left of",),
    "right": ("right of",),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
LONG = {"left": "to the left of", "right": "to the right of"}  # where a caption has room for it
SLOTS = ("shape", "colour", "size", "texture")
KINDS = (*SLOTS, "relation", "background")
VALUES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": SIZES,
    "texture": TEXTURES,
    "relation": RELATIONS,
    "background": tuple(BACKGROUNDS),
}


def spoken(value: str) -> tuple[str, ...]:
    """The words for a value, its own the first."""
    return SYNONYMS.get(value, (value,))


_READ = {
    phrase.split()[0]: (kind, value) for kind, values in VALUES.items() for value in values for phrase in spoken(value)
}
CAPTION_WORDS = {*_READ, "a", "on", "background", "to", "the", "of", "which", "is", "and"}
"""Every word that a caption of the world can have."""
_OTHER_WORDS = """
    are there how many what where does look like it one other another thing things colour colours shape size texture
    yes no nothing not true false circles squares triangles stars crosses diamonds rings hearts
    picture pictures both two three four five six more fewer than has have same different exactly only neither each all in
    an at least most with as that them side between middle moves moving appears up down first then last
"""
WORDS = tuple(sorted({*CAPTION_WORDS, *_OTHER_WORDS.split()}))
"""The words of captions, questions, answers, statements and dialogues: the vocabulary of the world has each whole, so
that a model which was pre-trained on captions has a place for all that it will be asked."""


def _grammar() -> re.Pattern[str]:
    def one_of(kind: str) -> str:
        phrases = [phrase for value in VALUES[kind] for phrase in spoken(value)]
        return "(?:" + "|".join(phrases + list(LONG.values()) * (kind == "relation")) + ")"

    size, colour, texture, shape, relation = (
        one_of(kind) for kind in ("size", "colour", "texture", "shape", "relation")
    )
    thing = f"a {size} (?:{colour} {texture}|{texture} {colour}) {shape}"
    chain = f"{thing}(?: {relation} {thing}(?: (?:which is|and) {relation} {thing})?)?"
    ground = f"on (?:a {one_of('background')} background|{one_of('background')})"
    return re.compile(f"(?:{ground} {chain}|{chain} {ground})")


_GRAMMAR = _grammar()


def caption(said: Description, rng: random.Random) -> str:
    """One complete description of one to three things, in one of its wordings; at most 25 words, no punctuation."""
    phrases = [_noun_phrase(thing, rng) for thing in said.things]
    order = list(range(len(phrases)))
    if rng.random() < 0.5:
        order.reverse()
    stated = {(a, b): relation for a, relation, b in said.relations}
    stated |= {(b, a): INVERSE[relation] for (a, b), relation in stated.items()}

    def relate(a: int, b: int) -> str:
        relation = stated[a, b]
        if len(order) < 3 and relation in LONG and rng.random() < 0.3:
            return LONG[relation]
        return rng.choice(spoken(relation))

    if len(order) == 3 and rng.random() < 0.5:  # from the middle: B r A and r C
        a, b, c = order
        text = f"{phrases[b]} {relate(b, a)} {phrases[a]} and {relate(b, c)} {phrases[c]}"
    elif len(order) == 3:  # along the chain: A r B which is r C
        a, b, c = order
        text = f"{phrases[a]} {relate(a, b)} {phrases[b]} which is {relate(b, c)} {phrases[c]}"
    elif len(order) == 2:
        a, b = order
        text = f"{phrases[a]} {relate(a, b)} {phrases[b]}"
    else:
        text = phrases[0]
    ground = f"on {said.background}" if rng.random() < 0.3 else f"on a {said.background} background"
    return f"{ground} {text}" if rng.random() < 0.3 else f"{text} {ground}"


def captions(said: Description, rng: random.Random, count: int) -> list[str]:
    """`count` different wordings of one description (the poorest description has 12)."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[caption(said, rng)] = None
    return list(found)


def _noun_phrase(thing: Thing, rng: random.Random) -> str:
    shape, colour, size, texture = (rng.choice(spoken(value or "")) for value in thing)
    if rng.random() < 0.25:
        return f"a {size} {texture} {colour} {shape}"
    return f"a {size} {colour} {texture} {shape}"


# --- the web -------------------------------------------------------------------------------------------------------

NOISE = {"other": 0.35, "attribute": 0.30, "file": 0.12, "advert": 0.13, "fragment": 0.10}
_FILES = (
    "IMG_{n}.jpg", "DSC0{n}.JPG", "{shape}-{colour}-{n}.png", "{colour}_{shape}_final_v2", "screenshot {n}.png",
    "{shape}-clipart-{n}", "untitled-{n}", "scan00{n}.tif", "thumb_{shape}_{n}x{n}.jpeg", "{background}-bg-{n}.jpg",
)  # fmt: skip
_ADVERTS = (
    "{colour} {shape} wall sticker, free shipping", "buy cheap {shape} poster 24x36 online", "{shape} stock vector {n}",
    "best price {colour} {shape} wallpaper - 50% off", "Royalty Free {shape} clip art", "{shape} t-shirt | sale ends soon",
    "download {background} background HD wallpaper", "new {colour} phone case with {shape} print (pack of 2)",
    "shop {shape} gifts & decor", "custom {colour} {shape} invitation card by designer {n}",
)  # fmt: skip


def noise(kind: str, said: Description, other: Description, rng: random.Random, excluded: AbstractSet[tuple]) -> str:
    """What the web writes beside a picture that `said` describes; no description in `excluded`, no reserved pair."""
    if kind == "other":
        return caption(other, rng)
    if kind == "attribute":
        return caption(wrong_attribute(said, rng, excluded), rng)
    if kind == "fragment":
        words = caption(said, rng).split()
        length = rng.randint(2, 4)
        start = rng.randrange(len(words) - length + 1)
        return " ".join(words[start : start + length])
    if kind not in ("file", "advert"):
        raise ValueError(f"noise of kind {kind!r} is unknown; there are {', '.join(NOISE)}")
    thing = rng.choice(said.things)
    template = rng.choice(_FILES if kind == "file" else _ADVERTS)
    return template.format(**thing._asdict(), background=said.background, n=rng.randint(100, 9999))


def wrong_attribute(said: Description, rng: random.Random, excluded: AbstractSet[tuple] = frozenset()) -> Description:
    """The description with one slot changed, still one that could stand in the training set."""
    while True:
        kind = rng.choice(KINDS if said.relations else [kind for kind in KINDS if kind != "relation"])
        things, relations, background = list(said.things), list(said.relations), said.background
        if kind == "relation":
            at = rng.randrange(len(relations))
            a, relation, b = relations[at]
            relations[at] = (a, rng.choice([value for value in RELATIONS if value != relation]), b)
        elif kind == "background":
            background = rng.choice([value for value in BACKGROUNDS if value != background])
        else:
            at = rng.randrange(len(things))
            wrong = rng.choice([value for value in VALUES[kind] if value != getattr(things[at], kind)])
            things[at] = things[at]._replace(**{kind: wrong})
        changed = Description(tuple(things), tuple(relations), background)
        one_colour_each = len({thing.colour for thing in things}) == len(things)
        no_reserved = all(RESERVED[thing.colour or ""] != thing.shape for thing in things)
        if one_colour_each and no_reserved and changed.content not in excluded:
            return changed


# --- reading -------------------------------------------------------------------------------------------------------


def caption_slots(caption: str) -> Description:
    """What a caption says, as far as it can be read: any words, in any order, never an error.

    Adjectives belong to the next noun; an adjective of a kind that is already said begins another thing. A relation
    holds between the thing before it (the first one after "and") and the thing after it.
    """
    things: list[Thing] = []
    relations: list[tuple[int, str, int]] = []
    background: str | None = None
    pending: dict[str, str] = {}
    relation: tuple[int, str] | None = None
    subject_is_first = False

    def close() -> None:
        nonlocal relation, subject_is_first
        if relation is not None:
            relations.append((*relation, len(things)))
        relation, subject_is_first = None, False
        things.append(Thing(**pending))
        pending.clear()

    for word in re.findall(r"[a-z]+", caption.lower()):
        kind, value = _READ.get(word, (word, ""))
        if kind in SLOTS:
            if kind in pending:
                close()
            pending[kind] = value
            if kind == "shape":
                close()
        elif kind == "background" and value:
            background = value if background in (None, value) else "several"
        elif kind == "and":
            subject_is_first = True
        elif kind == "relation":
            if pending:
                close()
            if things:
                relation = (0 if subject_is_first else len(things) - 1, value)
    if pending:
        close()
    return Description(tuple(things), tuple(relations), background)


def parse(caption: str) -> Description:
    """What a caption of the world's grammar says; ValueError for any other text."""
    if not _GRAMMAR.fullmatch(caption):
        raise ValueError(f"not a caption of the embedded world: {caption!r}")
    return caption_slots(caption)


# --- scores --------------------------------------------------------------------------------------------------------


def attribute_scores(references: Sequence[Sequence[str]], captions: Sequence[str]) -> dict[str, float]:
    """F1 in percent of the attributes that generated captions name, summed over all pictures.

    `references` are the true captions of each picture, complete descriptions, of which the first is used. Slots are
    shape, colour, size and texture of each thing, each relation of the chain, and the background. Things of truth and
    caption are matched one to one so that most slots agree; what is left out, invented or said twice counts as wrong.
    A relation agrees if truth states it, its inverse, or the two relations of a straight chain imply it.
    Keys: `attributes`, `attributes_<kind>` for each kind in KINDS that occurs, `attributes_<n>_objects` by the number
    of things in the truth.
    """
    if len(references) != len(captions) or not captions:
        raise ValueError(f"{len(captions)} captions for {len(references)} pictures: one for each, and at least one")
    agreeing: Counter[str] = Counter()  # both by kind, by number of things and in all
    counted: Counter[str] = Counter()  # slots of truth + slots of the caption
    for true, generated in zip(references, captions, strict=True):
        truth, said = caption_slots(true[0]), caption_slots(generated)
        agree, slots = agreeing_slots(truth, said), filled_slots(truth) + filled_slots(said)
        for sums, part in ((agreeing, agree), (counted, slots)):
            for name, number in part.items():
                sums[f"attributes_{name}"] += number
            sums["attributes"] += part.total()
            sums[f"attributes_{len(truth.things)}_objects"] += part.total()
    order = ["attributes", *(f"attributes_{kind}" for kind in KINDS)]
    order += sorted(name for name in counted if name.endswith("_objects"))
    return {name: 200.0 * agreeing[name] / counted[name] for name in order if counted[name]}


def filled_slots(said: Description) -> Counter[str]:
    """How many slots of each kind a description fills."""
    filled = Counter(kind for thing in said.things for kind in SLOTS if getattr(thing, kind) is not None)
    return filled + Counter(relation=len(said.relations), background=int(said.background is not None))


def agreeing_slots(truth: Description, said: Description) -> Counter[str]:
    """Agreeing slots of each kind under the matching of things that makes most of them agree."""
    implied = _implied(truth)
    background = Counter(background=int(truth.background is not None and truth.background == said.background))
    best: Counter[str] = Counter()
    for partners in permutations(range(max(len(truth.things), len(said.things))), len(truth.things)):
        agree = Counter(
            kind
            for thing, partner in zip(truth.things, partners, strict=True)
            if partner < len(said.things)
            for kind in SLOTS
            if getattr(thing, kind) is not None and getattr(thing, kind) == getattr(said.things[partner], kind)
        )
        back = {partner: index for index, partner in enumerate(partners)}
        right = {
            frozenset((a, b)) for a, relation, b in said.relations if (back.get(a), relation, back.get(b)) in implied
        }
        agree["relation"] = min(len(right), len(truth.relations))
        if agree.total() > best.total():
            best = agree
    return best + background


def _implied(truth: Description) -> set[tuple[int, str, int]]:
    """Stated relations, what follows along a straight chain, and all their inverses."""
    stated = {*truth.relations, *((b, INVERSE[relation], a) for a, relation, b in truth.relations)}
    through = {(a, r, d) for a, r, b in stated for c, s, d in stated if b == c and r == s}
    return stated | through

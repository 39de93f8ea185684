"""What is true of a text beside a picture of the embedded world: the judgement that a filter is measured against.

The web's own texts bear theirs (`KEY.json` says `truth` and `kind`). Any other text, a synthetic caption above all, is read and held
against the scene: it is true if it says all that a caption of the world says and nothing that is not so, in whatever words, an
attribute F1 of 100 (`shapes_language.attribute_scores`). So a fragment is noise wherever it comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from blip.datamodules.shapes_language import KINDS, agreeing_slots, caption_slots, filled_slots
from blip.datamodules.shapes_scenes import Description, Thing

TRUE = "true"
INCOMPLETE, NOTHING, THINGS, SEVERAL = "incomplete", "nothing said", "number of things", "several slots"
DEVIATIONS = (*KINDS, THINGS, SEVERAL, INCOMPLETE, NOTHING)


def truth(record: Mapping[str, Any], source: str, text: str) -> tuple[bool, str] | None:
    """(whether the text is true of its picture, kind) of a text of the record `KEY.json`; None for a record that holds no scene.

    The kind is TRUE; of the web's own noise the one that the record bears (`shapes_language.NOISE`), of other texts a deviation.
    """
    scene = described(record)
    if scene is None:
        return None
    kind = recorded(record, source) or compare(scene, text).kind
    return kind == TRUE, kind


def recorded(record: Mapping[str, Any], source: str) -> str | None:
    """The kind that a record bears of its own text, if it bears any."""
    kind = record.get("kind")
    return kind if source == "web" and isinstance(kind, str) else None


def described(record: Mapping[str, Any]) -> Description | None:
    """What the picture of a record shows, None where the record holds no scene of the embedded world."""
    try:
        scene = record["scene"]
        things = tuple(Thing(*(str(thing[slot]) for slot in Thing._fields)) for thing in scene["objects"])
        relations = tuple((number, str(relation), number + 1) for number, relation in enumerate(scene["relations"]))
        if not things or len(relations) != len(things) - 1:
            return None
        return Description(things, relations, str(scene["background"]))
    except (KeyError, TypeError):  # strangers' records may have a "scene" of their own
        return None


class Compared(NamedTuple):
    """A text beside a scene. kind: TRUE or one of DEVIATIONS; agreeing of slots (of scene and text): 2 agreeing / slots is its F1."""

    kind: str
    agreeing: int
    slots: int


def compare(scene: Description, text: str) -> Compared:
    """In what a text departs from the scene.

    INCOMPLETE: all that it says is so, but not all is said; THINGS: it tells of more or fewer of them; one of KINDS: slots of that
    kind alone are wrong; SEVERAL: of several kinds.
    """
    said = caption_slots(text)
    agreeing, stated, shown = agreeing_slots(scene, said), filled_slots(said), filled_slots(scene)
    wrong = [kind for kind in KINDS if agreeing[kind] < max(stated[kind], shown[kind])]
    if not stated.total():
        kind = NOTHING
    elif agreeing.total() == stated.total():
        kind = INCOMPLETE if wrong else TRUE
    elif len(said.things) != len(scene.things):
        kind = THINGS
    else:
        kind = wrong[0] if len(wrong) == 1 else SEVERAL
    return Compared(kind, agreeing.total(), stated.total() + shown.total())

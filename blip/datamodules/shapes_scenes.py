"""Scenes of the embedded world: what stands in a picture, where, and how it is drawn.

A scene has one to three things on a background. Each thing has a shape, a colour, a size and a texture; the things of
one scene have different colours. Two neighbours stand in a relation (left, right, above, below) that no one can
doubt: they lie along one axis, clear of each other, and hardly beside it. Three things make a chain, either straight
or with one corner, and its middle is the same however it is read. Eight pairs of a colour and a shape are reserved:
only scenes that are asked for them have them.
"""

import math
import random
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
SIZES = ("small", "big")
TEXTURES = ("plain", "striped", "dotted")
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}
RELATIONS = tuple(INVERSE)
COLOURS = {
    "red": (222, 28, 36),
    "orange": (255, 132, 0),
    "yellow": (252, 222, 32),
    "green": (24, 158, 52),
    "cyan": (48, 216, 226),
    "blue": (36, 72, 232),
    "purple": (132, 36, 172),
    "pink": (255, 138, 194),
}
BACKGROUNDS = {
    "white": (244, 244, 242),
    "grey": (140, 142, 146),
    "black": (20, 20, 24),
    "brown": (92, 62, 40),
    "beige": (222, 204, 170),
}
RESERVED = dict(
    zip(COLOURS, ("star", "heart", "ring", "square", "triangle", "cross", "circle", "diamond"), strict=True)
)

SIDE = 64
JPEG_QUALITY = 92
EDGE = 1.5  # pixels kept free at the edges of the picture
GAP = 2.0  # pixels at least between two neighbours
# radius in pixels by the number of things and their size; a shape fills at least 0.9 of it in width and height
RADII = {
    1: {"small": (8.5, 11.0), "big": (16.0, 21.0)},
    2: {"small": (8.0, 9.5), "big": (12.5, 14.5)},
    3: {"small": (6.75, 7.4), "big": (9.3, 10.8)},
}


def seeded(*key: int | str) -> random.Random:
    """The draws of one thing that is made: a stream of its own for each key."""
    return random.Random("/".join(map(str, key)))


class Thing(NamedTuple):
    """What is said of one thing; None where a caption says nothing."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    texture: str | None = None


class Description(NamedTuple):
    """What a caption says: things in order, relations as (index, relation, index), background."""

    things: tuple[Thing, ...]
    relations: tuple[tuple[int, str, int], ...]
    background: str | None

    @property
    def content(self) -> tuple:
        """Things and background without the relations: scenes that differ in it differ in every caption."""
        return self.background, frozenset(self.things)

    @property
    def meaning(self) -> tuple:
        """The same for two descriptions exactly if they state the same, in whatever order."""
        stated = frozenset(
            (self.things[a], relation, self.things[b])
            if relation in ("left", "above")
            else (self.things[b], INVERSE[relation], self.things[a])
            for a, relation, b in self.relations
        )
        return (*self.content, stated)


@dataclass(frozen=True)
class Scene:
    """A description with places: centre (x, y) and radius of each thing in pixels of a 64 x 64 picture."""

    description: Description
    places: tuple[tuple[float, float, float], ...]

    def to_json(self) -> dict:
        """What KEY.json keeps: background, objects with slots and places, relations of the chain in order."""
        things = [
            {**thing._asdict(), "x": x, "y": y, "radius": radius}
            for thing, (x, y, radius) in zip(self.description.things, self.places, strict=True)
        ]
        relations = [relation for _, relation, _ in self.description.relations]
        return {"background": self.description.background, "objects": things, "relations": relations}


def draw_scene(
    rng: random.Random, count: int, reserved: bool = False, excluded: AbstractSet[tuple] = frozenset()
) -> Scene:
    """A scene of `count` things, with one reserved pair of colour and shape or none, its content not in `excluded`."""
    for _ in range(10_000):
        description = _draw_description(rng, count, reserved)
        if description.content not in excluded:
            return Scene(description, place(rng, description))
    raise ValueError(
        f"no scene of {count} things is left: {len(excluded)} contents are excluded; ask for smaller val, test, reserved"
    )


def _draw_description(rng: random.Random, count: int, reserved: bool) -> Description:
    colours = rng.sample(tuple(COLOURS), count)
    odd = rng.randrange(count) if reserved else None
    things = []
    for number, colour in enumerate(colours):
        shape = RESERVED[colour]
        if number != odd:
            shape = rng.choice([other for other in SHAPES if other != shape])
        things.append(Thing(shape, colour, rng.choice(SIZES), rng.choice(TEXTURES)))
    relations: list[tuple[int, str, int]] = []
    for second in range(1, count):
        # a chain that turns back on itself would be a straight one with another middle
        back = INVERSE[relations[-1][1]] if relations else None
        relation = rng.choice([relation for relation in RELATIONS if relation != back])
        relations.append((second - 1, relation, second))
    return Description(tuple(things), tuple(relations), rng.choice(tuple(BACKGROUNDS)))


def place(rng: random.Random, description: Description) -> tuple[tuple[float, float, float], ...]:
    """Centres and radii so that each stated relation is plain to see and nothing overlaps or leaves the picture."""
    ranges = [RADII[len(description.things)][thing.size or ""] for thing in description.things]
    room = SIDE - 2 * EDGE
    for attempt in range(40):
        loose = 1 - attempt / 39  # tighter each time: the last one always fits
        radii = [low + (high - low) * loose * rng.random() for low, high in ranges]
        centres = [(0.0, 0.0)]
        for first, relation, second in description.relations:
            along = radii[first] + radii[second] + GAP + 14 * loose * rng.random()
            beside = 0.3 * along * loose * rng.uniform(-1, 1)
            x, y = centres[first]
            sign = 1 if relation in ("left", "above") else -1  # the second thing is right of (below) the first
            dx, dy = (sign * along, beside) if relation in ("left", "right") else (beside, sign * along)
            centres.append((x + dx, y + dy))
        left, right, top, bottom = (
            min(x - r for (x, _), r in zip(centres, radii, strict=True)),
            max(x + r for (x, _), r in zip(centres, radii, strict=True)),
            min(y - r for (_, y), r in zip(centres, radii, strict=True)),
            max(y + r for (_, y), r in zip(centres, radii, strict=True)),
        )
        if right - left <= room and bottom - top <= room and _ends_are_apart(centres, radii):
            dx = EDGE - left + (room - right + left) * rng.random()
            dy = EDGE - top + (room - bottom + top) * rng.random()
            return tuple(
                (round(x + dx, 2), round(y + dy, 2), round(r, 2)) for (x, y), r in zip(centres, radii, strict=True)
            )
    raise AssertionError(f"{description}: the radii leave no room")


def _ends_are_apart(centres: list[tuple[float, float]], radii: list[float]) -> bool:
    (x0, y0), (x1, y1) = centres[0], centres[-1]
    return len(centres) < 3 or max(abs(x0 - x1), abs(y0 - y1)) >= radii[0] + radii[-1] + 1


def _regular(count: int, turn: float = 0.0, radius: float = 1.0) -> np.ndarray:
    angles = np.arange(count) * (2 * math.pi / count) + turn
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _outlines() -> dict[str, list[np.ndarray]]:
    """Closed outlines in units of the radius, y downwards; a second outline is a hole."""
    arm = 0.36
    star = np.empty((10, 2))
    star[0::2] = _regular(5, -math.pi / 2, 1.12)
    star[1::2] = _regular(5, -math.pi / 2 + math.pi / 5, 0.46)
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    heart = np.stack(
        [16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))], axis=1
    )
    cross = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
    cross += [(-x, -y) for x, y in cross]
    return {
        "circle": [_regular(64)],
        "square": [0.9 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])],
        "triangle": [np.array([(0, -0.98), (1, 0.86), (-1, 0.86)])],
        "star": [star + np.array([0, 0.08])],
        "cross": [np.array(cross)],
        "diamond": [np.array([(0, -1.0), (0.9, 0), (0, 1.0), (-0.9, 0)])],
        "ring": [_regular(64), _regular(64, radius=0.5)],
        "heart": [(heart - (0, 2.5)) / (16, 14.6)],
    }


OUTLINES = _outlines()
_FINE = 4  # drawn at four times the size, then averaged
_SUB = 4  # bits below the fine pixel that OpenCV keeps of a corner
_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / (SIDE - 1) * 2 - 1
_GRAIN = np.random.Generator(np.random.Philox(key=64)).standard_normal((256, 256, 3)).astype(np.float32)


def render(scene: Scene, rng: random.Random) -> np.ndarray:
    """The picture, uint8 [64, 64, 3] RGB: anti-aliased, with uneven light and a little grain."""
    picture = ground(scene.description.background, rng)
    for thing, place in zip(scene.description.things, scene.places, strict=True):
        paint(picture, thing, place, rng)
    return lit(picture, rng)


def ground(background: str | None, rng: random.Random) -> np.ndarray:
    """An empty picture, float32 [64, 64, 3]."""
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    picture[:] = _jitter(rng, BACKGROUNDS[background or ""])
    return picture


def lit(picture: np.ndarray, rng: random.Random) -> np.ndarray:
    """The finished picture, uint8: light from one side, and grain."""
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0.0, 0.12)
    picture = picture * (1 + strength * (math.cos(angle) * _X + math.sin(angle) * _Y))[..., None]
    top, left = rng.randrange(256 - SIDE), rng.randrange(256 - SIDE)
    picture += rng.uniform(0.5, 2.5) * _GRAIN[top : top + SIDE, left : left + SIDE]
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def jpeg(scene: Scene, rng: random.Random) -> bytes:
    """The picture as a file."""
    return simplejpeg.encode_jpeg(render(scene, rng), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")


def _jitter(rng: random.Random, colour: tuple[int, int, int]) -> np.ndarray:
    return np.array([channel + rng.uniform(-8, 8) for channel in colour], np.float32)


def paint(picture: np.ndarray, thing: Thing, place: tuple[float, float, float], rng: random.Random) -> None:
    """Lays one thing over the picture, in place."""
    x, y, radius = place
    reach = 1.15 * radius + 1
    left, top = max(math.floor(x - reach), 0), max(math.floor(y - reach), 0)
    right, bottom = min(math.ceil(x + reach), SIDE), min(math.ceil(y + reach), SIDE)
    fine = (_FINE * (bottom - top), _FINE * (right - left))

    turn = math.radians(rng.uniform(-4, 4))
    rotation = np.array([(math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))])
    corners = [
        np.round(((outline @ rotation * radius + (x - left, y - top)) * _FINE - 0.5) * (1 << _SUB)).astype(np.int32)
        for outline in OUTLINES[thing.shape or ""]
    ]
    mask = np.zeros(fine, np.uint8)
    cv2.fillPoly(mask, corners, 255, cv2.LINE_8, _SUB)
    colour = _jitter(rng, COLOURS[thing.colour or ""])

    patch = picture[top:bottom, left:right]
    rows, columns = _Y[top:bottom, left:right, None], _X[top:bottom, left:right, None]
    light = 1.02 - 0.09 * ((columns - columns.mean()) + (rows - rows.mean())) * SIDE / 2 / radius  # from the upper left
    patch += _coverage(mask)[..., None] * (colour * light - patch)
    if thing.texture != "plain":
        ink = mask & _pattern(thing.texture or "", fine, radius, rng)
        rim = max(round(_FINE * 0.2 * radius), 5)  # the outline keeps the colour, so that the shape stays whole
        cv2.polylines(ink, corners, True, 0, rim, cv2.LINE_8, _SUB)
        dark = thing.colour in ("yellow", "orange", "cyan", "pink")
        shade = np.float32(24.0 if dark else 246.0)
        patch += _coverage(ink)[..., None] * (shade - patch)


def _coverage(mask: np.ndarray) -> np.ndarray:
    """Share of each pixel that a fine mask covers."""
    size = (mask.shape[1] // _FINE, mask.shape[0] // _FINE)
    return cv2.resize(mask, size, interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _pattern(texture: str, fine: tuple[int, int], radius: float, rng: random.Random) -> np.ndarray:
    """Where the ink of a texture goes, uint8 0 or 255 at fine resolution."""
    height, width = fine
    period = _FINE * max(0.5 * radius, 3.8)
    if texture == "striped":  # diagonal: a pixel's ink depends on row + column alone
        period *= math.sqrt(2)
        line = (np.arange(height + width) + period * rng.random()) % period < 0.46 * period
        return np.lib.stride_tricks.sliding_window_view(line * np.uint8(255), width)[:height]
    across, down = (((np.arange(n) - n / 2) % period - period / 2) ** 2 for n in (width, height))
    return (across + down[:, None] < (0.31 * period) ** 2) * np.uint8(255)

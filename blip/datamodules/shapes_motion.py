"""Clips of the embedded world: the things of a scene come one after another, each from an edge, and go again.

All frames together show what a caption of the scene says, each thing at rest at its place in it, but no two things are at
rest in one frame. So who has learnt from pictures can tell a clip by its frames, and by no single one of them.
"""

import io
import random
from typing import NamedTuple

import numpy as np

from blip.datamodules.shapes_scenes import RELATIONS, SIDE, Scene, ground, lit, paint, seeded

FRAMES = 24
RATE = 8  # frames a second
COMING = 3  # frames that a thing takes from the edge to its place
QUALITY = 8  # of H.264: smaller is better, 18 looks like the original


class Track(NamedTuple):
    """What a thing does: seen from frame `first` to before frame `last`, it comes in from the edge `edge`."""

    first: int
    last: int
    edge: str


def tracks(scene: Scene, rng: random.Random) -> list[Track]:
    """Of each thing. They take turns of equal length; a thing goes when the next one has come, the first is there at once."""
    count = len(scene.places)
    turns = rng.sample(range(count), count)
    starts = [FRAMES * turn // count for turn in range(count + 1)]
    found = []
    for thing, turn in enumerate(turns):
        before = [other for other in range(count) if turns[other] == turn - 1]
        edges = [edge for edge in RELATIONS if not any(_meets(scene, thing, other, edge) for other in before)]
        last = starts[turn + 1] + (COMING if turn + 1 < count else 0)
        found.append(Track(starts[turn], last, rng.choice(edges)))
    return found


def _meets(scene: Scene, thing: int, other: int, edge: str) -> bool:
    """Whether a thing that comes in from an edge runs into another one on its way."""
    (x, y, r), (u, v, q) = scene.places[thing], scene.places[other]
    along, beside = (x - u, y - v) if edge in ("left", "right") else (y - v, x - u)
    ahead = along > 0 if edge in ("left", "above") else along < 0
    return ahead and abs(beside) < r + q


def film(scene: Scene, turns: list[Track], look: str) -> np.ndarray:
    """The frames, uint8 [FRAMES, 64, 64, 3] RGB; `look` decides light, shades and grain, which stay the same."""
    frames = []
    for number in range(FRAMES):
        picture = ground(scene.description.background, seeded(look, "ground"))
        for index, (thing, (x, y, radius), turn) in enumerate(
            zip(scene.description.things, scene.places, turns, strict=True)
        ):
            if turn.first <= number < turn.last:
                dx, dy = _way(x, y, radius, turn, number)
                if _is_inside(x + dx, y + dy, radius):
                    paint(picture, thing, (x + dx, y + dy, radius), seeded(look, "thing", index))
        frames.append(lit(picture, seeded(look, "light")))
    return np.stack(frames)


def _way(x: float, y: float, radius: float, turn: Track, number: int) -> tuple[float, float]:
    """How far from its place a thing is in a frame."""
    left = 0.0 if turn.first == 0 else max(0.0, 1 - (number - turn.first) / COMING)
    outside = {"left": x + radius, "right": SIDE - x + radius, "above": y + radius, "below": SIDE - y + radius}
    way = left * outside[turn.edge] * (-1 if turn.edge in ("left", "above") else 1)
    return (way, 0.0) if turn.edge in ("left", "right") else (0.0, way)


def _is_inside(x: float, y: float, radius: float) -> bool:
    return -0.9 * radius < min(x, y) and max(x, y) < SIDE + 0.9 * radius


def mp4(frames: np.ndarray) -> bytes:
    """Frames, uint8 [F, H, W, 3] RGB, as H.264 in an MP4 file, the same bytes for the same frames."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        # x264's assembler gives other bytes now and then, by where its buffers lie
        options = {"crf": str(QUALITY), "threads": "1", "x264-params": "no-asm=1"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"  # small things lose their colour in a coarser one
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()

"""The picture of the README: the way of a pair from a shard to the losses, and MED's three modes over shared blocks.

python docs/draw.py [docs/blip.svg]    the ending decides the format (svg, png)
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from blip.datamodules.shapes_scenes import Description, Scene, Thing, render

WIDTH, HEIGHT = 1000, 706
INK, SOFT, PAPER = "#1f2933", "#5f6c7b", "#ffffff"
PLAIN, FRAME = "#eef1f5", "#f7f8fa"
BOTH, CAUSAL, CROSS, FEED, IMAGE = "#bcd7f5", "#f6cfa8", "#bfe5c6", "#dccff0", "#f8dfe6"
CAPTION = "a big red star on beige"
COLUMNS = {"text": 48, "multimodal": 268, "decoder": 488}  # left edge of each mode
COLUMN = 190
RIGHT, RIGHT_WIDTH = 772, 176  # the image encoder's column


def main(path: Path) -> None:
    plt.rcParams.update({"svg.hashsalt": "blip", "font.family": "DejaVu Sans"})
    figure = plt.figure(figsize=(WIDTH / 72, HEIGHT / 72), facecolor="none")
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    page.axis("off")
    box(page, 2, 2, WIDTH - 4, HEIGHT - 4, PAPER, radius=14, edge="#d5dae1")
    way_of_a_pair(page)
    image_side(page)
    med(page)
    losses(page)
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=150, transparent=True, metadata=metadata)


def way_of_a_pair(page: Axes) -> None:
    """Shard, index, plan, reading, batch: the upper row."""
    rooms = {
        "shards": "tar files with KEY.jpg\nand KEY.txt or KEY.json,\nin folders or behind URLs",
        "index": "where each pair's bytes\nlie; made once, checked,\nfingerprinted",
        "plan": "(epoch, position) → pair:\na pure function of the\nseed, on any ranks",
        "worker": "reads, decodes, augments,\ntokenises; draws keyed by\nseed, epoch, position",
        "batch": "uint8 pictures, token ids\npacked without padding,\nits place in the epoch",
    }
    for number, (name, words) in enumerate(rooms.items()):
        left = 24 + number * 195
        box(page, left, 22, 172, 96, PLAIN)
        page.text(left + 12, 42, name, size=14, weight="bold", color=INK, va="center")
        page.text(left + 12, 84, words, size=11, color=INK, va="center", linespacing=1.35)
        if number:
            arrow(page, (left - 23, 70), (left - 1, 70))


def image_side(page: Axes) -> None:
    """The picture, the image encoder and the keys and values that all texts look at."""
    middle = RIGHT + RIGHT_WIDTH / 2
    arrow(page, (middle, 118), (middle, 160))
    star = Thing("star", "red", "big", "plain")
    scene = Scene(Description((star,), (), "beige"), ((32.0, 33.0, 20.0),))
    page.imshow(render(scene, random.Random(0)), extent=(middle - 32, middle + 32, 226, 162), aspect="auto", zorder=3)
    page.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    arrow(page, (middle, 226), (middle, 262))
    box(page, RIGHT, 264, RIGHT_WIDTH, 74, IMAGE)
    two_lines(page, middle, 301, "image encoder", "ViT: patches → states")
    arrow(page, (middle, 338), (middle, 374))
    box(page, RIGHT, 376, RIGHT_WIDTH, 58, CROSS)
    two_lines(page, middle, 405, "CrossKV", "keys, values: projected once")


def med(page: Axes) -> None:
    """Three columns, one for each mode; the same colour is the same tensors."""
    box(page, 24, 232, 678, 294, FRAME, radius=12, edge="#c3cad4")
    start, end = RIGHT + 50, COLUMNS["text"] + COLUMN / 2
    page.plot([start, start, end], [118, 142, 142], color=SOFT, lw=1.6, solid_joinstyle="round")
    kinds = {
        "text": ("[CLS]", "sees no picture", BOTH, "self-attention", "both ways"),
        "multimodal": ("[ENC]", "looks at the picture", BOTH, "self-attention", "both ways"),
        "decoder": ("[DEC]", "looks, writes word by word", CAUSAL, "self-attention", "causal"),
    }
    for mode, (token, sees, colour, name, how) in kinds.items():
        left = COLUMNS[mode]
        middle = left + COLUMN / 2
        arrow(page, (middle, 142), (middle, 170))
        box(page, left, 172, COLUMN, 30, PLAIN, radius=15)
        page.text(middle, 187, f"{token} {CAPTION}", size=10.5, color=INK, ha="center", va="center")
        page.plot([middle, middle], [202, 243], color=SOFT, lw=1.6)
        page.text(middle, 255, mode, size=14, weight="bold", color=INK, ha="center", va="center")
        page.text(middle, 274, sees, size=11, color=SOFT, ha="center", va="center")
        arrow(page, (middle, 284), (middle, 306))
        box(page, left, 308, COLUMN, 46, colour)
        two_lines(page, middle, 331, name, how)
        arrow(page, (middle, 354), (middle, 454))
        if mode != "text":
            box(page, left, 382, COLUMN, 46, CROSS)
            two_lines(page, middle, 405, "cross-attention", "to CrossKV")
        box(page, left, 456, COLUMN, 46, FEED)
        two_lines(page, middle, 479, "feed-forward", "on packed tokens")
    arrow(page, (RIGHT, 405), (COLUMNS["decoder"] + COLUMN, 405), "#2f855a")
    arrow(page, (COLUMNS["decoder"], 405), (COLUMNS["multimodal"] + COLUMN, 405), "#2f855a")
    page.text(722, 476, "MED", size=14, weight="bold", color=INK, va="center")
    words = "is one stack of such blocks\nin three modes. The same\ncolour is the same tensors."
    page.text(722, 510, words, size=11, color=INK, va="center", linespacing=1.35)


def losses(page: Axes) -> None:
    """What each mode is trained for, and where the picture's features go."""
    goals = {
        "text": ("ITC", "finds its own picture\namong the batch and queue"),
        "multimodal": ("ITM", "does this text fit?\nhard negatives from ITC"),
        "decoder": ("LM", "the next word, given\npicture and words so far"),
    }
    for mode, (name, words) in goals.items():
        left = COLUMNS[mode]
        middle = left + COLUMN / 2
        arrow(page, (middle, 502), (middle, 578))
        box(page, left, 580, COLUMN, 72, PAPER, edge=INK)
        page.text(middle, 597, name, size=14, weight="bold", color=INK, ha="center", va="center")
        page.text(middle, 627, words, size=11, color=INK, ha="center", va="center", linespacing=1.3)
    box(page, RIGHT, 580, RIGHT_WIDTH, 72, PLAIN)
    two_lines(page, RIGHT + RIGHT_WIDTH / 2, 616, "momentum encoders", "and a queue: keys, soft\ntargets for ITC")
    edge, floor, itc = 972, 680, COLUMNS["text"] + COLUMN / 2
    page.plot([RIGHT + RIGHT_WIDTH, edge, edge, itc], [301, 301, floor, floor], color=SOFT, lw=1.6)
    page.plot([RIGHT + RIGHT_WIDTH / 2] * 2, [652, floor], color=SOFT, lw=1.6)
    arrow(page, (itc, floor), (itc, 654))
    page.text(
        595,
        floor,
        "image features",
        size=11,
        color=SOFT,
        ha="center",
        va="center",
        bbox={"fc": PAPER, "ec": "none", "pad": 2.5},
    )


def box(
    page: Axes, left: float, top: float, width: float, height: float, fill: str, radius: float = 8, edge: str = "none"
) -> None:
    style = f"round,pad=0,rounding_size={radius}"
    page.add_patch(FancyBboxPatch((left, top), width, height, style, fc=fill, ec=edge, lw=1.2, zorder=2))


def two_lines(page: Axes, x: float, y: float, name: str, words: str) -> None:
    """A name above its explanation, the pair centred on (x, y)."""
    lines = 1 + words.count("\n")
    page.text(x, y - 8 * lines, name, size=12.5, weight="bold", color=INK, ha="center", va="center")
    page.text(x, y + 9, words, size=11, color=INK, ha="center", va="center", linespacing=1.3)


def arrow(page: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = SOFT) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.6, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 12}
    page.annotate("", end, start, arrowprops=style, zorder=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("blip.svg"))

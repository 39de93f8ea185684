"""The contact sheet holds a picture for each card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from blip.callbacks.gallery import draw_sheet


def test_a_sheet_shows_every_picture_and_any_text(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255), (0, 255, 255)]
    card = {"true": "costs $5 _or_ $6 {", "generated": "", "best": "b " * 60, "worst": "Grüße"}
    cards = [card | {"image": np.full((8, 8, 3), colour, np.uint8)} for colour in colours]
    draw_sheet(cards, tmp_path / "sheet.png")
    shown = {tuple(c) for c in np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).reshape(-1, 3).tolist()}
    assert set(colours) <= shown


def test_a_card_tells_what_its_task_knows(tmp_path: Path) -> None:
    draw_sheet(
        [{"image": np.zeros((8, 8, 3), np.uint8), "true": "a cat", "generated": "a cow"}], tmp_path / "sheet.png"
    )
    assert (tmp_path / "sheet.png").exists()


def test_no_cards_make_no_sheet(tmp_path: Path) -> None:
    draw_sheet([], tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()

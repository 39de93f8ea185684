"""The contact sheet: held-out pictures with what the model says of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from textwrap import fill
from typing import Any

import lightning as L


class Gallery(L.Callback):
    """Draws `folder`/contact_sheet.png of the first `count` pictures of a test or of a validation run on its own.

    The task's `gallery(batch)` gives a list of {image: uint8 [H, W, 3], true, generated, best, worst}: the true caption, the
    generated one, and the best and the worst match among the batch's texts, or some of them. A task without that method gets
    no sheet.
    """

    def __init__(self, folder: str, count: int) -> None:
        self.path = Path(folder) / "contact_sheet.png"
        self.count = count

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == dataloader_idx == 0 and trainer.is_global_zero and hasattr(pl_module, "gallery"):
            draw_sheet(pl_module.gallery(batch)[: self.count], self.path)  # type: ignore[operator]
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image("contact_sheet", [str(self.path)])

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "validate":
            self.on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)


LABELS = {"true": "true", "generated": "generated", "best": "best match by ITC", "worst": "worst match"}


def draw_sheet(cards: list[dict[str, Any]], path: Path, columns: int = 4) -> None:
    """Writes the cards as a grid of pictures with what is said of each under it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not cards:
        return
    columns = min(columns, len(cards))
    lines = -(-len(cards) // columns)
    figure = Figure((3.4 * columns, 5.4 * lines))
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False, gridspec_kw={"hspace": 0.8, "wspace": 0.1}).flatten()
    for axes in grid:
        axes.set_axis_off()
    for axes, card in zip(grid, cards, strict=False):
        axes.imshow(card["image"], interpolation="nearest")
        told = (f"{label}: {card[name]}" for name, label in LABELS.items() if name in card)
        text = "\n".join(fill(line, 40, max_lines=4) for line in told)
        axes.text(
            0, -0.04, text.replace("$", r"\$"), transform=axes.transAxes, va="top", fontsize=7, family="monospace"
        )
    with warnings.catch_warnings():
        # a letter that no font here has is drawn as a box
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(path, dpi=110, bbox_inches="tight")

"""The numbers of a run as it goes: metrics.csv, a row a logged step, and the learning curves drawn from it at the end."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from blip.files import whole


class CurveLog(Logger):
    """Writes `folder`/metrics.csv; every row is in the file as soon as it is logged, so a killed run loses none."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"

    @property
    def name(self) -> str:
        return "curves"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the config lies beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, **{k: v for k, v in metrics.items() if k != "step"}}
        columns = self.columns()
        if new := [name for name in row if name not in columns]:
            self.write(columns + new, self.rows())
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, columns + new).writerow(row)

    def columns(self) -> list[str]:
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            return next(csv.reader(file), [])

    def rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            return list(csv.DictReader(file))

    def write(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        """Replaces the file as a whole."""
        with whole(self.path) as partial, open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    @rank_zero_only
    def cut(self, step: int) -> None:
        """Drops the rows from `step` on: those that a run was ahead of the checkpoint from which it goes on."""
        rows = self.rows()
        if kept := [row for row in rows if int(row["step"]) < step]:
            self.write(self.columns(), kept)
        else:
            self.path.unlink(missing_ok=True)


class Curves(L.Callback):
    """Draws `folder`/curves.png when training ends: a panel for each number that training or validation logged."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "curves.png"

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        for log in self.logs(trainer):
            log.cut(checkpoint["global_step"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:  # nothing was saved before the run was stopped
            for log in self.logs(trainer):
                log.cut(0)

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for log in self.logs(trainer):
            draw_curves(log.rows(), self.path)

    @staticmethod
    def logs(trainer: L.Trainer) -> list[CurveLog]:
        return [log for log in trainer.loggers if isinstance(log, CurveLog)]


def draw_curves(rows: list[dict[str, str]], path: Path) -> None:
    """One panel for each `stage/task` or training loss in the rows, over optimizer steps."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for name, value in row.items():
            if value and name.split("/")[0] in ("train", "val", "run"):
                panel, curve = (name, "") if name.startswith(("train/", "run/")) else name.rsplit("/", 1)
                panels[panel][curve].append((int(row["step"]) + 1, float(value)))
    if not panels:
        return
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure((4 * columns, 2.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (panel, curves) in zip(grid, panels.items(), strict=False):
        axes.set_prop_cycle(color=[colormaps["tab20"](i) for i in range(20)])
        for curve, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else None, linewidth=1, label=curve)
        axes.set_title(panel, fontsize=9)
        axes.tick_params(labelsize=7)
        if len(curves) > 1:
            axes.legend(fontsize=6)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)

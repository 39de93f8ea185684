"""The log of a run: every row in the file at once, and none of a future that was cut off."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from blip.callbacks.curves import CurveLog, draw_curves


def test_a_column_that_comes_later_is_empty_before(tmp_path: Path) -> None:
    log = CurveLog(str(tmp_path))
    log.log_metrics({"train/loss": 2.0}, 0)
    log.log_metrics({"val/retrieval/i2t_r1": 50.0}, 0)
    log.log_metrics({"train/loss": 1.0}, 1)
    lines = (tmp_path / "metrics.csv").read_text().split()
    assert lines == ["step,train/loss,val/retrieval/i2t_r1", "0,2.0,", "0,,50.0", "1,1.0,"]


def test_cutting_drops_the_rows_from_a_step_on(tmp_path: Path) -> None:
    log = CurveLog(str(tmp_path))
    for step in range(4):
        log.log_metrics({"train/loss": float(step)}, step)
    log.cut(2)
    assert [row["step"] for row in log.rows()] == ["0", "1"]
    log.cut(0)
    assert log.rows() == []
    log.cut(0)


def test_the_picture_has_a_panel_for_each_task_and_loss(tmp_path: Path) -> None:
    rows = [{"step": "0", "train/loss": "2"}, {"step": "1", "train/loss": "1", "epoch": "0"}]
    draw_curves(rows, tmp_path / "one.png")
    rows += [{"step": "1", "val/retrieval/i2t_r1": "3", "val/retrieval/t2i_r1": "4", "val/caption/cider": "5"}]
    draw_curves(rows, tmp_path / "three.png")
    width = {name: Image.open(tmp_path / f"{name}.png").width for name in ("one", "three")}
    assert width["three"] == 3 * width["one"]
    draw_curves([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()

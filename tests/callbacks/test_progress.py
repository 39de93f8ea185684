"""The progress line tells how far, how good, how fast and how long."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip.callbacks.progress import clock
from tests.test_main import recorded, run


def test_a_run_tells_how_far_how_good_how_fast_and_how_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(recorded(tmp_path, "trainer.max_steps=4", "callbacks.progress.seconds=0", "callbacks.gallery=null"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 4
    assert lines[1].startswith("step 2/4  50 % | loss ")
    for part in (" pairs/s", "| data ", "| MFU ", " left"):
        assert part in lines[1], part
    assert lines[3].endswith("0:00 left")


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (65.9, "1:05"), (3600, "1:00:00"), (86399, "23:59:59")])
def test_times_read_as_clocks(seconds: float, text: str) -> None:
    assert clock(seconds) == text

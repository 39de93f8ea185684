"""What every benchmark prints and writes: what it ran on, and a row for each ratio."""

from __future__ import annotations

import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch


def begin(data: str, device: torch.device | str = "cpu", note: str = "", **versions: str) -> dict[str, str]:
    """Prints and returns the head of the result; versions: of libraries besides Python and torch."""
    on = f"{processor()}, {torch.get_num_threads()} threads{note}"
    known = {"Python": platform.python_version(), "torch": torch.__version__, **versions}
    head = {
        "date": date.today().isoformat(),
        "hardware": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else on,
        "versions": ", ".join(f"{name} {version}" for name, version in known.items()),
        "data": data,
    }
    for name, value in head.items():
        print(f"{name}: {value}")
    return head


def row(name: str, value: float, unit: str, peer: str, peer_value: float) -> dict[str, Any]:
    """A row of the result; `ratio` is value over peer_value."""
    return {
        "name": name,
        "value": round(value, 4),
        "unit": unit,
        "peer": peer,
        "peer_value": round(peer_value, 4),
        "ratio": round(value / peer_value, 4),
    }


def end(head: dict[str, str], rows: list[dict[str, Any]], file: Path | None) -> None:
    """Prints the rows as a table and, where a file is given, writes all as JSON."""
    print("\n| what | value | unit | beside | value | ratio |\n|---|---|---|---|---|---|")
    for r in rows:
        print(f"| {r['name']} | {r['value']} | {r['unit']} | {r['peer']} | {r['peer_value']} | {r['ratio']} |")
    if file:
        file.write_text(json.dumps({"head": head, "rows": rows}, indent=1) + "\n")


def processor() -> str:
    """The processor's name as the kernel gives it, else the machine type."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())

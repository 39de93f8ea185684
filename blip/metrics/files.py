"""The JSON files of scores: read with an error that names the file, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blip.files import write_text


def read_json(path: Path) -> Any:
    """The content of a JSON file (ValueError naming it where it is none)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content))

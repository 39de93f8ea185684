"""Commands over the records of CapFilt: `blip data materialize` writes a view as shards, `blip calibrate` finds its threshold."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_materialize(data: Any, progress: Callable[[int, int, str], None]) -> None:
    """Adds the command to those of `blip data`."""
    command = data.add_parser(
        "materialize", help="write the texts that a view keeps as shards", description=materialize_view.__doc__
    )
    command.add_argument("shards", nargs="+", metavar="SHARDS", help="what the pass was given: files, patterns or URLs")
    command.add_argument("--index", help="an index file made elsewhere")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the tars go")
    _add_view(command)
    command.add_argument("--threshold", type=float, help="least score of a text that is kept (default: 0.5)")
    command.add_argument("--share", type=float, help="in place of a threshold: this share of the texts, the best")
    command.add_argument(
        "--control",
        action="store_true",
        help="as many texts as are kept, but the shards' own, unfiltered, repeated evenly",
    )
    command.set_defaults(run=materialize_view, progress=progress)


def _add_view(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--records",
        nargs="+",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="of a filter pass; several are combined",
    )
    command.add_argument(
        "--score", action="append", metavar="COLUMN", help="itm (default), itc, ...; also several times"
    )
    command.add_argument(
        "--combine", choices=("mean", "unanimous"), default="mean", help="of several scores (default: mean)"
    )
    command.add_argument(
        "--sources",
        nargs="+",
        default=["web", "synthetic"],
        metavar="SOURCE",
        help="web, synthetic, human (default: the first two)",
    )


def _view(options: argparse.Namespace, **rule: Any) -> Any:
    from blip.datamodules.views import View

    scores = options.score or ["itm"]
    return View(options.records, scores=scores, combine=options.combine, sources=options.sources, **rule)


def materialize_view(options: argparse.Namespace) -> int:
    """Writes the pictures that keep a text, byte for byte, and their kept texts as WebDataset shards; a stopped run goes on."""
    from blip.datamodules.index import open_index
    from blip.datamodules.materialize import materialize

    view = _view(options, threshold=options.threshold, share=options.share, control=options.control)
    index = open_index(options.shards, options.index, progress=options.progress)
    written = materialize(index, view, options.out, options.progress)
    texts = ", ".join(f"{count} {source}" for source, count in sorted(written.texts.items())) or "none"
    print(f"{options.out}: {written.pictures} pictures, texts: {texts}; shards: {written.shards} written, ", end="")
    print(f"{written.there} were there, {written.empty} keep no text")
    return 0

"""Commands over the records of CapFilt: `blip data materialize` writes a view as shards, `blip calibrate` finds its threshold, and
`blip report` shows what it keeps and drops.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FOLDERS = "the folder of a filter pass; several, of the same texts, are combined"


def add_materialize(data: Any, progress: Callable[[int, int, str], None]) -> None:
    """Adds the command to those of `blip data`."""
    command = data.add_parser(
        "materialize", help="write the texts that a view keeps as shards", description=materialize_view.__doc__
    )
    command.add_argument("shards", nargs="+", metavar="SHARDS", help="what the pass was given: files, patterns or URLs")
    command.add_argument("--index", help="an index file made elsewhere")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the tars go")
    command.add_argument("--records", nargs="+", type=Path, required=True, metavar="FOLDER", help=FOLDERS)
    _add_view(command)
    _add_rule(command)
    command.add_argument(
        "--control",
        action="store_true",
        help="as many texts as are kept, but the shards' own, unfiltered, repeated evenly",
    )
    command.set_defaults(run=materialize_view, progress=progress)


def _add_view(command: argparse.ArgumentParser) -> None:
    """Which scores of which texts."""
    command.add_argument(
        "--score", action="extend", nargs="+", metavar="COLUMN", help="itm (default), itc, ...; several are combined"
    )
    command.add_argument(
        "--combine", choices=("mean", "unanimous"), default="mean", help="of several scores (default: mean)"
    )
    command.add_argument(
        "--sources", nargs="+", metavar="SOURCE", help="web, synthetic, human (default: the first two)"
    )


def _add_rule(command: argparse.ArgumentParser) -> None:
    """Which of them are kept."""
    command.add_argument("--threshold", type=float, help="least score of a text that is kept (default: 0.5)")
    command.add_argument("--share", type=float, help="in place of a threshold: this share of the texts, the best")


def _view(options: argparse.Namespace, **rule: Any) -> Any:
    from blip.datamodules.views import View

    if options.sources:
        rule["sources"] = options.sources
    return View(options.records, scores=options.score or ["itm"], combine=options.combine, **rule)


def _score(view: Any) -> str:
    """What a view goes by, in words."""
    scores = " and ".join(view.scores)
    return scores if len(view.scores) == 1 else f"{view.combine} of {scores}"


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


def add_report(commands: Any) -> None:
    """Adds the command to the parser of `blip`."""
    command = commands.add_parser("report", help="show what a filter keeps and drops", description=report_view.__doc__)
    command.add_argument("records", nargs="+", type=Path, metavar="RECORDS", help=FOLDERS)
    _add_view(command)
    _add_rule(command)
    command.add_argument(
        "--shards", nargs="+", help="where pictures are read (default: where the pass read them); in its order"
    )
    command.add_argument("--title", default="Captions kept and dropped", help="of the page (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the examples (default: %(default)s)")
    command.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    command.set_defaults(run=report_view)


def report_view(options: argparse.Namespace) -> int:
    """Writes one HTML file that opens anywhere: noise ratio, a gallery, scores, lengths, words, cost, of the embedded world also
    precision and recall; the same in numbers beside it as JSON.
    """
    from blip.capfilt.report import write_report

    view = _view(options, threshold=options.threshold, share=options.share)
    found = write_report(options.out, view, options.shards, options.title, seed=options.seed)
    print(f"{options.out}: {found['all/kept']} of {found['all/texts']} texts of {found['pictures']} pictures are kept")
    if said := _without_effect(view, found, asked=bool(options.sources)):
        print(f"blip: warning: {view.folders[0]}: {said}", file=sys.stderr)
    return 0


def _without_effect(view: Any, found: Mapping[str, Any], asked: bool) -> str:
    """Why a rule finds, keeps or drops nothing, with what is there; nothing where it does. asked: whether its sources were named."""
    from blip.datamodules.views import SOURCES

    there = {source: found[f"{source}/texts"] for source in SOURCES if found.get(f"{source}/texts")}
    missing = [source for source in view.sources if source not in there]
    if missing and (asked or not set(view.sources) & set(there)):
        texts = " and ".join(f"{count} {source}" for source, count in there.items()) or "none"
        return f"no texts of {' and '.join(missing)} there; the records hold {texts}"
    if view.share is not None:
        texts = sum(there.get(source, 0) for source in view.sources)
        return "" if found["all/kept"] else f"a share of {view.share:g} keeps no text: there are {texts}"
    if found["all/kept"] and found.get("all/dropped/below_the_threshold"):
        return ""
    ends = _ends(view)
    if not ends:
        return f"no text has the score {_score(view)}"
    which, end, value = ("drops", "lowest", ends[0]) if found["all/kept"] else ("keeps", "highest", ends[1])
    return f"a threshold of {view.threshold:g} {which} no text: the {end} {_score(view)} is {value}"


def _ends(view: Any) -> list[Any]:
    """The least and the greatest score of the texts that a view asks about, float32; nothing where none has one."""
    from blip.capfilt import records
    from blip.capfilt.calibrate import scored_texts

    found = []
    for name in records.names(view.folders[0]):
        _, score, rows = scored_texts(view, name)
        if len(rows):
            found += [score[rows].min(), score[rows].max()]
    return [min(found), max(found)] if found else []


def add_calibrate(commands: Any) -> None:
    """Adds the command to the parser of `blip`."""
    command = commands.add_parser("calibrate", help="find a filter's threshold", description=calibrate_filter.__doc__)
    command.add_argument("records", nargs="+", type=Path, metavar="RECORDS", help=FOLDERS)
    _add_view(command)
    truth = command.add_mutually_exclusive_group(required=True)
    truth.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="CSV or JSON lines: shard, key, label (1 fits, 0 does not, empty: not judged yet), number, captioner",
    )
    truth.add_argument("--truth", action="store_true", help="of the embedded world, whose truth is recorded")
    truth.add_argument(
        "--sample", type=int, metavar="N", help="write N texts to label from all regions of the score, for --labels"
    )
    command.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    command.add_argument(
        "--shards", nargs="+", help="where the truth is read (default: where the pass read its pictures)"
    )
    for name, meaning in (
        ("precision", "the threshold that keeps most at this precision"),
        ("recall", "the most precise threshold at this recall"),
        ("threshold", "what this threshold gives"),
    ):
        command.add_argument(
            f"--{name}", type=float, action="append", default=[], help=f"{meaning}; also several times"
        )
    command.add_argument(
        "--out", type=Path, help="the PNG (default: calibration.png), of a sample the CSV file (default: labels.csv)"
    )
    command.set_defaults(run=calibrate_filter)


def calibrate_filter(options: argparse.Namespace) -> int:
    """Finds a threshold for stored scores from labelled texts: prints AUC and thresholds as JSON, draws precision and recall over them.

    Kept is what scores at least a threshold; precision is the share of the kept texts that fit their picture, recall the share of the
    fitting texts that are kept. With --sample it writes texts to label instead: fill in the column `label`, then give the file as
    --labels.
    """
    import json

    from blip.capfilt.calibrate import calibrate, draw, known, labelled, read_labels, write_sample

    view = _view(options)
    if options.sample is not None:
        out = options.out or Path("labels.csv")
        count = write_sample(view, options.sample, out, options.seed)
        print(f"{out}: {count} texts to label: 1 fits, 0 does not; then --labels {out}")
        return 0
    out = options.out or Path("calibration.png")
    if options.labels is not None:
        cases = labelled(view, read_labels(options.labels))
    else:
        cases = known(view, _index(view.folders[0], options.shards))
    found = calibrate(cases, options.precision, options.recall, options.threshold)
    draw(cases, out, _score(view), found)
    print(json.dumps({"score": _score(view), **found, "curve": str(out)}, indent=1))
    return 0


def _index(folder: Path, shards: list[str] | None) -> Any:
    """The index of the shards of a pass, or of these."""
    from blip.capfilt.manifest import description
    from blip.datamodules.index import open_index

    if shards:
        return open_index(shards)
    told = description(folder)
    return open_index(told["shards"], told.get("index"))

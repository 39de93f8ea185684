"""The `blip` command. Each command is a parser and a function that returns the exit status; what is heavy is imported there.

    blip caption|answer|match|embed MODEL PICTURES...
                                                what a model says of pictures, a JSON line each
    blip search MODEL VECTORS TEXT...           the pictures that fit a text best, among those embedded
    blip data index SHARDS...                   the index of tar shards, with every picture decoded once
    blip data build IMAGES CAPTIONS OUT         shards from a folder or zip of pictures and a file of captions
    blip data build --layout NAME PATHS... OUT  shards of a published data set (--help names the layouts)
    blip data answers SHARDS... --out FILE      the answers that VQA ranks, from shards of questions
    blip data vocabulary SHARDS... --out FILE   a WordPiece vocabulary learned from the captions of shards
    blip data typical SHARDS...                 the caption that fits all pictures best: what a captioner has to beat
    blip data materialize SHARDS... --records FOLDER --out FOLDER
                                                the texts that a view of CapFilt's records keeps, as shards
    blip data check SHARDS...                   what is in shards, and whether it suffices for given ranks and workers
    blip report RECORDS --out FILE.html         what a filter keeps and drops: a page to look at, and its numbers
    blip calibrate RECORDS --labels FILE        a threshold for a filter's scores from labelled texts
    blip convert IN OUT --to LAYOUT             a checkpoint in another layout: released, transformers or ours
    blip score REFERENCES HYPOTHESES            BLEU, METEOR, ROUGE-L, CIDEr, SPICE of captions; VQA's accuracy with --vqa

A user's mistake is one line on the error stream and status 1; a result goes to the output stream, progress to the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blip.cli_capfilt import add_calibrate, add_materialize, add_report
from blip.cli_model import add_model
from blip.cli_score import add_score
from blip.files import write_text

if TYPE_CHECKING:
    from blip.datamodules.index import Report, Spread

NAMED = 5  # names shown for each reason
RECORDS = "what is a row: pairs (default), questions, statements, rounds, clips or clip_questions"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line (default: of this process) and returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"blip: error: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The commands. Each group adds its own in one function, named here."""
    top = argparse.ArgumentParser(prog="blip", description="BLIP: pictures, data, checkpoints and scores.")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for add in (add_model, _add_data, add_calibrate, add_report, _add_convert, add_score):
        add(commands)
    return top


# --- blip data ---


def _add_data(commands) -> None:
    data = commands.add_parser("data", help="make, index and check shards").add_subparsers(
        metavar="WHAT", required=True
    )

    index = data.add_parser("index", help="make the index of tar shards", description=index_shards.__doc__)
    index.add_argument("shards", nargs="+", metavar="SHARDS", help="tar files, brace or glob patterns, or URLs")
    index.add_argument("--records", default="pairs", metavar="KIND", help=RECORDS)
    index.add_argument("--out", type=Path, help="the index file (default: beside the shards, or in the cache)")
    index.add_argument("--no-verify", action="store_true", help="do not decode every picture or clip once")
    index.add_argument("--workers", type=int, default=0, help="processes that share the shards (default: %(default)s)")
    index.set_defaults(run=index_shards)

    build = data.add_parser(
        "build",
        help="make shards from pictures and their annotations",
        description=build_shards.__doc__,
        usage="blip data build [options] IMAGES CAPTIONS OUT\n"
        "       blip data build --layout NAME [options] IMAGES... ANNOTATIONS... OUT",
        formatter_class=_WithLayouts,
    )
    build.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="a folder or zip of pictures (of published data also several, or clips), a file of captions (CSV, JSON or JSON lines "
        "with columns like image and caption; of published data all its files), and last the folder to make",
    )
    build.add_argument("--layout", metavar="NAME", help="the published layout of the annotations, one of those below")
    build.add_argument("--split", help="keep only the rows of this split")
    build.add_argument("--split-column", default="split", help="column that names the split (default: %(default)s)")
    build.add_argument("--shard-size", type=int, default=1000, help="pictures a shard (default: %(default)s)")
    build.set_defaults(run=build_shards)

    answers = data.add_parser("answers", help="list the answers that VQA ranks", description=list_answers.__doc__)
    answers.add_argument("shards", nargs="+", metavar="SHARDS", help="tar files, brace or glob patterns")
    answers.add_argument("--out", type=Path, required=True, help="the answer_list.json to write")
    answers.add_argument(
        "--min-count", type=int, default=9, help="questions that an answer settles at least (default: %(default)s)"
    )
    answers.set_defaults(run=list_answers)

    vocabulary = data.add_parser(
        "vocabulary", help="learn a vocabulary from captions", description=learn_vocabulary.__doc__
    )
    vocabulary.add_argument("shards", nargs="+", metavar="SHARDS", help="tar files, brace or glob patterns, or URLs")
    vocabulary.add_argument("--out", type=Path, required=True, help="the tokenizer.json to write")
    vocabulary.add_argument("--size", type=int, default=4000, help="word pieces at most (default: %(default)s)")
    vocabulary.set_defaults(run=learn_vocabulary)

    typical = data.add_parser("typical", help="find the most typical caption", description=find_typical.__doc__)
    typical.add_argument("shards", nargs="+", metavar="SHARDS", help="tar files, brace or glob patterns, or URLs")
    typical.set_defaults(run=find_typical)

    check = data.add_parser("check", help="show what is in shards", description=check_shards.__doc__)
    check.add_argument("shards", nargs="+", metavar="SHARDS", help="tar files, brace or glob patterns, or URLs")
    check.add_argument("--records", default="pairs", metavar="KIND", help=RECORDS)
    check.add_argument("--index", help="an index file made elsewhere")
    check.add_argument("--ranks", type=int, default=1, help="processes that train together (default: %(default)s)")
    check.add_argument("--workers", type=int, default=1, help="loader workers a rank (default: %(default)s)")
    check.add_argument(
        "--captions", choices=("all", "one"), default="all", help="pairs: each caption, or each picture (default: all)"
    )
    check.add_argument("--batch-size", type=int, default=75, help="rows a rank and step (default: %(default)s)")
    check.set_defaults(run=check_shards)

    add_materialize(data, _shards_done)


def index_shards(options: argparse.Namespace) -> int:
    """Reads every shard once, checks it strictly and writes the index that training reads its rows by."""
    from blip.datamodules.index import build_index

    index = build_index(
        options.shards,
        options.out,
        verify=not options.no_verify,
        progress=_shards_done,
        workers=options.workers,
        records=options.records,
    )
    _show(index.report)
    print(f"index: {index.path}")
    return 0


class _WithLayouts(argparse.HelpFormatter):
    """Help that ends with the published layouts, which are looked up only when it is asked for."""

    def format_help(self) -> str:
        from blip.datamodules.layouts.published import table

        return f"{super().format_help()}\nlayouts and the files they take:\n{table()}\n"


def build_shards(options: argparse.Namespace) -> int:
    """Packs pictures, their bytes untouched, with what is said of them into WebDataset shards; says what is left out and why."""
    from blip.datamodules.layouts import folder, published
    from blip.datamodules.layouts.packing import LEFT_OUT

    *paths, out = options.paths
    rest = {"split": options.split, "shard_size": options.shard_size, "progress": _pictures_done}
    if options.layout is not None:
        if options.split_column != "split":
            raise ValueError("--split-column is of an own file of captions; published layouts have their own")
        built = published.build(options.layout, paths, out, **rest)
    elif len(paths) == 2:
        built = folder.build(paths[0], paths[1], out, split_column=options.split_column, **rest)
    else:
        raise ValueError(f"IMAGES CAPTIONS OUT are three paths, not {len(paths) + 1}; more need --layout NAME")
    rows = ", ".join(_count(number, kind.removesuffix("s")) for kind, number in built.rows.items())
    print(
        f"{out}: {_count(built.pictures, built.thing)} ({built.bytes / 1e6:.1f} MB), {rows}, {_count(built.shards, 'shard')}"
    )
    _show_left_out({reason: len(names) for reason, names in built.reasons.items()}, built.reasons)
    if built.left_out:
        print(f"all of them: {out / LEFT_OUT}")
    return 0


def list_answers(options: argparse.Namespace) -> int:
    """Writes the most frequent answers of shards of questions as a plain JSON list, the most frequent first."""
    import json

    from blip.datamodules.answers import frequent_answers

    found = frequent_answers(options.shards, options.min_count, progress=_shards_done)
    if not found:
        raise ValueError(f"--min-count {options.min_count}: no answer settles so many questions")
    write_text(options.out, json.dumps([answer for answer, _ in found], ensure_ascii=False, indent=0) + "\n")
    print(
        f"{options.out}: {_count(len(found), 'answer')} that settle {_count(options.min_count, 'question')} or more; "
        f"first {', '.join(f'{answer} ({count})' for answer, count in found[:NAMED])}"
    )
    return 0


def learn_vocabulary(options: argparse.Namespace) -> int:
    """Learns a WordPiece vocabulary from the captions of shards, for languages and models that BERT's does not suit."""
    from blip.datamodules.index import open_index
    from blip.datamodules.shards import texts_in
    from blip.text import Tokenizer, clean_caption, train_wordpiece

    if options.size < 100:
        raise ValueError(f"--size {options.size}: too few, the single characters alone may need more")
    index = open_index(options.shards, progress=_shards_done)
    texts = [clean_caption(text, sys.maxsize) for text in texts_in(index)]
    learned = train_wordpiece(texts, options.size)
    tokenizer = Tokenizer.from_json(learned.to_str())
    lengths = sorted(len(ids) for ids in tokenizer.encode(texts, sys.maxsize))
    write_text(options.out, learned.to_str(pretty=True))
    print(
        f"{options.out}: {_count(len(tokenizer), 'piece')} with [DEC] and [ENC], from {_count(len(texts), 'caption')}; "
        f"a caption has {sum(lengths) / len(lengths):.1f} on average, 99 of 100 at most {lengths[len(lengths) * 99 // 100]}"
    )
    return 0


def find_typical(options: argparse.Namespace) -> int:
    """Prints the caption that has the highest CIDEr when it is said of every picture of the shards, and that CIDEr in percent."""
    import numpy as np

    from blip.datamodules.index import open_index
    from blip.datamodules.shards import texts_in
    from blip.metrics.typical import typical_caption

    index = open_index(options.shards, progress=_shards_done)
    texts = texts_in(index)
    found, cider = typical_caption([[next(texts) for _ in range(n)] for n in np.diff(index.text_starts).tolist()])
    print(found)
    print(f"CIDEr {cider:.2f} of {_count(len(index.pictures), 'picture')}", file=sys.stderr)
    return 0


def check_shards(options: argparse.Namespace) -> int:
    """Shows counts, sizes, lengths of texts and broken rows of shards, and whether they suffice; status 1 if not."""
    from blip.datamodules.index import open_index

    for name in ("ranks", "workers", "batch_size"):
        if getattr(options, name) < (0 if name == "workers" else 1):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: too few")
    if options.captions == "one" and options.records != "pairs":
        raise ValueError(f"--captions one is for pairs; of {options.records} each is a row")
    index = open_index(options.shards, options.index, progress=_shards_done, records=options.records)
    report = index.report
    _show(report)
    rows = report.texts if options.captions == "all" else report.pictures
    enough = _suffices(rows, index.kind.one, options.ranks, options.workers, options.batch_size)
    if 0 < report.shards < options.ranks * options.workers:
        print(
            f"note: fewer shards than workers ({options.ranks} x {options.workers}); here rows are dealt one by one, so that is "
            "no matter, but readers that deal whole shards would leave workers without any"
        )
    return 0 if enough else 1


def _suffices(rows: int, row: str, ranks: int, workers: int, batch_size: int) -> bool:
    """Prints what an epoch of so many rows is for this layout; False where it has no step."""
    steps, rest = divmod(rows, ranks * batch_size)
    layout = f"{_count(ranks, 'rank')} x {_count(batch_size, row)} a step"
    if steps == 0:
        print(f"NOT ENOUGH for {layout}: an epoch has {_count(rows, row)}")
        return False
    print(
        f"enough for {layout}: {_count(steps, 'step')} an epoch on every rank, {_count(rest, row)} left out of each epoch"
    )
    if steps < workers:
        print(f"note: whole batches go to workers, so only {steps} of the {workers} of a rank have work")
    return True


def _show(report: Report) -> None:
    from blip.datamodules.records import kind_of

    kind = kind_of(report.records)
    print(
        f"{_count(report.shards, 'shard')}, {report.bytes / 1e6:.1f} MB of {kind.name.replace('_', ' ')}: "
        f"{_count(report.pictures, kind.seen)}, {_count(report.texts, kind.row)}"
    )
    for name, spread, unit in (
        ("width", report.width, "px"),
        ("height", report.height, "px"),
        ("clip" if kind.clips else "picture", report.image_bytes, "bytes"),
        (kind.row, report.caption_words, "words"),
    ):
        print(f"{name:>9}: {_spread(spread, unit)}")
    if not report.verified:
        print("pictures were not decoded: broken ones are not known (index again without --no-verify)")
    _show_left_out(report.skipped, report.skipped_names)
    for note in report.notes:
        print(f"note: {note}")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _spread(spread: Spread, unit: str) -> str:
    if spread.median is None:
        return "not measured"
    return f"{spread.min:g} to {spread.max:g} {unit}, median {spread.median:g}"


def _show_left_out(counts: dict[str, int], names: dict[str, list[str]]) -> None:
    if counts:
        print(f"left out: {sum(counts.values())}")
    for reason, count in counts.items():
        shown = ", ".join(names[reason][:NAMED])
        print(f"{count:>8} {reason}: {shown}{', ...' * (count > NAMED)}")


def _progress(unit: str) -> Callable[..., None]:
    """A counter on one line of a terminal; silent elsewhere."""

    def show(done: int, of: int, name: str = "") -> None:
        if sys.stderr.isatty():
            print(
                f"\r{done}/{of or '?'} {unit} {name}\033[K",
                end="" if done != of else "\r\033[K",
                file=sys.stderr,
                flush=True,
            )

    return show


_shards_done, _pictures_done = _progress("shards"), _progress("pictures")


# --- blip convert ---


def _add_convert(commands) -> None:
    convert = commands.add_parser(
        "convert", help="write a checkpoint in another layout", description=convert_checkpoint.__doc__
    )
    convert.add_argument("source", type=Path, metavar="IN", help="a .pth, a .safetensors, a .ckpt of ours or a folder")
    convert.add_argument("destination", type=Path, metavar="OUT", help="the file to write; a folder for transformers")
    convert.add_argument("--to", required=True, choices=("released", "transformers", "blip"))
    convert.add_argument("--task", help="which released model or which class of transformers it is for")
    convert.add_argument("--tokenizer", type=Path, help="vocab.txt or tokenizer.json, where the source holds none")
    convert.add_argument("--heads", nargs=2, type=int, metavar=("IMAGE", "TEXT"), help="where they are not width / 64")
    convert.set_defaults(run=convert_checkpoint)


def convert_checkpoint(arguments: argparse.Namespace) -> int:
    """Writes the weights of IN, a released file, a folder of transformers or a checkpoint of ours, in another layout.

    Tells what went over and what the target cannot hold.
    """
    from blip.modules.checkpoint import convert
    from blip.text import Tokenizer

    tokenizer = Tokenizer.load(arguments.tokenizer).to_json() if arguments.tokenizer else ""
    heads = tuple(arguments.heads) if arguments.heads else None
    print(convert(arguments.source, arguments.destination, arguments.to, arguments.task, tokenizer, heads))
    return 0


if __name__ == "__main__":
    sys.exit(main())

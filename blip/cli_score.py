"""`blip score`: official metrics of files of captions or answers, as JSON. Imports neither torch nor anything of the model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_score(commands) -> None:
    score = commands.add_parser(
        "score",
        help="official metrics of captions or answers",
        description=score_files.__doc__,
        usage="blip score REFERENCES HYPOTHESES [--metrics NAME ...]\n"
        "       blip score --vqa QUESTIONS ANNOTATIONS RESULTS",
    )
    score.add_argument("files", nargs="+", type=Path, metavar="FILE", help="two files, or three with --vqa")
    score.add_argument("--vqa", action="store_true", help="questions, annotations and results in VQA's layout")
    score.add_argument(
        "--metrics", nargs="+", metavar="NAME", help="bleu, meteor, rouge_l, cider, spice (default: all)"
    )
    score.set_defaults(run=score_files)


def score_files(options: argparse.Namespace) -> int:
    """Prints official scores as JSON, with the names and the scale of the reference tools; notes go to the error stream.

    Captions are in COCO's layouts (annotations, results) or plain {id: [captions]}; the images that have a caption are scored.
    Answers are VQA's results; every question needs one.
    """
    names = ("QUESTIONS", "ANNOTATIONS", "RESULTS") if options.vqa else ("REFERENCES", "HYPOTHESES")
    if len(options.files) != len(names):
        raise ValueError(f"{len(options.files)} file(s) given, {len(names)} needed: {' '.join(names)}")
    if options.vqa and options.metrics:
        raise ValueError("--metrics chooses among metrics of captions; --vqa has one")
    notes: list[str] = []
    if options.vqa:
        from blip.metrics.vqa import score_vqa_files

        scores = score_vqa_files(*options.files)
    else:
        from blip.metrics.captions import METRICS, score_caption_files

        references, captions = options.files
        scores, notes = score_caption_files(references, captions, options.metrics or METRICS)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(json.dumps(scores, indent=1))
    return 0

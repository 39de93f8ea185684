"""A filter of real photos: half of the captions of a held-out set are those of other photos; does it find them?

    python -m benchmarks.photo_filter CHECKPOINT VAL [--captioner CHECKPOINT --photos SHARDS] [--out FOLDER] [--json FILE]

CHECKPOINT is a model of photos (`experiment=flickr8k`), VAL the shards of a set that it has not seen: of each photo the first caption
is taken, and half of the photos, by a seed, get that of another of them. The areas under the ROC curve of both scores stand beside 0.5,
which is chance. --photos: any other shards of photos, which are captioned and filtered in one pass; the report lies in FOLDER.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import begin, end, row
from blip.capfilt import records
from blip.capfilt.filter import MatchScorer
from blip.capfilt.generate import Captioner
from blip.capfilt.passes import Pass
from blip.capfilt.report import write_report
from blip.datamodules.index import open_index
from blip.datamodules.records import PAIRS, entries_of
from blip.datamodules.shards import Reader, Span
from blip.datamodules.tars import as_json, write_tar
from blip.datamodules.views import HUMAN, SYNTHETIC, View
from blip.metrics.rates import auc


def shuffled(shards: str, out: Path, seed: int) -> Path:
    """Writes the photos of these shards as one, half of them with a caption of another; KEY.json says which under `own`."""
    index = open_index(shards)
    count = len(index.pictures)
    places = [index.places(number) for number in range(count)]
    read = Reader().read([Span(index.shard(shard), *parts) for shard, parts, _ in places])
    captions = [entries_of(text, is_json, PAIRS)[0][0] for (_, text), (_, _, is_json) in zip(read, places, strict=True)]
    rng = random.Random(seed)
    wrong = rng.sample(range(count), count // 2)
    said = list(range(count))
    for number, other in zip(wrong, wrong[1:] + wrong[:1], strict=True):  # a ring, so none keeps its own
        said[number] = other

    def samples() -> Any:
        for number, (image, _) in enumerate(read):
            record = {"captions": [captions[said[number]]], "own": said[number] == number}
            yield f"{number:06d}", {"jpg": image, "json": as_json(record)}

    out.mkdir(parents=True, exist_ok=True)
    write_tar(out / "00000.tar", samples())
    np.save(out / "own.npy", np.array(said) == np.arange(count))
    return out / "00000.tar"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("val")
    parser.add_argument("--captioner", help="default: CHECKPOINT")
    parser.add_argument("--photos")
    parser.add_argument("--out", type=Path, default=Path("runs/photo_filter"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    head = begin(f"{options.val}, half of the captions of other photos")
    scorers = {"filter": partial(MatchScorer, options.checkpoint)}

    shard = shuffled(options.val, options.out / f"shuffled_{options.seed}", options.seed)
    folder = options.out / f"filter_{options.seed}"
    Pass(str(shard), scorers=scorers).run(folder)
    found = records.read(records.files(folder))
    own = np.load(shard.parent / "own.npy")[found["record"].to_numpy()]
    rows = []
    for score in ("itm", "itc"):
        values = found[score].to_numpy()
        area = auc(values, own)
        kept = values >= 0.5
        print(f"{score}: AUC {area.value:.3f}, 95 % interval {area.low:.3f} to {area.high:.3f}")
        rows.append(row(f"AUC of own against other captions by {score}", area.value, "", "chance", 0.5))
        rows[-1]["interval"] = [round(area.low, 4), round(area.high, 4)]
        if score == "itm":
            print(f"kept at 0.5: {kept[own].mean():.1%} of the own captions, {kept[~own].mean():.1%} of the others")

    if options.photos:
        folder = options.out / "photos"
        captioners = {"captioner": partial(Captioner, options.captioner or options.checkpoint)}
        Pass(options.photos, captioners=captioners, scorers=scorers, source=HUMAN).run(folder)
        sources = (HUMAN, SYNTHETIC)
        numbers = write_report(options.out / "report.html", View(str(folder), sources=sources), title="Photos")
        print(f"{options.out / 'report.html'}: {numbers['all/kept']} of {numbers['all/texts']} texts kept")
    end(head, rows, options.json)


if __name__ == "__main__":
    main()

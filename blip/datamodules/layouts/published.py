"""The published layouts by name, and shards from any of them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from blip.datamodules.layouts.coco import coco_captions
from blip.datamodules.layouts.karpathy import flickr_tokens, karpathy
from blip.datamodules.layouts.media import Media
from blip.datamodules.layouts.nlvr2 import nlvr2
from blip.datamodules.layouts.packing import Built, Entry, LeftOut, check_out, pack
from blip.datamodules.layouts.released import released_captions, released_questions, released_statements
from blip.datamodules.layouts.video import msrvtt, msvd, video_questions
from blip.datamodules.layouts.visdial import visdial
from blip.datamodules.layouts.vqa import visual_genome, vqa_v2


@dataclass(frozen=True)
class Layout:
    """A published layout.

    entries: the files of annotations (and the split, where `splits` names what it chooses) -> entries of shards
    takes: which files, in a line
    """

    entries: Callable[..., Iterable[Entry | LeftOut]]
    takes: str
    splits: str = ""
    clips: bool = False


LAYOUTS = {
    "karpathy": Layout(
        karpathy, "dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json", "train (with restval), val, test"
    ),
    "coco_captions": Layout(coco_captions, "captions_val2014.json ..., image_info_test2014.json"),
    "nocaps": Layout(
        coco_captions,
        "nocaps_val_4500_captions.json, nocaps_test_image_info.json",
        "in-domain, near-domain, out-domain",
    ),
    "flickr": Layout(flickr_tokens, "results_20130124.token or Flickr8k.token.txt, and lists of names (test.txt)"),
    "vqa_v2": Layout(vqa_v2, "v2_OpenEnded_mscoco_*_questions.json, and v2_mscoco_*_annotations.json where there are"),
    "visual_genome": Layout(visual_genome, "question_answers.json"),
    "nlvr2": Layout(nlvr2, "train.json, dev.json, test1.json (JSON lines)"),
    "visdial": Layout(visdial, "visdial_1.0_*.json, and visdial_1.0_*_dense_annotations.json where there are"),
    "msrvtt": Layout(
        msrvtt,
        "MSRVTT_JSFUSION_test.csv, msrvtt_test.jsonl, or MSRVTT_data.json and MSRVTT_train.9k.csv",
        "train, validate, test (MSRVTT_data.json)",
        clips=True,
    ),
    "msvd": Layout(msvd, "AllVideoDescriptions.txt, lists of clips, youtube_mapping.txt", clips=True),
    "msrvtt_qa": Layout(partial(video_questions, name="video"), "train_qa.json, val_qa.json, test_qa.json", clips=True),
    "msvd_qa": Layout(
        partial(video_questions, name="vid"),
        "train_qa.json, val_qa.json, test_qa.json, youtube_mapping.txt",
        clips=True,
    ),
    "blip_captions": Layout(
        released_captions, "coco_karpathy_*.json, flickr30k_*.json, nocaps_*.json of the released code"
    ),
    "blip_vqa": Layout(
        released_questions, "vqa_train.json, vqa_val.json, vqa_test.json, vg_qa.json of the released code"
    ),
    "blip_nlvr": Layout(released_statements, "nlvr_train.json, nlvr_dev.json, nlvr_test.json of the released code"),
}


def table() -> str:
    """The layouts, one a line, with the files each takes."""
    width = max(map(len, LAYOUTS))
    return "\n".join(
        f"  {name:<{width}}  {layout.takes}" + (f"; --split {layout.splits}" if layout.splits else "")
        for name, layout in LAYOUTS.items()
    )


def build(
    layout: str,
    paths: Sequence[str | Path],
    out: str | Path,
    split: str | None = None,
    shard_size: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> Built:
    """Writes the shards of a published data set from files on the disk into the folder `out`, whole or not at all.

    `paths`: folders or zips of pictures (or clips) and files of annotations, in any order. ValueError for a layout or split that
    is not known, for a file that is not as published, and where no picture was found; FileNotFoundError for a path.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"no layout {layout!r}; there are\n{table()}")
    how, out = LAYOUTS[layout], Path(out)
    if split is not None and not how.splits:
        raise ValueError(f"--split {split}: {layout} has a file for each split; give that file, and no split")
    places, files = list[Path](), list[Path]()
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        (places if path.is_dir() or zipfile.is_zipfile(path) else files).append(path)
    if not places or not files:
        missing = "folder or zip of pictures" if not places else "file of annotations (unpacked)"
        raise ValueError(f"no {missing} among {', '.join(map(str, paths))}; {layout} takes {how.takes}")
    check_out(out, shard_size)
    chosen: dict[str, Any] = {"split": split} if how.splits else {}
    with Media(places) as media:
        return pack(how.entries(files, **chosen), media, out, shard_size, how.clips, progress)

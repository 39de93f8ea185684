"""Captions of COCO, Flickr30k and Flickr8k: Karpathy's splits, and the token files that the Flickr sets were published with.

dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json
    {"images": [{"filename", "filepath"?, "cocoid"?, "split", "sentences": [{"raw"}]}]}
results_20130124.token (Flickr30k), Flickr8k.token.txt
    NAME.jpg#0<tab>caption; a list of names (Flickr_8k.testImages.txt, Entities' test.txt) chooses a split
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from blip.datamodules.layouts.coco import coco_names
from blip.datamodules.layouts.packing import Entry, LeftOut, file_key
from blip.datamodules.layouts.reading import Record, items, text_lines

WITH = {"train": ("train", "restval")}  # everyone trains on COCO's `restval` too: 113,287 pictures


def karpathy(files: Sequence[Path], split: str | None = None) -> Iterator[Entry]:
    """The pictures of a split (all without one) with their captions as they were written; `train` is with `restval`."""
    for path in files:
        splits: Counter[str] = Counter()
        wanted = None if split is None else WITH.get(split, (split,))
        for _, where, value in items(path, "images"):
            picture = Record(value, where)
            part = picture.text("split")
            splits[part] += 1
            if wanted is not None and part not in wanted:
                continue
            name = picture.text("filename")
            key = str(picture.number("cocoid")) if "cocoid" in picture else file_key(name)
            folder = f"{picture.text('filepath')}/" if "filepath" in picture else ""
            captions = [sentence.text("raw") for sentence in picture.records("sentences")]
            yield Entry(key, (coco_names(folder + name),), {"captions": captions})
        if wanted is not None and not any(splits[part] for part in wanted):
            raise ValueError(f"{path}: no picture of the split {split!r}; found {dict(splits.most_common(10))}")


def flickr_tokens(files: Sequence[Path]) -> Iterator[Entry | LeftOut]:
    """The pictures of the token files with their captions; only those of the lists, where there are lists."""
    captions: dict[str, list[str]] = {}
    listed: dict[str, None] = {}
    lists = False
    for path in files:
        rows = list(text_lines(path))
        if all(len(line.split()) == 1 for _, line in rows):
            lists = True
            listed |= dict.fromkeys(PurePosixPath(line).stem for _, line in rows)
            continue
        for where, line in rows:
            name, tab, caption = line.partition("\t")
            name, mark, _ = name.rpartition("#")
            if not tab or not mark or not name:
                raise ValueError(f"{where}: NAME.jpg#NUMBER, a tab and a caption are expected, not {line[:60]!r}")
            captions.setdefault(name, []).append(caption)
    if not captions:
        raise ValueError(f"{', '.join(map(str, files))}: no captions; a token file is needed beside the lists")
    for name, said in captions.items():
        if not lists or file_key(name) in listed:
            listed.pop(file_key(name), None)
            yield Entry(file_key(name), ((name,),), {"captions": said})
    for name in listed:
        yield LeftOut("picture without a caption", name)

"""Clips with captions or questions: MSR-VTT and MSVD, as published and as everyone uses them.

MSRVTT_JSFUSION_test.csv      key,vid_key,video_id,sentence        the 1k-A test: one sentence a clip
MSRVTT_data.json              {"videos": [{"video_id", "split"}], "sentences": [{"video_id", "caption"}]}
MSRVTT_train.9k.csv           video_id                             chooses among the clips of MSRVTT_data.json
msrvtt_test.jsonl             {"clip_name", "caption"}             the released code's list of the 1k-A test
AllVideoDescriptions.txt      CLIP a caption of it                 MSVD; a list of clips, one a line, chooses a split
train_qa.json ...             [{"id", "question", "answer", "video_id": 7}]     MSRVTT-QA and MSVD-QA
youtube_mapping.txt           CLIP vid7                            what MSVD-QA calls the clips
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from blip.datamodules.layouts.packing import Entry, LeftOut
from blip.datamodules.layouts.reading import Record, items, lines, rows, text_lines


def msrvtt(files: Sequence[Path], split: str | None = None) -> Iterator[Entry | LeftOut]:
    """The clips with their captions; `split` (train, validate, test) and lists of clips choose among those of MSRVTT_data.json."""
    captions: dict[str, list[str]] = {}
    chosen: dict[str, None] | None = None
    splits: dict[str, str] = {}
    for path in files:
        if path.suffix == ".csv":
            found = list(rows(path))
            if found and "sentence" not in found[0].value:
                chosen = (chosen or {}) | dict.fromkeys(row.text("video_id") for row in found)
            else:
                _add(captions, ((row.text("video_id"), row.text("sentence")) for row in found))
        elif path.suffix == ".jsonl":
            records = (Record(value, where) for _, where, value in lines(path))
            _add(captions, ((record.text("clip_name"), record.text("caption")) for record in records))
        else:
            for name, where, value in items(path, "videos", "sentences"):
                record = Record(value, where)
                if name == "videos":
                    splits[record.text("video_id")] = record.text("split")
                else:
                    _add(captions, [(record.text("video_id"), record.text("caption"))])
    if split is not None:
        if split not in splits.values():
            raise ValueError(
                f"no clip of the split {split!r}: {dict(Counter(splits.values())) or 'only MSRVTT_data.json has splits'}"
            )
        wanted = [clip for clip in splits if splits[clip] == split]
        chosen = dict.fromkeys(clip for clip in wanted if chosen is None or clip in chosen)
    return _clips(captions, chosen, {}, files)


def msvd(files: Sequence[Path]) -> Iterator[Entry | LeftOut]:
    """The clips with their captions; of several files some may be lists of clips, and one the mapping to vid1, vid2, ..."""
    captions: dict[str, list[str]] = {}
    chosen: dict[str, None] | None = None
    other_names: dict[str, str] = {}
    for path in files:
        found = [(where, *line.partition(" ")[::2]) for where, line in text_lines(path)]
        if all(not text for _, _, text in found):
            chosen = (chosen or {}) | dict.fromkeys(clip for _, clip, _ in found)
        elif _is_mapping(text for _, _, text in found):
            other_names |= {clip: text.strip() for _, clip, text in found}
        else:
            for where, clip, text in found:
                if not text:
                    raise ValueError(f"{where}: the clip {clip[:60]!r} has no caption")
                captions.setdefault(clip, []).append(text.strip())
    return _clips(captions, chosen, other_names, files)


def video_questions(files: Sequence[Path], name: str) -> Iterator[Entry]:
    """The clips that are asked about, each question with its one answer.

    name: what stands before a clip's number, `video` in MSRVTT-QA, `vid` in MSVD-QA; in the latter the clips may also be called
    as in youtube_mapping.txt, where that is given.
    """
    clips: dict[str, list[dict[str, Any]]] = {}
    mapped: dict[str, str] = {}
    for path in files:
        if path.suffix == ".txt":
            found = [line.split() for _, line in text_lines(path)]
            if not all(len(line) == 2 for line in found) or not _is_mapping(line[1] for line in found):
                raise ValueError(f"{path}: lines of a clip and its number, `CLIP vid7`, are expected")
            mapped |= {number: clip for clip, number in found}
            continue
        for _, where, value in items(path, ""):
            record = Record(value, where)
            question = {"id": record.id("id"), "question": record.text("question")}
            answers = [record.text("answer")] if "answer" in record else []
            clip = record.id("video_id")
            clip = f"{name}{clip}" if isinstance(clip, int) else clip
            clips.setdefault(clip, []).append(question | {"answers": answers})
    for clip, questions in clips.items():
        names = (clip, mapped[clip]) if clip in mapped else (clip,)
        yield Entry(clip, (names,), {"questions": questions})


def _is_mapping(texts: Iterable[str]) -> bool:
    return all(re.fullmatch(r"vid\d+", text.strip()) for text in texts)


def _add(captions: dict[str, list[str]], pairs: Iterable[tuple[str, str]]) -> None:
    for clip, caption in pairs:
        captions.setdefault(clip, []).append(caption)


def _clips(
    captions: dict[str, list[str]], chosen: dict[str, None] | None, other_names: dict[str, str], files: Sequence[Path]
) -> Iterator[Entry | LeftOut]:
    if not captions:
        raise ValueError(f"{', '.join(map(str, files))}: no captions; a list of clips needs the file of their captions")
    for clip in captions if chosen is None else chosen:
        also = (other_names[clip],) if clip in other_names else ()
        if clip in captions:
            yield Entry(clip, ((clip, *also),), {"captions": captions[clip]})
        else:
            yield LeftOut("clip without a caption", clip)

"""The answers that VQA ranks: the most frequent ones of shards of questions, as the plain list that others read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from blip.datamodules.locations import expand, is_url
from blip.datamodules.records import QUESTIONS, entries_of
from blip.datamodules.scan import MAX_TEXT_BYTES, members


def frequent_answers(
    shards: str | Path | Sequence[str | Path],
    min_count: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[tuple[str, int]]:
    """(answer, of how many questions it is what most humans said), the most frequent first, down to `min_count` questions.

    Of answers that as many humans gave, the one said first counts. Answers count as they were written, for that is how a model
    learns them; the lists of 3,129 answers in use are of normalised ones that settle 9 questions of VQA v2's training and
    validation parts. ValueError where no question has an answer, or a shard is damaged.
    """
    counts: Counter[str] = Counter()
    locations = expand(shards)
    for number, location in enumerate(locations):
        if is_url(location):
            raise ValueError(f"{location}: answers are counted in local shards")
        counts.update(_answers(location))
        if progress is not None:
            progress(number + 1, len(locations), location)
    if not counts:
        raise ValueError(f"no question with an answer in {len(locations)} shards, of which the first is {locations[0]}")
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(answer, count) for answer, count in ranked if count >= min_count]


def _answers(location: str) -> Counter[str]:
    """Of one shard, how many questions each answer settles."""
    counts: Counter[str] = Counter()
    try:
        with open(location, "rb") as file:
            for member in members(file, os.fstat(file.fileno()).st_size):
                plain = member.isreg() and not member.issparse()
                if not plain or not member.name.endswith(".json") or member.size > MAX_TEXT_BYTES:
                    continue
                file.seek(member.offset_data)
                try:
                    questions, _ = entries_of(file.read(member.size), True, QUESTIONS)
                except ValueError:
                    continue  # another kind of record
                said = (Counter(question["answers"]) for question in questions)
                counts.update(answers.most_common(1)[0][0] for answers in said if answers)
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error
    return counts

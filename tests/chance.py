"""What can be had in the embedded world without seeing: answers by kind and by words alone, learnt in training, scored in the test.

python -m tests.chance WORLD    prints accuracies in percent of each kind of questions, statements and rounds drawn into WORLD
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple


class Item(NamedTuple):
    """One thing that is asked: its kind, its words without the picture, what could be said, and which of these is true."""

    kind: str
    words: str
    options: tuple[Hashable, ...]
    answer: Hashable


def records(folder: Path) -> Iterator[dict]:
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    yield json.load(tar.extractfile(member))  # type: ignore[arg-type]


def items(folder: Path) -> list[Item]:
    """All that the records of a split ask."""
    found = []
    for record in records(folder):
        for entry in record.get("questions", []):
            found.append(Item(entry["question_type"], entry["question"], (), entry["answers"][0]))
        for entry in record.get("statements", []):
            found.append(Item(entry["statement_type"], entry["sentence"], (), entry["label"]))
        for entry in record.get("rounds", []):
            asks = re.split(r" (?:is|are|does) ", entry["question"])[0]
            found.append(Item("rounds", asks, tuple(entry["options"]), entry["answer"]))
    return found


def blind(train: Sequence[Item], test: Sequence[Item], by_words: bool) -> dict[str, float]:
    """Accuracy in percent by kind, and of all, of who says what was most often true of the kind, or of the very words.

    Of options, who picks the one that was most often true in relation to how often it stood there.
    """
    true: defaultdict[Hashable, Counter] = defaultdict(Counter)
    offered: defaultdict[Hashable, Counter] = defaultdict(Counter)
    for item in train:
        for asked in (item.kind, (item.kind, item.words)):
            true[asked][item.answer] += 1
            offered[asked].update(item.options)
    right, all_of = Counter[str](), Counter[str]()
    for item in test:
        key: Hashable = (item.kind, item.words) if by_words and (item.kind, item.words) in true else item.kind
        if item.options:
            guess = max(item.options, key=lambda option: (true[key][option] + 0.1) / (offered[key][option] + 2))
        else:
            guess = true[key].most_common(1)[0][0]
        for name in (item.kind, "all"):
            all_of[name] += 1
            right[name] += guess == item.answer
    return {name: 100 * right[name] / number for name, number in all_of.items()}


def main(folder: Path) -> None:
    for part in ("questions", "statements", "rounds"):
        if (folder / part).is_dir():
            train, test = items(folder / part / "train"), items(folder / part / "test")
            print(f"{part}: {len(train)} to learn from, {len(test)} to test on")
            by_kind, by_words = (blind(train, test, by_words) for by_words in (False, True))
            for kind in sorted(by_kind):
                print(f"  {kind:12s} {by_kind[kind]:5.1f} by kind  {by_words[kind]:5.1f} by words")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Parts of the embedded world for tasks beyond pairs: drawn beside the pairs, each when a run first asks for it.

    questions/{train,val,test}/*.tar     KEY.jpg, KEY.json {"questions": [...], "scene": {...}}
    statements/{train,val,test}/*.tar    KEY.0.jpg, KEY.1.jpg, KEY.json {"statements": [...], "scenes": [left, right]}
    rounds/{train,val,test}/*.tar        KEY.jpg, KEY.json {"caption": "...", "rounds": [...], "scene": {...}}
    clips/{val,test}/*.tar               KEY.mp4, KEY.json {"captions": [...], "questions": [...], "scene": {...}, "tracks": [...]}

Contents of the world's val and test are those of each part's val and test, drawn at other places, and occur in no training
part: whoever was pre-trained on the world's pairs has met none of them. Each part is whole or not at all, and its bytes
depend on seed and sizes alone.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import cv2

from blip.datamodules.dialogues import DialoguesDataModule
from blip.datamodules.drawn import drawn
from blip.datamodules.pairs import PairsDataModule
from blip.datamodules.questions import QuestionsDataModule
from blip.datamodules.shapes import CAPTIONS, HELD_OUT, VERSION, held_out_scenes, write_world
from blip.datamodules.shapes_dialogues import THINGS, dialogue
from blip.datamodules.shapes_language import captions
from blip.datamodules.shapes_motion import film, mp4, tracks
from blip.datamodules.shapes_questions import ANSWER_TYPES, Balance, Question, ask
from blip.datamodules.shapes_scenes import Scene, draw_scene, jpeg, place, seeded
from blip.datamodules.shapes_statements import state
from blip.datamodules.statements import StatementsDataModule
from blip.datamodules.stream import StreamDataModule
from blip.datamodules.tars import as_json, write_tar

SHARD = 500  # records of a shard, among which answers are even
QUESTIONS = 4  # of one picture
PEOPLE = 10  # who all give the same answer, as many as in VQA v2

Samples = Iterator[tuple[str, dict[str, bytes]]]


@dataclass(frozen=True)
class Scenes:
    """Where a part's split has its scenes from: new ones for training, the world's held-out contents for val and test."""

    seed: int
    part: str
    split: str
    excluded: frozenset[tuple]
    held_out: tuple[Scene, ...]

    def rng(self, number: int) -> random.Random:
        """The draws of record `number`."""
        return seeded(self.seed, self.part, self.split, number)

    def scene(self, things: int, number: int, rng: random.Random) -> Scene:
        """A scene of so many things; of a held-out split its content is that of the `number`-th of these."""
        if self.split == "train":
            return draw_scene(rng, things, excluded=self.excluded)
        described = [s.description for s in self.held_out[things - 1 :: 3]]
        if not described:
            raise ValueError(f"{self.part}: the world's {self.split} has no scene of {things} things; make it larger")
        description = described[number % len(described)]
        return Scene(description, place(rng, description))


def write_part(
    folder: str | Path, part: str, seed: int, sizes: Mapping[str, int], world: Mapping[str, int], processes: int = 2
) -> Path:
    """Writes a part of the world into `folder`, whole or not at all, and returns it; a part that is there is kept.

    part: of PARTS; sizes: numbers of records of its splits; world: sizes of the world's splits, whose val and test it shares.
    ValueError as `write_world`.
    """
    if part not in PARTS:
        raise ValueError(f"{part!r} is no part of the world; there are {', '.join(PARTS)}")
    splits, draw = PARTS[part]
    if set(sizes) != set(splits) or min(sizes.values()) < 0:
        raise ValueError(f"sizes of {part}: a number for each of {', '.join(splits)} is needed, got {dict(sizes)}")
    held_out = held_out_scenes(seed, world)
    excluded = frozenset(scene.description.content for split in HELD_OUT for scene in held_out[split])

    def write(partial: Path) -> None:
        with ProcessPoolExecutor(processes, initializer=cv2.setNumThreads, initargs=(0,)) as pool:
            jobs = []
            for split in splits:
                scenes = Scenes(seed, part, split, excluded, tuple(held_out.get(split, ())))
                (partial / split).mkdir()
                for shard, start in enumerate(range(0, sizes[split], SHARD)):
                    numbers = range(start, min(start + SHARD, sizes[split]))
                    jobs.append(pool.submit(_write_shard, partial / split / f"{shard:05d}.tar", draw, scenes, numbers))
            for job in jobs:
                job.result()

    description = {"version": VERSION, "seed": seed, "part": part, "sizes": {split: sizes[split] for split in splits}}
    description["held_out"] = {split: world[split] for split in HELD_OUT}
    return drawn(Path(folder).absolute(), description, write)


def _write_shard(path: Path, draw: Callable[[Scenes, range], Samples], scenes: Scenes, numbers: range) -> None:
    write_tar(path, draw(scenes, numbers))


def _questions(scenes: Scenes, numbers: range) -> Samples:
    balance = Balance()
    for number in numbers:
        rng, key = scenes.rng(number), f"{number:06d}"
        scene = scenes.scene(number % 3 + 1, number // 3, rng)
        record = {"questions": _asked(key, ask(scene, rng, balance, QUESTIONS)), "scene": scene.to_json()}
        yield key, {"jpg": jpeg(scene, rng), "json": as_json(record)}


def _statements(scenes: Scenes, numbers: range) -> Samples:
    balance = Balance()
    for number in numbers:
        rng, key = scenes.rng(number), f"{number:06d}"
        left = scenes.scene(number % 3 + 1, number // 3, rng)
        right = scenes.scene(rng.randint(1, 3), rng.randrange(2**32), rng)
        said = state(left.description, right.description, rng, balance)
        entries = [
            {"id": f"{key}-{n}", "sentence": one.text, "label": one.truth, "statement_type": one.kind}
            for n, one in enumerate(said)
        ]
        record = {"statements": entries, "scenes": [left.to_json(), right.to_json()]}
        yield key, {"0.jpg": jpeg(left, rng), "1.jpg": jpeg(right, rng), "json": as_json(record)}


def _rounds(scenes: Scenes, numbers: range) -> Samples:
    for number in numbers:
        rng = scenes.rng(number)
        scene = scenes.scene(THINGS, number, rng)
        yield (
            f"{number:06d}",
            {
                "jpg": jpeg(scene, rng),
                "json": as_json(dialogue(scene, rng) | {"scene": scene.to_json()}),
            },
        )


def _clips(scenes: Scenes, numbers: range) -> Samples:
    balance = Balance()
    for number in numbers:
        rng, key = scenes.rng(number), f"{number:06d}"
        scene = scenes.scene(number % 2 + 2, number // 2, rng)
        turns = tracks(scene, rng)
        record = {
            "captions": captions(scene.description, rng, CAPTIONS),
            "questions": _asked(key, ask(scene, rng, balance, QUESTIONS)),
            "scene": scene.to_json(),
            "tracks": [turn._asdict() for turn in turns],
        }
        yield key, {"mp4": mp4(film(scene, turns, f"{scenes.seed}/{scenes.split}/{key}")), "json": as_json(record)}


def _asked(key: str, questions: list[Question]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{key}-{number}",
            "question": question.text,
            "answers": [question.answer] * PEOPLE,
            "question_type": question.kind,
            "answer_type": ANSWER_TYPES.get(question.kind, "other"),
        }
        for number, question in enumerate(questions)
    ]


PARTS: dict[str, tuple[tuple[str, ...], Callable[[Scenes, range], Samples]]] = {
    "questions": (("train", "val", "test"), _questions),
    "statements": (("train", "val", "test"), _statements),
    "rounds": (("train", "val", "test"), _rounds),
    "clips": (("val", "test"), _clips),
}
"""Part -> (its splits, what draws the records of a shard)."""


class _Part(StreamDataModule):
    """A part of the embedded world, drawn into `folder`/part first where it is missing, and so is the world.

    `world_seed` and `sizes` are those of `write_world`, `part_sizes` of `write_part`; all else goes to the data module of
    its records, whose sources, sets and tokenizer name files in `folder`.
    """

    part: ClassVar[str]

    def __init__(
        self,
        folder: str | Path,
        world_seed: int,
        sizes: Mapping[str, int],
        part_sizes: Mapping[str, int],
        **stream: Any,
    ) -> None:
        super().__init__(**stream)
        self.folder, self.world_seed, self.sizes = Path(folder), world_seed, dict(sizes)
        self.part_sizes = dict(part_sizes)

    def prepare_data(self) -> None:
        write_world(self.folder, self.world_seed, self.sizes)
        write_part(self.folder / self.part, self.part, self.world_seed, self.part_sizes, self.sizes)
        super().prepare_data()


class ShapesQuestions(_Part, QuestionsDataModule):
    part = "questions"


class ShapesStatements(_Part, StatementsDataModule):
    part = "statements"


class ShapesDialogues(_Part, DialoguesDataModule):
    part = "rounds"


class ShapesClips(_Part, PairsDataModule):
    part = "clips"


class ShapesClipQuestions(_Part, QuestionsDataModule):
    part = "clips"

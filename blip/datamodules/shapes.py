"""The embedded world as shards: scenes drawn and described once, then streamed like any other data set.

    human/1-00000.tar ... 2-00000.tar ... 3-00000.tar   clean pairs, ordered by the number of things in a scene
    web/1-00000.tar ...                                  half of the captions are noise; KEY.json holds the truth
    val/, test/                                          held out: their contents occur in no other split
    reserved/                                            held out: each scene has a pair of colour and shape that
                                                         occurs nowhere else
    tokenizer.json                                       WordPiece, trained from the captions of human and of web's first shards
    world.json                                           seed, sizes, version: what the folder holds

KEY.json is {"captions": [five texts; one on the web], "scene": {...}}, on the web also {"truth": bool, "kind": ...}.
Each pair is drawn from (seed, split, number) alone, so the bytes depend on nothing else.
"""

import random
import string
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
from tokenizers import Tokenizer

from blip.datamodules.drawn import drawn
from blip.datamodules.pairs import PairsDataModule
from blip.datamodules.shapes_language import NOISE, WORDS, captions, noise
from blip.datamodules.shapes_scenes import Scene, draw_scene, jpeg, seeded
from blip.datamodules.tars import as_json, write_tar
from blip.text import train_wordpiece

VERSION = 2  # goes up when the same seed gives other bytes
CAPTIONS = 5
PAIRS_A_SHARD = 1000
VOCABULARY = 512
HELD_OUT = ("val", "test", "reserved")
FOLDERS = {"train": "human", "web": "web", **{split: split for split in HELD_OUT}}


def write_world(folder: str | Path, seed: int, sizes: Mapping[str, int], processes: int = 2) -> Path:
    """Writes the world into `folder`, whole or not at all, and returns the folder; a world that is there is kept.

    `sizes` are the numbers of pairs of train (the folder `human`), web, val, test and reserved. ValueError if the
    folder holds a world of another seed, size or version, or something else.
    """
    if set(sizes) != set(FOLDERS) or min(sizes.values()) < 0:
        raise ValueError(f"sizes of the world: a number for each of {', '.join(FOLDERS)} is needed, got {dict(sizes)}")
    description = {"version": VERSION, "seed": seed, "sizes": {split: sizes[split] for split in FOLDERS}}
    return drawn(Path(folder).absolute(), description, lambda partial: _write(partial, seed, sizes, processes))


def _write(folder: Path, seed: int, sizes: Mapping[str, int], processes: int) -> None:
    scenes = held_out_scenes(seed, sizes)
    held_out = {scene.description.content for split in HELD_OUT for scene in scenes[split]}

    for name in FOLDERS.values():
        (folder / name).mkdir(parents=True)
    with ProcessPoolExecutor(processes, initializer=cv2.setNumThreads, initargs=(0,)) as pool:
        held_out_jobs = [pool.submit(_write_shards, folder / split, seed, split, scenes[split]) for split in HELD_OUT]
        jobs, read = (
            [],
            [],
        )  # read: jobs whose texts the vocabulary is of: the same, and so the same model, however large the web
        for split in ("train", "web"):
            for things in (1, 2, 3):
                total = (sizes[split] + 3 - things) // 3
                for shard, start in enumerate(range(0, total, PAIRS_A_SHARD)):
                    path = folder / FOLDERS[split] / f"{things}-{shard:05d}.tar"
                    numbers = range(start, min(start + PAIRS_A_SHARD, total))
                    jobs.append(pool.submit(_write_training_shard, path, seed, split, things, numbers, held_out))
                    if split == "train" or not shard:
                        read.append(jobs[-1])
        for written in held_out_jobs:
            written.result()
        for job in jobs:
            job.result()
    texts = [text for job in read for text in job.result()]
    (folder / "tokenizer.json").write_text(train_vocabulary(texts).to_str(pretty=True))


def held_out_scenes(seed: int, sizes: Mapping[str, int]) -> dict[str, list[Scene]]:
    """The scenes of val, test and reserved, no two of the same content; the n-th has n % 3 + 1 things."""
    taken: set[tuple] = set()
    scenes: dict[str, list[Scene]] = {split: [] for split in HELD_OUT}
    for split in HELD_OUT:
        for number in range(sizes[split]):
            scene = draw_scene(seeded(seed, split, number), number % 3 + 1, split == "reserved", taken)
            taken.add(scene.description.content)
            scenes[split].append(scene)
    return scenes


def _write_shards(folder: Path, seed: int, split: str, scenes: list[Scene]) -> None:
    """The shards of a held-out split; none of its words goes into the vocabulary."""

    def pairs(numbers: range) -> Iterator[tuple[str, dict[str, bytes]]]:
        for number in numbers:
            rng = seeded(seed, split, number, "look")
            yield f"{number:06d}", {"jpg": jpeg(scenes[number], rng), "json": as_json(_told(scenes[number], rng))}

    for shard, start in enumerate(range(0, len(scenes), PAIRS_A_SHARD)):
        write_tar(folder / f"{shard:05d}.tar", pairs(range(start, min(start + PAIRS_A_SHARD, len(scenes)))))


def _write_training_shard(
    path: Path, seed: int, split: str, things: int, numbers: range, held_out: AbstractSet[tuple]
) -> list[str]:
    """One shard of `human` or `web`; returns a caption of each pair."""
    texts: list[str] = []

    def pairs() -> Iterator[tuple[str, dict[str, bytes]]]:
        for number in numbers:
            rng = seeded(seed, split, things, number)
            scene = draw_scene(rng, things, excluded=held_out)
            picture, record = jpeg(scene, rng), _told(scene, rng)
            if split == "web":
                record = _as_on_the_web(record, scene, rng, held_out)
            texts.append(record["captions"][0])
            yield f"{things}{number:08d}", {"jpg": picture, "json": as_json(record)}

    write_tar(path, pairs())
    return texts


def _told(scene: Scene, rng: random.Random) -> dict:
    return {"captions": captions(scene.description, rng, CAPTIONS), "scene": scene.to_json()}


def _as_on_the_web(record: dict, scene: Scene, rng: random.Random, held_out: AbstractSet[tuple]) -> dict:
    """The record with one text, which is noise in half of the cases."""
    kind, text = "true", record["captions"][0]
    if rng.random() < 0.5:
        said = scene.description
        (kind,) = rng.choices(list(NOISE), list(NOISE.values()))
        other = draw_scene(rng, rng.randint(1, 3), excluded=held_out | {said.content}) if kind == "other" else scene
        text = noise(kind, said, other.description, rng, held_out)
    return {"captions": [text], "truth": kind == "true", "kind": kind, "scene": record["scene"]}


def train_vocabulary(texts: list[str]) -> Tokenizer:
    """BERT's lower-case WordPiece with the grammar's words whole and letters and digits for all else."""
    # the grammar's words are more frequent than those of the noise, however small the splits: so each is one piece
    words = [" ".join(WORDS)] * (10 + len(texts) // 10)
    alphabet = string.ascii_lowercase + string.digits + string.punctuation
    return train_wordpiece([*words, *texts], VOCABULARY, alphabet)


class ShapesDataModule(PairsDataModule):
    """Pairs of the embedded world, which is drawn into `folder` first where it is missing.

    `world_seed` and `sizes` are those of `write_world`; all else goes to PairsDataModule, whose sources, sets and
    tokenizer name files in `folder`.
    """

    def __init__(self, folder: str | Path, world_seed: int, sizes: Mapping[str, int], **pairs: Any) -> None:
        super().__init__(**pairs)
        self.folder, self.world_seed, self.sizes = Path(folder), world_seed, dict(sizes)

    def prepare_data(self) -> None:
        write_world(self.folder, self.world_seed, self.sizes)
        super().prepare_data()

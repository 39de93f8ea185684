"""What is read at a position is a function of the position, also where a pair fails."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from blip.datamodules import shards as module
from blip.datamodules.images import AugmentConfig
from blip.datamodules.index import Index, build_index
from blip.datamodules.plan import Key, Plan, Source
from blip.datamodules.remote import Shard
from blip.datamodules.shards import EvaluationRecords, Reader, Span, TrainRecords, texts_in
from tests.datamodules.making import pair, tar_of, write_shards


def dataset(index: Index, captions: str = "all", config: AugmentConfig | None = None) -> TrainRecords:
    ends = index.text_starts[index.shard_starts] if captions == "all" else index.shard_starts
    return TrainRecords([index], Plan([Source("only", np.diff(ends))], seed=3, window=10), captions, 8, config)


def keys(positions: range, batch: int, epoch: int = 0) -> list[Key]:
    return [Key(epoch, p, p // batch * batch, p // batch * batch + batch) for p in positions]


def with_broken(folder: Path, broken: set[int], count: int = 12) -> Index:
    members = {}
    for number in range(count):
        members |= pair(number)
        if number in broken:
            members[f"{number:05d}.png"] = b"no picture"
    folder.mkdir()
    (folder / "00000.tar").write_bytes(tar_of(members))
    return build_index(folder / "00000.tar", verify=False)


def test_reads_come_back_in_the_order_asked_with_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "OPEN_FILES", 2)
    spans, expected = [], []
    for number in range(5):
        path = tmp_path / f"{number}"
        path.write_bytes(bytes(range(number, number + 100)))
        spans.append(Span(Shard(str(path), 100, ""), (10, 5), (40, 3)))
        expected.append((bytes(range(number + 10, number + 15)), bytes(range(number + 40, number + 43))))
    reader = Reader()
    asked = [3, 0, 4, 3, 1, 2, 0]
    before = len(os.listdir("/proc/self/fd"))
    assert reader.read([spans[i] for i in asked]) == [expected[i] for i in asked]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert pickle.loads(pickle.dumps(reader)).read(spans) == expected


def test_text_and_picture_are_one_read_when_near_and_two_when_far():
    near = Span(Shard("x", 0, ""), (1000, 500), (100, 50))
    assert near.reads == [(100, 1400)]
    assert near.split([bytes(900) + b"p" * 500]) == (b"p" * 500, bytes(50))
    far = Span(Shard("x", 0, ""), (1000, 500), (10_000_000, 50))
    assert far.reads == [(1000, 500), (10_000_000, 50)]
    assert far.split([b"p", b"t"]) == (b"p", b"t")


def test_a_shard_that_became_shorter_is_an_error(tmp_path):
    (tmp_path / "x").write_bytes(bytes(20))
    with pytest.raises(ValueError, match="changed since its index"):
        Reader().read([Span(Shard(str(tmp_path / "x"), 100, ""), (10, 5), (18, 5))])


def test_a_sample_does_not_depend_on_what_is_asked_beside_it(tmp_path):
    index = build_index(write_shards(tmp_path / "data", [9, 11], texts=2))
    data = dataset(index, config=AugmentConfig(size=8))
    together = data.__getitems__(keys(range(40), 8))
    for key, sample in list(zip(keys(range(40), 8), together, strict=True))[::7]:
        alone = dataset(index, config=AugmentConfig(size=8))[key]
        assert (alone.key, alone.entries, alone.image_id) == (sample.key, sample.entries, sample.image_id)
        assert np.array_equal(alone.image, sample.image)
    assert {(s.key, s.entries[0]) for s in together} == {
        (f"{n:05d}", f"a picture of number {n} text {i}") for n in range(20) for i in range(2)
    }


def test_with_one_caption_each_picture_comes_once_and_its_text_is_drawn_anew_each_epoch(tmp_path):
    data = dataset(build_index(write_shards(tmp_path / "data", [20], texts=4)), captions="one")
    epochs = [data.__getitems__(keys(range(20), 20, epoch)) for epoch in range(3)]
    texts = [{sample.key: sample.entries[0][-1] for sample in epoch} for epoch in epochs]
    assert all(len(epoch) == 20 for epoch in texts)
    assert set(texts[0].values()) == {"0", "1", "2", "3"}
    assert texts[0] != texts[1] != texts[2]


@pytest.mark.parametrize("workers_ask", ["together", "one by one"])
def test_a_pair_that_fails_gives_its_place_to_the_next_position_of_its_global_batch(tmp_path, workers_ask):
    index = with_broken(tmp_path / "data", broken={2, 7})
    data = dataset(index)
    _, units = data.plan.resolve(0, np.arange(12))
    asked = keys(range(12), 6)
    samples = data.__getitems__(asked) if workers_ask == "together" else [data[key] for key in asked]
    for position, (unit, sample) in enumerate(zip(units.tolist(), samples, strict=True)):
        expected, named = position, []
        while units[expected] in (2, 7):
            named.append(f"00000.tar: {units[expected]:05d} (not an image)")
            expected = position // 6 * 6 + (expected + 1) % 6
        assert sample.key == f"{units[expected]:05d}", f"position {position} has unit {unit}"
        assert list(sample.replaced) == named
        assert sample.image_id == units[expected], "so that nobody takes the twins for negatives of each other"


def test_a_text_that_changed_is_replaced_like_a_picture_that_fails(tmp_path):
    index = with_broken(tmp_path / "data", broken=set())
    path = tmp_path / "data" / "00000.tar"
    row = index.pictures[4]
    data = bytearray(path.read_bytes())
    data[int(row["text_at"]) : int(row["text_at"] + row["text_size"])] = b"\xff" * int(row["text_size"])
    path.write_bytes(data)
    samples = dataset(index).__getitems__(keys(range(12), 12))
    (replaced,) = [sample.replaced for sample in samples if sample.replaced]
    assert replaced == ("00000.tar: 00004 (its text is not the one indexed)",)


def test_a_global_batch_without_a_sound_pair_is_an_error(tmp_path):
    data = dataset(with_broken(tmp_path / "data", broken=set(range(12))))
    with pytest.raises(ValueError, match="no pair of the global batch at position 4 of epoch 0 decodes"):
        data.__getitems__(keys(range(4, 8), 4))


def test_evaluation_gives_every_reference_and_the_texts_asked_for(tmp_path):
    index = build_index(write_shards(tmp_path / "data", [3], texts=3))
    for captions, shown in (("first", 1), ("all", 3)):
        samples = EvaluationRecords(index, captions, 8).__getitems__([0, 1, 2])
        assert [sample.key for sample in samples] == ["00000", "00001", "00002"]
        assert all(len(sample.entries) == shown and len(sample.references) == 3 for sample in samples)
        assert samples[0].image.shape == (8, 8, 3)


def test_evaluation_does_not_replace_what_fails(tmp_path):
    index = with_broken(tmp_path / "data", broken={1})
    with pytest.raises(ValueError, match=r"00000.tar: 00001: not an image.*blip data index"):
        EvaluationRecords(index, "first", 8).__getitems__([0, 1])


def test_texts_come_in_the_order_of_the_rows_and_no_picture_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TEXTS_AT_ONCE", 4)
    write_shards(tmp_path / "shards", [3, 5], texts=2)
    index = build_index(str(tmp_path / "shards" / "*.tar"), verify=False)
    read: list[int] = []
    pread = Reader._pread
    monkeypatch.setattr(Reader, "_pread", lambda self, *where: read.append(where[2]) or pread(self, *where))
    assert list(texts_in(index)) == [f"a picture of number {n} text {i}" for n in range(8) for i in range(2)]
    assert read == index.pictures["text_size"].tolist()

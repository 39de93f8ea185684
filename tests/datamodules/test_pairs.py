"""Batches are the same with any number of ranks and workers, from files or URLs, and after a stop."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from blip.datamodules import remote
from blip.datamodules.index import build_index
from blip.datamodules.pairs import Batch, PairsDataModule
from blip.datamodules.stream import fitting_prefetch
from tests.datamodules.making import pair, tar_of, write_shards, write_vocabulary
from tests.datamodules.serving import serving


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_vocabulary(folder / "vocab.txt")
    write_shards(folder / "train", [13, 5, 22], texts=2)
    write_shards(folder / "web", [30], first=500)
    write_shards(folder / "val", [7], texts=3, first=900)
    return folder


def module(data: Path, **options) -> PairsDataModule:
    defaults = {
        "sources": [{"name": "human", "shards": str(data / "train" / "*.tar")}],
        "tokenizer": data / "vocab.txt",
        "image_size": 8,
        "batch_size": 8,
        "eval_batch_size": 4,
        "seed": 1,
        "max_words": 30,
        "max_tokens": 12,
        "window": 30,
        "augment": {},
    }
    return PairsDataModule(**(defaults | options))


def as_rank(datamodule: PairsDataModule, rank: int, ranks: int) -> PairsDataModule:
    datamodule._rank = lambda: (rank, ranks)  # type: ignore[method-assign]
    return datamodule


def trace(batch: Batch) -> tuple:
    """All that a batch holds, to compare."""
    pixels = hashlib.sha256(batch.image.numpy().tobytes()).hexdigest()
    ids = batch.layout.pad(batch.input_ids).tolist()
    return pixels, ids, batch.image_ids.tolist(), batch.keys, batch.texts, batch.epoch, batch.position


def test_a_batch_keeps_its_contract(data):
    batch = next(iter(module(data).train_dataloader()))
    assert (batch.image.shape, batch.image.dtype) == ((8, 3, 8, 8), torch.uint8)
    assert batch.image.is_contiguous()
    assert batch.layout.mask.shape[0] == len(batch.texts) == len(batch.keys) == 8
    tokenizer = module(data).tokenizer
    for row, (text, key, picture) in enumerate(zip(batch.texts, batch.keys, batch.image_ids.tolist(), strict=True)):
        ids = batch.layout.pad(batch.input_ids)[row][batch.layout.mask[row]].tolist()
        assert (ids[0], ids[-1]) == (tokenizer.cls_id, tokenizer.sep_id)
        assert tokenizer.decode(ids) == text
        assert int(key) == picture == int(text.split()[4])
    assert batch.text_row.tolist() == list(range(8))
    assert (batch.epoch, batch.position, batch.replaced) == (0, 8, [])
    assert trace(batch.to("cpu")) == trace(batch)


def test_pictures_of_different_sources_have_different_ids(data):
    sources = [{"shards": str(data / name / "*.tar"), "name": name} for name in ("train", "web")]
    seen = {}
    for batch in module(data, sources=sources, batch_size=10).train_dataloader():
        for source, picture, key in zip(batch.source.tolist(), batch.image_ids.tolist(), batch.keys, strict=True):
            assert seen.setdefault(picture, (source, key)) == (source, key)
    assert len(seen) == 70


def test_zero_one_and_three_workers_give_the_same_batches(data):
    runs = []
    for workers in (0, 1, 3):
        datamodule = module(data, num_workers=workers)
        loader, run = datamodule.train_dataloader(), []
        for _ in range(2):  # the second epoch comes from workers that live on
            for batch in loader:
                run.append(trace(batch))
                datamodule.advance(batch)
        runs.append(run)
    assert len(runs[0]) == 20
    assert runs[0] == runs[1] == runs[2]
    assert runs[0][0] != runs[0][10]


def test_two_ranks_see_what_one_rank_sees(data):
    whole = list(module(data, batch_size=8).train_dataloader())
    parts = [list(as_rank(module(data, batch_size=4), rank, 2).train_dataloader()) for rank in range(2)]
    assert len(whole) == len(parts[0]) == len(parts[1]) == 10
    for one, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(one.image, torch.cat([first.image, second.image]))
        assert one.texts == first.texts + second.texts
        assert one.position == first.position == second.position


def test_an_epoch_shows_each_text_once_and_leaves_out_less_than_a_batch(data):
    datamodule = module(data, batch_size=7)
    texts = [text for batch in datamodule.train_dataloader() for text in batch.texts]
    assert len(texts) == len(set(texts)) == 77
    assert (datamodule.pairs_per_epoch, datamodule.steps_per_epoch(1), datamodule.steps_per_epoch(2)) == (80, 11, 5)
    assert "80 pairs an epoch, 11 steps of 7 (1 x 7), 3 left out at its end" in datamodule.describe()


@pytest.mark.parametrize(("ranges", "faults"), [(True, []), (False, []), (True, ["500", "cut"]), (False, ["cut"])])
def test_urls_give_the_order_and_bytes_of_local_files(data, tmp_path, monkeypatch, ranges, faults):
    monkeypatch.setenv("BLIP_CACHE", str(tmp_path))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    local = module(data)
    expected = [trace(batch) for batch in local.train_dataloader()]
    with serving(data / "train", ranges, faults) as server:
        distant = module(data, sources=[{"name": "human", "shards": f"{server.url}/{{00000..00002}}.tar"}])
        assert [trace(batch) for batch in distant.train_dataloader()] == expected
        assert distant.fingerprint == local.fingerprint
        if ranges and not faults:
            workers = module(data, sources=distant.sources, num_workers=2)
            assert [trace(batch) for batch in workers.train_dataloader()] == expected


# sources


def test_sources_are_counted_in_words(data):
    sources = [
        {"name": "human", "shards": str(data / "train" / "*.tar"), "epochs": 2},
        {"name": "web", "shards": [str(data / "web" / "00000.tar")], "part_of_epoch": 0.2},
    ]
    datamodule = module(data, sources=sources)
    assert datamodule.plan.pairs_by_source == [160, 6]
    said = datamodule.describe()
    assert "human: 160 pairs an epoch (96.4%) of 40 pictures with 80 texts in 3 shards" in said
    assert "web: 6 pairs an epoch (3.6%) of 30 pictures with 30 texts in 1 shards" in said


def test_phases_name_shards_by_pattern(data):
    phases = [
        {"until": 0.5, "shards": str(data / "train" / "00001.tar")},
        {"until": 1.0, "shards": str(data / "train" / "*.tar")},
    ]
    datamodule = module(data, sources=[{"name": "human", "phases": phases}], total_pairs=160, batch_size=10)
    numbers = []
    for _ in range(2):
        for batch in datamodule.train_dataloader():
            numbers.append([int(key) for key in batch.keys])
            datamodule.advance(batch)
    assert {n for batch in numbers[:8] for n in batch} == set(range(13, 18))
    assert {n for batch in numbers[8:] for n in batch} == set(range(40))


@pytest.mark.parametrize(("limits", "pairs"), [((-1, 7), 112), ((3, -1), 240), ((3, 7), 112), ((3, 700), 240)])
def test_phases_are_shares_of_the_run_that_the_trainer_is_told(data, limits, pairs):
    human = {"name": "human", "shards": str(data / "train" / "*.tar")}
    phases = [{"until": 0.5, "shards": str(data / "train" / "00001.tar")}, {"until": 1.0, "shards": human["shards"]}]
    asked = module(data, sources=[human | {"phases": phases}])
    with pytest.raises(ValueError, match="total_pairs"):
        _ = asked.plan
    asked.trainer = SimpleNamespace(  # type: ignore[assignment]
        max_epochs=limits[0], max_steps=limits[1], accumulate_grad_batches=2, global_rank=0, world_size=1
    )
    assert asked.plan.total_pairs == pairs


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"shard": "x"}, r"unknown \['shard'\]"),
        ({"name": "x"}, "`shards` is missing"),
        ({"shards": "{train}", "weight": 1, "epochs": 2}, "`weight` says how much"),
        ({"shards": "/no/such/*.tar"}, "no shard matches"),
    ],
)
def test_sources_that_say_nonsense_are_refused(data, source, said):
    source = {k: str(data / "train" / "*.tar") if v == "{train}" else v for k, v in source.items()}
    with pytest.raises(ValueError, match=said):
        _ = module(data, sources=[source]).plan


def test_ids_beyond_the_model_are_refused_in_collate(data):
    with pytest.raises(ValueError, match="model has 20 pieces"):
        next(iter(module(data, vocab_size=20).train_dataloader()))


# evaluation


def test_evaluation_sets_are_shared_by_ranks_without_padding_and_main_comes_first(data):
    sets = {
        "other": {"shards": str(data / "web" / "*.tar")},
        "main": {"shards": str(data / "val" / "*.tar"), "captions": "all"},
    }
    shown = []
    for rank in range(3):
        datamodule = as_rank(module(data, val=sets, test={"main": sets["main"]}), rank, 3)
        assert datamodule.val_names == ["main", "other"]
        assert datamodule.test_names == ["main"]
        main, other = datamodule.val_dataloader()
        assert len(main) == 1
        assert len(other) == 3
        for batch in main:
            shown += batch.keys
            assert batch.layout.rows == len(batch.text_row) == 3 * len(batch.keys)
            assert batch.text_row.tolist() == [row for row in range(len(batch.keys)) for _ in range(3)]
            assert [text for texts in batch.references for text in texts] == batch.texts
    assert sorted(shown) == [f"{n:05d}" for n in range(900, 907)]


# pairs that fail


def test_replaced_pairs_are_named_and_too_many_stop_the_run(data, tmp_path, caplog):
    members = {}
    for number in range(40):
        members |= pair(number) | ({f"{number:05d}.png": b"no picture"} if number < 6 else {})
    (tmp_path / "00000.tar").write_bytes(tar_of(members))
    build_index(tmp_path / "00000.tar", verify=False)
    options = {"sources": [{"shards": str(tmp_path / "00000.tar")}], "batch_size": 20}
    with caplog.at_level(logging.WARNING):
        batches = list(module(data, **options, bad_share=0.02).train_dataloader())
    named = {name for batch in batches for name in batch.replaced}
    assert named == {f"00000.tar: {number:05d} (not an image)" for number in range(6)}
    assert all(len(batch.keys) == 20 for batch in batches)
    assert "00000.tar: 00005 (not an image)" in caplog.text
    with pytest.raises(ValueError, match=r"did not decode, more than bad_share=0.002"):
        list(module(data, **options, bad_share=0.002).train_dataloader())


# state


class Listener(pl.LightningModule):
    """Trains nothing, writes down what comes, and saves after a given step."""

    def __init__(self, stop: int, path: Path, accumulate: int = 1) -> None:
        super().__init__()
        self.stop, self.path, self.accumulate, self.seen = stop, path, accumulate, []
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch_idx, self.global_step, trace(batch)))
        return self.weight * 1.0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def on_train_batch_end(self, outputs, batch: Batch, batch_idx: int) -> None:
        if (batch_idx + 1) % self.accumulate == 0:
            self.trainer.datamodule.advance(batch)
            if self.global_step == self.stop:
                self.trainer.save_checkpoint(self.path)
                self.trainer.should_stop = True


def fit(data: Path, path: Path, stop: int, start: Path | None = None, accumulate: int = 1, workers: int = 0) -> list:
    listener = Listener(stop, path, accumulate)
    datamodule = module(data, num_workers=workers, val={"main": {"shards": str(data / "val" / "*.tar")}})
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, accumulate_grad_batches=accumulate, min_steps=0,
        num_sanity_val_steps=1, limit_val_batches=1, default_root_dir=path.parent,
    )  # fmt: skip
    trainer.fit(listener, datamodule=datamodule, ckpt_path=start, weights_only=True)
    return listener.seen


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> list:
    return fit(data, tmp_path_factory.mktemp("run") / "x.ckpt", stop=-1)


@pytest.mark.parametrize(("stop", "workers"), [(1, 0), (9, 0), (10, 0), (11, 0), (20, 1), (23, 0)])
def test_lightning_goes_on_at_the_next_unseen_pair(data, tmp_path, uninterrupted, stop, workers):
    path = tmp_path / "x.ckpt"
    before = fit(data, path, stop)
    after = fit(data, path, -1, start=path, workers=workers)
    assert len(uninterrupted) == 30
    assert before[:stop] + after == uninterrupted


def test_with_accumulation_the_state_moves_at_optimizer_steps(data, tmp_path):
    whole = fit(data, tmp_path / "whole.ckpt", -1, accumulate=2)
    fit(data, tmp_path / "x.ckpt", 7, accumulate=2)
    after = fit(data, tmp_path / "x.ckpt", -1, start=tmp_path / "x.ckpt", accumulate=2)
    assert after == whole[14:]


def test_other_data_are_refused_with_the_difference_unless_allowed(data):
    first = module(data)
    state = first.state_dict() | {"epoch": 1, "pairs": 16}
    assert set(state) == {"epoch", "pairs", "fingerprint"}
    again = module(data, batch_size=4)
    again.load_state_dict(state)
    assert (again.cursor.epoch, again.cursor.pairs) == (1, 16), "another batch size goes on in the same order"
    others = {
        "seed": module(data, seed=2),
        "window": module(data, window=10),
        "captions": module(data, captions="one"),
        "human": module(data, sources=[{"name": "human", "shards": str(data / "train" / "0000[01].tar")}]),
    }
    for difference, other in others.items():
        with pytest.raises(ValueError, match=rf"{difference}: \S+ then, \S+ now"):
            other.load_state_dict(state)
    measured = module(data, seed=2)
    measured.trainer = SimpleNamespace(state=SimpleNamespace(fn="test"))  # type: ignore[assignment]
    measured.load_state_dict(state)  # a checkpoint may be measured on any data
    allowed = module(data, seed=2, allow_other_data=True)
    allowed.load_state_dict(state)
    assert allowed.cursor.pairs == 16


def test_prefetch_is_lowered_where_shared_memory_is_short(tmp_path):
    assert fitting_prefetch(4, 2, 1000, str(tmp_path)) == 4
    assert fitting_prefetch(4, 2, 1 << 50, str(tmp_path)) == 1
    assert fitting_prefetch(4, 2, 1 << 50, str(tmp_path / "none")) == 4

"""Batches of every kind are the same with any number of ranks and workers, from files or URLs, and after a stop."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from blip.datamodules import remote
from blip.datamodules.batches import RecordBatch
from blip.datamodules.dialogues import DialoguesDataModule
from blip.datamodules.index import build_index
from blip.datamodules.pairs import PairsDataModule
from blip.datamodules.questions import QuestionsDataModule
from blip.datamodules.statements import StatementsDataModule
from blip.datamodules.stream import StreamDataModule, fitting_prefetch
from blip.layout import TextLayout
from blip.overrides import CONF
from tests.datamodules.making import pair, tar_of, write_records, write_shards, write_vocabulary
from tests.datamodules.serving import serving

KINDS: dict[str, tuple[type[StreamDataModule], dict[str, Any]]] = {
    "pairs": (PairsDataModule, {}),
    "questions": (QuestionsDataModule, {}),
    "statements": (StatementsDataModule, {"swap": True}),
    "rounds": (DialoguesDataModule, {"candidates": 3}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A set of pairs; in folders beside it one of every kind."""
    folder = tmp_path_factory.mktemp("data")
    write_vocabulary(folder / "vocab.txt")
    write_shards(folder / "train", [13, 5, 22], texts=2)
    write_shards(folder / "web", [30], first=500)
    write_shards(folder / "val", [7], texts=3, first=900)
    for kind in KINDS:
        write_records(folder / kind / "train", [13, 5, 22], kind)
        write_records(folder / kind / "val", [7], kind, entries=3)
    return folder


def module(data: Path, of: str = "", **options) -> Any:
    """A data module of the pairs of `data`, or of the records of the kind `of` there."""
    make, more = KINDS[of or "pairs"]
    defaults = {
        "sources": [{"name": "human", "shards": str(data / of / "train" / "*.tar")}],
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
    return make(**(defaults | more | options))


def as_rank(datamodule: Any, rank: int, ranks: int) -> Any:
    datamodule._rank = lambda: (rank, ranks)
    return datamodule


def trace(batch: RecordBatch) -> list:
    """All that a batch holds, to compare."""
    held = []
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, TextLayout):
            value = value.mask
        if isinstance(value, torch.Tensor):
            value = (value.shape, hashlib.sha256(value.numpy().tobytes()).hexdigest())
        held.append((field.name, value))
    return held


def rows(batch: RecordBatch) -> list[str]:
    """What stands in the shards of each row of a batch."""
    (shown,) = [getattr(batch, name) for name in ("texts", "questions", "statements", "rounds") if hasattr(batch, name)]
    return [json.dumps([key, entry]) for key, entry in zip(batch.keys, shown, strict=True)]


of_every_kind = pytest.mark.parametrize("kind", KINDS)


def test_pictures_of_different_sources_have_different_ids(data):
    sources = [{"shards": str(data / name / "*.tar"), "name": name} for name in ("train", "web")]
    seen = {}
    for batch in module(data, sources=sources, batch_size=10).train_dataloader():
        for source, picture, key in zip(batch.source.tolist(), batch.image_ids.tolist(), batch.keys, strict=True):
            assert seen.setdefault(picture, (source, key)) == (source, key)
    assert len(seen) == 70


@of_every_kind
def test_zero_one_and_two_workers_give_the_same_batches(data, kind):
    runs = []
    for workers in (0, 1, 2):
        datamodule = module(data, kind, num_workers=workers)
        loader, run = datamodule.train_dataloader(), []
        for _ in range(2):  # the second epoch comes from workers that live on
            for batch in loader:
                run.append(trace(batch))
                datamodule.advance(batch)
        runs.append(run)
    assert len(runs[0]) == 20
    assert runs[0] == runs[1] == runs[2]
    assert runs[0][0] != runs[0][10]


@of_every_kind
def test_two_ranks_see_what_one_rank_sees(data, kind):
    whole = list(module(data, kind, batch_size=8).train_dataloader())
    parts = [list(as_rank(module(data, kind, batch_size=4), rank, 2).train_dataloader()) for rank in range(2)]
    assert len(whole) == len(parts[0]) == len(parts[1]) == 10
    for one, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(one.image, torch.cat([first.image, second.image]))
        assert rows(one) == rows(first) + rows(second)
        assert one.position == first.position == second.position


@of_every_kind
def test_an_epoch_shows_each_row_once_and_leaves_out_less_than_a_batch(data, kind):
    datamodule = module(data, kind, batch_size=7)
    shown = [row for batch in datamodule.train_dataloader() for row in rows(batch)]
    assert len(shown) == len(set(shown)) == 77
    assert (datamodule.pairs_per_epoch, datamodule.steps_per_epoch(1), datamodule.steps_per_epoch(2)) == (80, 11, 5)
    assert f"80 {kind} an epoch, 11 steps of 7 (1 x 7), 3 left out at its end" in datamodule.describe()


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


@of_every_kind
@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluation_shows_every_row_once_on_any_number_of_ranks(data, kind, ranks):
    sets = {"main": {"shards": str(data / kind / "val" / "*.tar")} | ({"captions": "all"} if kind == "pairs" else {})}
    shown = []
    for rank in range(ranks):
        (loader,) = as_rank(module(data, kind, test=sets, batch_size=1), rank, ranks).test_dataloader()
        for batch in loader:
            names = [name for name in ("texts", "questions", "statements", "rounds") if hasattr(batch, name)]
            entries = getattr(batch, names[0])
            of = range(len(batch.keys)) if kind == "rounds" else batch.text_row.tolist()
            shown += [json.dumps([batch.keys[row], entry]) for row, entry in zip(of, entries, strict=True)]
            assert batch.replaced == []
    assert len(shown) == len(set(shown)) == 21


def test_sets_come_with_main_first_and_none_is_padded(data):
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
        shown += [key for batch in main for key in batch.keys]
    assert sorted(shown) == [f"{n:05d}" for n in range(900, 907)]


@of_every_kind
def test_blank_pictures_are_grey_in_training_and_evaluation_and_all_else_is_as_ever(data, kind):
    sets = {"main": {"shards": str(data / kind / "val" / "*.tar")}}
    more = {"swap": False} if kind == "statements" else {}  # so that what is not seen is all that differs
    for stage in ("train", "val"):
        seen, unseen = (module(data, kind, val=sets, augment=None, blank=blank, **more) for blank in (False, True))
        loaders = [getattr(m, f"{stage}_dataloader")() for m in (seen, unseen)]
        first, second = (next(iter(loader[0] if stage == "val" else loader)) for loader in loaders)
        assert second.image.unique().tolist() == [127]
        assert trace(first)[1:] == trace(second)[1:]
        assert first.image.shape == second.image.shape


@pytest.mark.parametrize("kind", ["pairs", "questions"])
def test_a_set_of_clips_stands_beside_sets_of_pictures(data, tmp_path, kind):
    pytest.importorskip("av", reason="clips need PyAV, the extra `video`")
    write_records(tmp_path / "clips", [3], "clips" if kind == "pairs" else "clip_questions")
    pictures = {"main": {"shards": str(data / kind / "val" / "*.tar")}}
    sets = pictures | {"clips": {"shards": str(tmp_path / "clips" / "*.tar"), "frames": 4}}
    for blank in (False, True):
        main, clips = module(data, kind, test=sets, blank=blank).test_dataloader()
        assert next(iter(main)).image.shape == (4, 3, 8, 8)
        batch = next(iter(clips))
        assert batch.image.shape == (3, 4, 3, 8, 8)
        levels = batch.image.float().mean((2, 3, 4))  # [B, F]
        expected = torch.full((3, 4), 127.0) if blank else torch.arange(3)[:, None] + torch.tensor([0, 40, 80, 120])
        assert torch.allclose(levels, expected.float(), atol=3)
        assert batch.keys == ["00000", "00001", "00002"]
    assert "3 clips with 6" in module(data, kind, test=sets).describe()


@pytest.mark.parametrize(
    ("kind", "spec", "said"),
    [
        ("pairs", {"frames": 0}, "frames says how many"),
        ("pairs", {"frames": "8"}, "frames says how many"),
        ("statements", {"frames": 8}, r"unknown \['frames'\]"),
        ("questions", {"captions": "all"}, r"unknown \['captions'\]"),
        ("pairs", {"captions": "some"}, "captions must be `first` or `all`"),
    ],
)
def test_sets_that_say_nonsense_are_refused(data, kind, spec, said):
    with pytest.raises(ValueError, match=said):
        module(data, kind, test={"main": {"shards": "x"} | spec})


@pytest.mark.parametrize(
    ("name", "kind", "size"),
    [
        ("coco_caption", "pairs", 384),
        ("nocaps", "pairs", 384),
        ("coco_retrieval", "pairs", 384),
        ("flickr30k", "pairs", 384),
        ("vqa", "questions", 480),
        ("nlvr2", "statements", 384),
        ("visdial", "rounds", 384),
        ("msrvtt_retrieval", "pairs", 384),
        ("msrvtt_qa", "questions", 480),
        ("msvd_qa", "questions", 480),
    ],
)
def test_the_papers_data_sets_are_what_their_configs_make(name, kind, size):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        made = compose("config", [f"data={name}", "paths.root=/nowhere"]).data
        made.seed = 0
        datamodule = instantiate(made, _convert_="all")
    assert (datamodule.kind.name, datamodule.image_size) == (kind, size)
    assert datamodule.test_names[0] == "main"
    assert tuple(datamodule.augment.scale) == (0.5, 1.0) or not datamodule.sources
    assert not (kind != "pairs" and datamodule.augment.flip), "a mirrored picture makes left and right false"
    frames = {"msrvtt_retrieval": 8, "msrvtt_qa": 16, "msvd_qa": 16}.get(name)
    assert {spec.get("frames") for spec in datamodule.test.values()} == {frames}


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

    def training_step(self, batch: RecordBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch_idx, self.global_step, trace(batch)))
        return self.weight * 1.0

    def validation_step(self, batch: RecordBatch, batch_idx: int) -> None:
        pass

    def on_train_batch_end(self, outputs, batch: RecordBatch, batch_idx: int) -> None:
        if (batch_idx + 1) % self.accumulate == 0:
            self.trainer.datamodule.advance(batch)
            if self.global_step == self.stop:
                self.trainer.save_checkpoint(self.path)
                self.trainer.should_stop = True


def fit(
    data: Path,
    path: Path,
    stop: int,
    start: Path | None = None,
    accumulate: int = 1,
    workers: int = 0,
    kind: str = "pairs",
) -> list:
    listener = Listener(stop, path, accumulate)
    sets = {"main": {"shards": str(data / kind / "val" / "*.tar")}}
    datamodule = module(data, kind, num_workers=workers, val=sets)
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


@pytest.mark.parametrize("kind", ["questions", "statements", "rounds"])
def test_every_kind_goes_on_at_the_next_unseen_row(data, tmp_path, kind):
    whole = fit(data, tmp_path / "whole.ckpt", -1, kind=kind)
    before = fit(data, tmp_path / "x.ckpt", 13, kind=kind)
    after = fit(data, tmp_path / "x.ckpt", -1, start=tmp_path / "x.ckpt", kind=kind)
    assert len(whole) == 30
    assert before[:13] + after == whole


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


def test_shards_that_were_trained_on_are_known_again_wherever_they_lie(data: Path, tmp_path: Path):
    copied = shutil.copytree(data / "train", tmp_path / "elsewhere")
    stream = module(
        data,
        sources=[
            {"name": "human", "shards": str(data / "train" / "*.tar")},
            {"name": "web", "shards": str(data / "web" / "*.tar")},
        ],
        val={"main": {"shards": str(data / "val" / "*.tar")}, "seen": {"shards": str(copied / "*.tar")}},
        test={"main": {"shards": [str(copied / "00001.tar"), *map(str, (data / "val").glob("*.tar"))]}},
    )
    trained = stream.training_shards()
    assert len(trained) == 4
    assert not stream.evaluation_shards("val", "main") & trained
    assert stream.evaluation_shards("val", "seen") < trained
    assert len(stream.evaluation_shards("test", "main") & trained) == 1

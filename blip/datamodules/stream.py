"""A stream of records as a LightningDataModule: the plan of training, the loaders, and the state, of whatever kind the records are.

A batch carries its own (epoch, end position). The training loop hands it back through `advance` at each optimizer step, and that
is how the state of the stream moves: no count of prefetched batches, no epoch hook. What is of one kind of records stands in
`pairs.py`, `questions.py`, `statements.py` and `dialogues.py`, each with its batch and its data module.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import cv2
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from blip import signals
from blip.datamodules.batches import RecordBatch, Sample, Words
from blip.datamodules.images import AugmentConfig
from blip.datamodules.index import Index
from blip.datamodules.plan import Cursor, EvaluationSampler, Plan, Source, TrainSampler, pairs_by_source
from blip.datamodules.records import Kind
from blip.datamodules.shards import EvaluationRecords, TrainRecords
from blip.datamodules.sources import checked_sets, checked_sources, counts, index_of, part
from blip.text import Tokenizer

log = logging.getLogger(__name__)


class _Watched(DataLoader):
    """A DataLoader that shows each batch to `watch` in the main process."""

    def __init__(self, *args: Any, watch: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watch = watch

    def __iter__(self) -> Iterator[RecordBatch]:  # type: ignore[override]
        for batch in super().__iter__():
            self.watch(batch)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the state is the data module's. That it is here tells Lightning that the loader can go on in mid-epoch."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Nothing to load."""


def _begin_worker(_: int) -> None:
    """One thread; deaf to what Slurm tells every process of a job, for the run needs its batches until it has saved."""
    signals.hold()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


class StreamDataModule(pl.LightningDataModule):
    """Streams of records from shards: one for training out of several sources, one for each set of validation and test.

    A kind of records is a subclass that says `kind`, gives a `collator`, and where it differs `entries` and `shown`.

    sources: of training, each {name, shards, and optionally: index (a file made elsewhere); epochs (default 1) or weight;
        part_of_epoch (0.2: a fifth each epoch, in rotation); phases [{until, shards}] (shares of the run, easy ones first);
        view (of pairs: which of their texts and synthetic ones, the options of `views.View`)}
    val, test: name -> {shards, index, view; frames: of clips (KEY.mp4), of each of which so many are seen}; the set "main" comes first
    tokenizer: file or folder; vocab_size: of the model, where it differs
    max_words, max_tokens: kept of a text, its tokens with [CLS] and [SEP]
    augment: options of AugmentConfig but its size; None only resizes
    blank: every picture is grey, in training and evaluation: what can be had without seeing
    bad_share: training stops when more of the records seen than this had to be replaced (counted as if at least 1,000 were seen)
    total_pairs: length of the run in rows of all ranks, which phases are shares of; None takes it from the trainer's limits
    cache_gb: room for whole shards of servers without ranges; None has no limit
    allow_other_data: go on from a state of other data
    """

    kind: ClassVar[Kind]
    entries = "all"  # a row of training is each entry of a record, or the record, with `one` of them drawn

    def __init__(
        self,
        sources: Sequence[Mapping[str, Any]],
        tokenizer: str | Path,
        image_size: int,
        batch_size: int,
        eval_batch_size: int,
        seed: int,
        max_words: int,
        max_tokens: int,
        val: Mapping[str, Mapping[str, Any]] | None = None,
        test: Mapping[str, Mapping[str, Any]] | None = None,
        augment: Mapping[str, Any] | None = None,
        window: int = 65536,
        num_workers: int = 0,
        prefetch: int = 2,
        blank: bool = False,
        bad_share: float = 0.01,
        total_pairs: int | None = None,
        vocab_size: int | None = None,
        cache_gb: float | None = None,
        allow_other_data: bool = False,
    ) -> None:
        super().__init__()
        self.sources = checked_sources(sources)
        self.val, self.test = checked_sets(val, "val", self.kind), checked_sets(test, "test", self.kind)
        self.tokenizer_path, self.vocab_size = tokenizer, vocab_size
        for name, value in (
            ("image_size", image_size),
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
        ):
            if value < 1:
                raise ValueError(f"data.{name}={value}: at least 1")
        self.image_size, self.batch_size, self.eval_batch_size = image_size, batch_size, eval_batch_size
        self.seed, self.max_words, self.max_tokens = seed, max_words, max_tokens
        self.window, self.total_pairs, self.blank = window, total_pairs, blank
        self.augment = None if augment is None else AugmentConfig(size=image_size, **augment)
        self.num_workers, self.prefetch = num_workers, prefetch
        self.bad_share, self.allow_other_data = bad_share, allow_other_data
        self.cache_bytes = None if cache_gb is None else int(cache_gb * 2**30)
        self.val_names, self.test_names = list(self.val), list(self.test)
        self.cursor = Cursor()
        self.seen, self.replaced = 0, 0

    # what a kind of records says

    def collator(self, training: bool) -> Callable[[Sequence[Sample]], RecordBatch]:
        """What makes a batch of samples, in a worker."""
        raise TypeError(f"{type(self).__name__} says of no kind of records how they become a batch")

    def shown(self, spec: Mapping[str, Any]) -> str:
        """What an evaluation set shows of a record: its `first` entry, `all`, or `each` as an item of its own."""
        return "all"

    @property
    def words(self) -> Words:
        return Words(self.tokenizer, self.max_words, self.max_tokens, self.vocab_size or len(self.tokenizer))

    # what there is

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_path)

    @cached_property
    def indexes(self) -> list[Index]:
        """Indexes of the sources, made where they are missing."""
        return [index_of(source, self.kind) for source in self.sources]

    @cached_property
    def plan(self) -> Plan:
        if not self.sources:
            raise ValueError("data.sources is empty: name at least one source to train on")
        parts = [part(s, i, self.entries, n) for n, (s, i) in enumerate(zip(self.sources, self.indexes, strict=True))]
        phased = self.total_pairs is None and any(part.phases for part in parts)
        return Plan(parts, self.seed, self.window, self._run_length(parts) if phased else self.total_pairs)

    def _run_length(self, parts: Sequence[Source]) -> int | None:
        """Pairs of the whole run by the trainer's limits; None where it has none, or is not there yet."""
        if self.trainer is None:
            return None
        step = self.batch_size * self._rank()[1]
        epochs, steps = self.trainer.max_epochs or -1, self.trainer.max_steps
        limits = [steps * self.trainer.accumulate_grad_batches * step] if steps > 0 else []
        limits += [epochs * (sum(pairs_by_source(parts)) // step * step)] if epochs > 0 else []
        return min(limits, default=None)

    def setup(self, stage: str) -> None:
        """Says in the log what there is to train on."""
        if stage == "fit" and self._rank()[0] == 0:
            log.info(self.describe())

    @property
    def fingerprint(self) -> str:
        """What decides the order: data, seed, window, and what a row is."""
        return f"{self.plan.fingerprint} records={self.kind.name}"

    @property
    def pairs_per_epoch(self) -> int:
        return self.plan.pairs

    def steps_per_epoch(self, world_size: int) -> int:
        """Global batches in an epoch, the same on every rank."""
        return self.plan.pairs // (self.batch_size * world_size)

    def training_shards(self) -> set[str]:
        """Digests of the contents of all shards that are trained on."""
        return {digest.decode() for index in self.indexes for digest in index.digests.tolist()}

    def evaluation_shards(self, stage: str, name: str) -> set[str]:
        """The same of a set of `val` or `test`."""
        sets = {"val": self.val, "test": self.test}
        return {digest.decode() for digest in index_of(sets[stage][name], self.kind).digests.tolist()}

    def describe(self) -> str:
        """Counts of each source and of what is left out, for the log."""
        _, world_size = self._rank()
        step = self.batch_size * world_size
        lines = [
            f"training: {self.plan.pairs:,} {self.kind.name} an epoch, {self.steps_per_epoch(world_size):,} steps of {step:,} "
            f"({world_size} x {self.batch_size}), {self.plan.pairs % step:,} left out at its end"
        ]
        for source, index, pairs in zip(self.plan.sources, self.indexes, self.plan.pairs_by_source, strict=True):
            lines.append(
                f"  {source.name}: {pairs:,} {self.kind.name} an epoch ({pairs / self.plan.pairs:.1%}) of {counts(index)}"
            )
        for stage, sets in (("val", self.val), ("test", self.test)):
            lines += [f"{stage} {name}: {counts(index_of(spec, self.kind))}" for name, spec in sets.items()]
        return "\n".join(lines)

    def prepare_data(self) -> None:
        """Makes the indexes that are missing; safe to call on every rank (there is a lock)."""
        for spec in (*self.sources, *self.val.values(), *self.test.values()):
            index_of(spec, self.kind)

    # loaders

    def _rank(self) -> tuple[int, int]:
        """(rank, number of ranks)"""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def train_dataloader(self) -> DataLoader:
        rank, world_size = self._rank()
        sampler = TrainSampler(self.plan.pairs, self.batch_size, rank, world_size, self.cursor)
        dataset = TrainRecords(
            self.indexes, self.plan, self.entries, self.image_size, self.augment, self.cache_bytes, self.blank
        )
        options = self._options(self.batch_size * self.kind.pictures, training=True)
        return _Watched(dataset, batch_sampler=sampler, watch=self._count, **options)  # type: ignore

    def val_dataloader(self) -> list[DataLoader]:
        return [self._evaluation_loader(spec) for spec in self.val.values()]

    def test_dataloader(self) -> list[DataLoader]:
        return [self._evaluation_loader(spec) for spec in self.test.values()]

    def predict_dataloader(self) -> DataLoader:
        """The main set of the test."""
        if not self.test:
            raise ValueError("data.test is empty: name the set to predict, data.test.main={shards: ...}")
        return self._evaluation_loader(next(iter(self.test.values())))

    def transfer_batch_to_device(self, batch: RecordBatch, device: torch.device, dataloader_idx: int) -> RecordBatch:
        """Out of pinned memory, so that the host does not wait until the device has done the step before."""
        return batch.to(device, non_blocking=device.type == "cuda")

    def _evaluation_loader(self, spec: Mapping[str, Any]) -> DataLoader:
        index, frames = index_of(spec, self.kind), spec.get("frames")
        dataset = EvaluationRecords(index, self.shown(spec), self.image_size, self.cache_bytes, frames, self.blank)
        sampler = EvaluationSampler(len(dataset), self.eval_batch_size, *self._rank())
        options = self._options(self.eval_batch_size * (frames or self.kind.pictures), training=False)
        return DataLoader(dataset, batch_sampler=sampler, **options)  # type: ignore

    def _options(self, pictures: int, training: bool) -> dict[str, Any]:
        """Options of a loader whose batches hold so many pictures."""
        options: dict[str, Any] = {
            "collate_fn": self.collator(training),
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
        }
        if self.num_workers:
            prefetch = fitting_prefetch(self.prefetch, self.num_workers, pictures * 3 * self.image_size**2)
            options |= {"persistent_workers": True, "prefetch_factor": prefetch, "worker_init_fn": _begin_worker}
        return options

    def _count(self, batch: RecordBatch) -> None:
        """Counts and names records that were replaced; ValueError when they are too many."""
        self.seen += len(batch.keys)
        self.replaced += len(batch.replaced)
        if not batch.replaced:
            return
        what = f"{self.replaced} of {self.seen} {self.kind.name} did not decode"
        log.warning("%s and were replaced, now %s", what, batch.replaced)
        if self.replaced > self.bad_share * max(self.seen, 1000):
            raise ValueError(
                f"{what}, more than bad_share={self.bad_share}; the last: "
                f"{batch.replaced}; run `blip data check` on the shards, or index them anew with `blip data index`"
            )

    # state

    def advance(self, batch: RecordBatch) -> None:
        """Takes over how far the stream is; called once an optimizer step, with its last batch."""
        self.cursor.epoch, self.cursor.pairs = batch.epoch, batch.position

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.cursor.epoch, "pairs": self.cursor.pairs, "fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where a state was taken. ValueError if it is of other data, unless `allow_other_data`."""
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return  # whoever measures a checkpoint does so on any data
        then, now = (dict(p.split("=", 1) for p in f.split(" ")) for f in (state_dict["fingerprint"], self.fingerprint))
        other = [
            f"{k}: {then.get(k, 'none')} then, {now.get(k, 'none')} now"
            for k in {**then, **now}
            if then.get(k) != now.get(k)
        ]
        if other and not self.allow_other_data:
            raise ValueError(
                "the data of this run are not those of the checkpoint, so it cannot go on at the next unseen pair ("
                + "; ".join(other)
                + "); give the same data, or data.allow_other_data=true to go on with what is there"
            )
        self.cursor.epoch, self.cursor.pairs = state_dict["epoch"], state_dict["pairs"]


def fitting_prefetch(asked: int, workers: int, batch_bytes: int, folder: str = "/dev/shm") -> int:
    """Batches a worker may hold ready, lowered where shared memory is short (a full one kills workers with a bus error)."""
    if not os.path.isdir(folder):
        return asked
    fits = int(shutil.disk_usage(folder).free * 0.8 / (workers * batch_bytes)) - 1  # one more is in hand
    if fits < asked:
        log.warning(
            "%s has room for %d batches a worker ready, not %d: prefetch is lowered", folder, max(1, fits), asked
        )
    return max(1, min(asked, fits))

"""Pairs of pictures and texts as batches: what a position of the plan becomes, collating, and the LightningDataModule.

A batch carries its own (epoch, end position). The training loop hands it back through `advance` at each optimizer step, and that
is how the state of the stream moves: no count of prefetched batches, no epoch hook.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import cv2
import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from blip.datamodules.images import AugmentConfig
from blip.datamodules.index import Index, open_index
from blip.datamodules.locations import expand
from blip.datamodules.plan import Cursor, EvaluationSampler, Phase, Plan, Source, TrainSampler, pairs_by_source
from blip.datamodules.shards import EvaluationPictures, Sample, TrainPairs
from blip.layout import TextLayout
from blip.text import Tokenizer, clean_caption

log = logging.getLogger(__name__)


@dataclass
class Batch:
    """B pictures and R texts (training: R = B).

    image [B, 3, S, S] uint8; input_ids [T] int64, the packed texts `[CLS] ... [SEP]` that `layout` places; image_ids [B] int64,
    which picture a row shows, unique over all sources; text_row [R] int64, the row of the picture a text belongs to;
    keys [B] and texts [R] as they stand in the shards; references [B], all texts of each picture (evaluation only);
    source [B] int64; position: pairs of the epoch consumed once this global batch is done; replaced: names of pairs that
    failed to decode and gave their places to others.
    """

    image: Tensor
    input_ids: Tensor
    layout: TextLayout
    image_ids: Tensor
    text_row: Tensor
    keys: list[str]
    texts: list[str]
    references: list[list[str]]
    source: Tensor
    epoch: int
    position: int
    replaced: list[str]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        tensors = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS}
        return replace(self, layout=self.layout.to(device, non_blocking), **tensors)

    def pin_memory(self) -> Batch:
        tensors = {name: getattr(self, name).pin_memory() for name in _TENSORS}
        return replace(self, layout=self.layout.pin_memory(), **tensors)


_TENSORS = ("image", "input_ids", "image_ids", "text_row", "source")


def collate(samples: Sequence[Sample], tokenizer: Tokenizer, max_words: int, max_tokens: int, vocab_size: int) -> Batch:
    """Samples -> Batch. ValueError with text and id where an id is out of the model's range."""
    texts = [text for sample in samples for text in sample.texts]
    ids = tokenizer.encode([clean_caption(text, max_words) for text in texts], max_tokens)
    tokenizer.check_ids(ids, vocab_size)
    size = samples[0].image.shape[0]
    image = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)
    np.stack([sample.image.transpose(2, 0, 1) for sample in samples], out=image.numpy())
    return Batch(
        image=image,
        input_ids=torch.tensor([i for text in ids for i in text]),
        layout=TextLayout.from_lengths([len(text) for text in ids]),
        image_ids=torch.tensor([sample.image_id for sample in samples]),
        text_row=torch.tensor([row for row, sample in enumerate(samples) for _ in sample.texts]),
        keys=[sample.key for sample in samples],
        texts=texts,
        references=[sample.references for sample in samples],
        source=torch.tensor([sample.source for sample in samples]),
        epoch=samples[0].epoch,
        position=samples[0].position,
        replaced=[name for sample in samples for name in sample.replaced],
    )


class _Watched(DataLoader):
    """A DataLoader that shows each batch to `watch` in the main process."""

    def __init__(self, *args: Any, watch: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watch = watch

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            self.watch(batch)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the state is the data module's. That it is here tells Lightning that the loader can go on in mid-epoch."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Nothing to load."""


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


class PairsDataModule(pl.LightningDataModule):
    """Streams of pairs from shards: one for training out of several sources, one for each set of validation and test.

    sources: of training, each {name, shards, and optionally: index (a file made elsewhere); epochs (default 1) or weight;
        part_of_epoch (0.2: a fifth each epoch, in rotation); phases [{until, shards}] (shares of the run, easy ones first)}
    val, test: name -> {shards, index, captions: first|all}; the set "main" comes first
    tokenizer: file or folder; vocab_size: of the model, where it differs
    captions: `all` (each text is a pair of its own) or `one` (each picture once, its text drawn)
    augment: options of AugmentConfig but its size; None only resizes
    bad_share: training stops when more of the pairs seen than this had to be replaced (counted as if at least 1,000 were seen)
    total_pairs: length of the run in pairs of all ranks, which phases are shares of; None takes it from the trainer's limits
    cache_gb: room for whole shards of servers without ranges; None has no limit
    allow_other_data: go on from a state of other data
    """

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
        captions: str = "all",
        augment: Mapping[str, Any] | None = None,
        window: int = 65536,
        num_workers: int = 0,
        prefetch: int = 2,
        bad_share: float = 0.01,
        total_pairs: int | None = None,
        vocab_size: int | None = None,
        cache_gb: float | None = None,
        allow_other_data: bool = False,
    ) -> None:
        super().__init__()
        if captions not in ("all", "one"):
            raise ValueError(
                f"captions={captions!r}: `all` (each text a pair) or `one` (each picture once, text drawn)"
            )
        self.sources = [_checked(s, f"source {i}", SOURCE_KEYS) for i, s in enumerate(sources)]
        self.val, self.test = _sets(val, "val"), _sets(test, "test")
        self.tokenizer_path, self.vocab_size = tokenizer, vocab_size
        self.image_size, self.batch_size, self.eval_batch_size = image_size, batch_size, eval_batch_size
        self.seed, self.max_words, self.max_tokens = seed, max_words, max_tokens
        self.captions, self.window, self.total_pairs = captions, window, total_pairs
        self.augment = None if augment is None else AugmentConfig(size=image_size, **augment)
        self.num_workers, self.prefetch = num_workers, prefetch
        self.bad_share, self.allow_other_data = bad_share, allow_other_data
        self.cache_bytes = None if cache_gb is None else int(cache_gb * 2**30)
        self.val_names, self.test_names = list(self.val), list(self.test)
        self.cursor = Cursor()
        self.seen, self.replaced = 0, 0

    # what there is

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_path)

    @cached_property
    def indexes(self) -> list[Index]:
        """Indexes of the sources, made where they are missing; a source with phases is indexed as one."""
        return [open_index(_all_shards(source), source.get("index")) for source in self.sources]

    @cached_property
    def plan(self) -> Plan:
        if not self.sources:
            raise ValueError("data.sources is empty: name at least one source to train on")
        parts = [_part(s, i, self.captions, n) for n, (s, i) in enumerate(zip(self.sources, self.indexes, strict=True))]
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
        """What decides the order: data, seed, window, captions."""
        return f"{self.plan.fingerprint} captions={self.captions}"

    @property
    def pairs_per_epoch(self) -> int:
        return self.plan.pairs

    def steps_per_epoch(self, world_size: int) -> int:
        """Global batches in an epoch, the same on every rank."""
        return self.plan.pairs // (self.batch_size * world_size)

    def describe(self) -> str:
        """Counts of each source and of what is left out, for the log."""
        _, world_size = self._rank()
        step = self.batch_size * world_size
        lines = [
            f"training: {self.plan.pairs:,} pairs an epoch, {self.steps_per_epoch(world_size):,} steps of {step:,} "
            f"({world_size} x {self.batch_size}), {self.plan.pairs % step:,} left out at its end"
        ]
        for source, index, pairs in zip(self.plan.sources, self.indexes, self.plan.pairs_by_source, strict=True):
            lines.append(
                f"  {source.name}: {pairs:,} pairs an epoch ({pairs / self.plan.pairs:.1%}) of {_counts(index)}"
            )
        for stage, sets in (("val", self.val), ("test", self.test)):
            lines += [
                f"{stage} {name}: {_counts(open_index(spec['shards'], spec.get('index')))}"
                for name, spec in sets.items()
            ]
        return "\n".join(lines)

    def prepare_data(self) -> None:
        """Makes the indexes that are missing; safe to call on every rank (there is a lock)."""
        for spec in (*self.sources, *self.val.values(), *self.test.values()):
            open_index(_all_shards(spec), spec.get("index"), progress=_tell)

    # loaders

    def _rank(self) -> tuple[int, int]:
        """(rank, number of ranks)"""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def train_dataloader(self) -> DataLoader:
        rank, world_size = self._rank()
        sampler = TrainSampler(self.plan.pairs, self.batch_size, rank, world_size, self.cursor)
        dataset = TrainPairs(self.indexes, self.plan, self.captions, self.image_size, self.augment, self.cache_bytes)
        return _Watched(dataset, batch_sampler=sampler, watch=self._count, **self._options(self.batch_size))  # type: ignore

    def val_dataloader(self) -> list[DataLoader]:
        return [self._evaluation_loader(spec) for spec in self.val.values()]

    def test_dataloader(self) -> list[DataLoader]:
        return [self._evaluation_loader(spec) for spec in self.test.values()]

    def predict_dataloader(self) -> DataLoader:
        """The main set of the test."""
        if not self.test:
            raise ValueError("data.test is empty: name the set to predict, data.test.main={shards: ...}")
        return self._evaluation_loader(next(iter(self.test.values())))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Out of pinned memory, so that the host does not wait until the device has done the step before."""
        return batch.to(device, non_blocking=device.type == "cuda")

    def _evaluation_loader(self, spec: Mapping[str, Any]) -> DataLoader:
        index, captions = open_index(spec["shards"], spec.get("index")), spec.get("captions", "first")
        dataset = EvaluationPictures(index, captions, self.image_size, self.cache_bytes)
        sampler = EvaluationSampler(len(dataset), self.eval_batch_size, *self._rank())
        return DataLoader(dataset, batch_sampler=sampler, **self._options(self.eval_batch_size))  # type: ignore

    def _options(self, batch_size: int) -> dict[str, Any]:
        vocab_size = self.vocab_size or len(self.tokenizer)
        options: dict[str, Any] = {
            "collate_fn": partial(
                collate,
                tokenizer=self.tokenizer,
                max_words=self.max_words,
                max_tokens=self.max_tokens,
                vocab_size=vocab_size,
            ),
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
        }
        if self.num_workers:
            prefetch = fitting_prefetch(self.prefetch, self.num_workers, batch_size * 3 * self.image_size**2)
            options |= {"persistent_workers": True, "prefetch_factor": prefetch, "worker_init_fn": _one_thread}
        return options

    def _count(self, batch: Batch) -> None:
        """Counts and names pairs that were replaced; ValueError when they are too many."""
        self.seen += len(batch.keys)
        self.replaced += len(batch.replaced)
        if not batch.replaced:
            return
        log.warning("%d of %d pairs did not decode and were replaced, now %s", self.replaced, self.seen, batch.replaced)
        if self.replaced > self.bad_share * max(self.seen, 1000):
            raise ValueError(
                f"{self.replaced} of {self.seen} pairs did not decode, more than bad_share={self.bad_share}; the last: "
                f"{batch.replaced}; run `blip data check` on the shards, or index them anew with --verify"
            )

    # state

    def advance(self, batch: Batch) -> None:
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


SOURCE_KEYS = {"name", "shards", "index", "weight", "epochs", "part_of_epoch", "phases"}
SET_KEYS = {"shards", "index", "captions"}


def _checked(spec: Mapping[str, Any], where: str, known: set[str]) -> dict[str, Any]:
    if unknown := set(spec) - known:
        raise ValueError(f"{where}: unknown {sorted(unknown)}; it may say {sorted(known)}")
    if not spec.get("shards") and not spec.get("phases"):
        raise ValueError(f"{where}: `shards` is missing")
    return dict(spec)


def _sets(sets: Mapping[str, Mapping[str, Any]] | None, stage: str) -> dict[str, dict[str, Any]]:
    """Evaluation sets by name, "main" first."""
    checked = {name: _checked(spec, f"{stage} set {name}", SET_KEYS) for name, spec in (sets or {}).items()}
    if bad := [name for name, spec in checked.items() if spec.get("captions", "first") not in ("first", "all")]:
        raise ValueError(f"{stage} sets {bad}: captions must be `first` or `all`")
    return dict(sorted(checked.items(), key=lambda item: item[0] != "main"))


def _as_list(shards: Any) -> list[Any]:
    return [shards] if isinstance(shards, str | Path) else list(shards)


def _all_shards(spec: Mapping[str, Any]) -> list[str]:
    """Locations of all shards of a source, those that only its phases name included, each once."""
    patterns = _as_list(spec["shards"]) if spec.get("shards") else []
    patterns += [p for phase in spec.get("phases") or [] for p in _as_list(phase["shards"])]
    return list(dict.fromkeys(location for pattern in patterns for location in expand(pattern)))


def _part(source: Mapping[str, Any], index: Index, captions: str, number: int) -> Source:
    """A source in the plan's numbers."""
    if source.get("weight") is not None and (
        source.get("epochs") is not None or source.get("part_of_epoch") is not None
    ):
        raise ValueError(
            f"source {source.get('name', number)}: `weight` says how much; leave `epochs` and `part_of_epoch`"
        )
    ends = index.shard_starts if captions == "one" else index.text_starts[index.shard_starts]
    numbers = {index.location(shard): shard for shard in range(len(index.names))}
    phases = tuple(
        Phase(float(p["until"]), tuple(numbers[s] for pattern in _as_list(p["shards"]) for s in expand(pattern)))
        for p in source.get("phases") or []
    )
    return Source(
        name=str(source.get("name", number)),
        counts=np.diff(ends),
        fingerprint=index.fingerprint,
        epochs=float(source.get("epochs") or 1) * float(source.get("part_of_epoch") or 1),
        weight=source.get("weight"),
        phases=phases,
    )


def _tell(done: int, of: int, name: str) -> None:
    if done == of or done % max(1, of // 20) == 0:
        log.info("indexing shards: %d of %d (%s)", done, of, name)


def _counts(index: Index) -> str:
    report = index.report
    text = f"{report.pictures:,} pictures with {report.texts:,} texts in {report.shards:,} shards"
    left_out: Iterable[str] = (f"{count:,} {reason}" for reason, count in report.skipped.items())
    return f"{text}; left out: {', '.join(left_out)}" if report.skipped else text


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

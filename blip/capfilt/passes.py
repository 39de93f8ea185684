"""One pass over the shards of a set: texts are written for its pictures (generate), texts are scored (filter), or both at once.

    python run.py stage=generate         stage.shards='data/web/*.tar' stage.captioners.captioner.checkpoint=PATH
    python run.py stage=filter           stage.synthetic=[FOLDER_OF_GENERATE] stage.scorers.filter.checkpoint=PATH
    python run.py stage=generate_filter  both in one pass: each picture is read and decoded once

The same command, started any number of times on any number of machines with one `stage.out`, shares the shards among the processes
(`claims.py`). The input is read where it lies. Out come, in the folder:

    description.json    what decides the records: input, models, decoding, seed, batch size; a folder of another is refused
    records/            one Parquet file a shard (`records.py`), whole or not there
    manifest.json       when all shards are done: texts in and out by source, broken pictures by reason, time and rate

What is written of a picture does not depend on how the work was split: a batch never crosses a shard, and begins at a multiple of its
size; a seed is drawn from the shard's name and the record's key.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blip.capfilt import manifest, records
from blip.capfilt.claims import Claims
from blip.capfilt.pictures import Batch, Pictures, loader
from blip.datamodules.index import Index, open_index
from blip.datamodules.sources import tell_indexing
from blip.datamodules.view_index import names_of
from blip.datamodules.views import HUMAN, SYNTHETIC, WEB, record_file

SECONDS = 10.0  # between two lines of progress
CAPTION = [name for name, _ in records.TEXT]

log = logging.getLogger(__name__)


class Pass:
    """Writes and scores texts of every picture of these shards.

    shards, index: as a data source has them. out: the folder of records, by default the run's.
    captioners: name -> what writes texts (`blip.capfilt.generate.Captioner`). synthetic: folders of passes that wrote some before.
    scorers: name -> what scores the shards' own texts and all synthetic ones (`blip.capfilt.filter`); without them only what
    the captioners write is recorded. source: what the shards' own texts are called, web or human.
    batch_size: pictures; num_workers: processes that read and decode, prefetch: batches that each holds ready; worker: any
    number, which says with what shard to begin. device: by default the GPU of this rank, where there is one.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        index: str | None = None,
        out: str | None = None,
        captioners: Mapping[str, Any] | None = None,
        synthetic: Sequence[str] = (),
        scorers: Mapping[str, Any] | None = None,
        source: str = WEB,
        batch_size: int = 32,
        seed: int = 42,
        num_workers: int = 0,
        prefetch: int = 4,
        worker: int = 0,
        device: str | None = None,
        cache_gb: float | None = None,
    ) -> None:
        self.shards, self.index_path, self.out = shards, index, out
        self.captioners = {name: node for name, node in sorted((captioners or {}).items()) if node is not None}
        self.scorers = {name: node for name, node in sorted((scorers or {}).items()) if node is not None}
        self.synthetic = [Path(folder) for folder in ([synthetic] if isinstance(synthetic, str) else synthetic or [])]
        if not self.captioners and not self.scorers:
            raise ValueError("nothing to do: name a captioner (stage.captioners) or a scorer (stage.scorers)")
        if self.synthetic and not self.scorers:
            raise ValueError("stage.synthetic names texts to score, and there is no scorer")
        if source not in (WEB, HUMAN):
            raise ValueError(f"source={source!r}: the shards' own texts are {WEB} or {HUMAN}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: at least 1")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.num_workers, self.prefetch, self.worker, self.device = num_workers, prefetch, worker, device
        self.cache_bytes = None if cache_gb is None else int(cache_gb * 2**30)

    def run(self, folder: Path) -> None:
        """Does all shards that no other process does. ValueError names those that cannot be read, when all others are done."""
        self.folder = Path(self.out) if self.out is not None else folder
        self.index = open_index(self.shards, self.index_path, progress=tell_indexing, check=False)
        self.names = names_of(self.index)
        device = self.device or _own_device()
        self.captioners = {name: _on(device, node) for name, node in self.captioners.items()}
        self.scorers = {name: _on(device, node) for name, node in self.scorers.items()}
        self.scores = [records.column(name, score) for name, scorer in self.scorers.items() for score in scorer.columns]
        self.scored_by = json.dumps({name: scorer.fingerprint for name, scorer in self.scorers.items()})
        self.description = self._describe()
        claims = Claims(self.folder, self.names, self.worker + _rank())
        left = len(self.names) - len(claims.done())
        try:
            broken = self._go_through(claims)
        finally:
            claims.close()
        if broken:
            listed = "\n".join(f"  {name}: {why}" for name, why in broken.items())
            raise ValueError(
                f"{len(broken)} shard(s) cannot be read; fetch them anew and start again, what is done stays:\n{listed}"
            )
        if others := len(self.names) - len(claims.done()):
            log.info(
                "%s: %d shards are in the hands of other processes; the last writes manifest.json", self.folder, others
            )
            return
        told = manifest.sum_up(self.folder, self.names, self.description, self.index.report.skipped)
        claims.clear()
        log.info(
            "%s: %s texts of %s pictures, %d broken; %s",
            *(self.folder, f"{sum(told['rows'].values()):,}", f"{told['pictures']:,}", sum(told["broken"].values())),
            f"{told['pictures_per_s'] or 0:.0f} pictures/s a process, {100 * (told['waited_for_data'] or 0):.0f} % of the time "
            "waiting for data"
            if left
            else "nothing was left to do",
        )

    # the shards one after the other

    def _go_through(self, claims: Claims) -> dict[str, str]:
        """Name -> what is wrong, of the shards that could not be read."""
        broken: dict[str, str] = {}

        def batches() -> Iterator[list[int]]:
            for shard in claims:
                start, end = (int(n) for n in self.index.shard_starts[shard : shard + 2])
                try:
                    self.index.check_file(shard)
                except ValueError as error:
                    broken[self.names[shard]] = str(error)
                    claims.release(shard, give_up=True)
                    continue
                if start == end:
                    self._finish(Done(shard), claims)
                for first in range(start, end, self.batch_size):
                    if shard in claims.held:  # else it was given up
                        yield list(range(first, min(first + self.batch_size, end)))

        sizes = [model.image_size for model in (*self.captioners.values(), *self.scorers.values())]
        pictures = Pictures(self.index, sizes, self.cache_bytes)
        progress = Progress(self.index, claims)
        work: Done | None = None
        asked = time.monotonic()
        for batch in loader(pictures, batches(), self.num_workers, self.prefetch, self.batch_size):
            came = time.monotonic()
            if batch.shard not in claims.held:
                continue
            if batch.wrong:
                broken[self.names[batch.shard]] = batch.wrong
                claims.release(batch.shard, give_up=True)
                continue
            if work is None or work.shard != batch.shard:
                work = Done(batch.shard, synthetic=self._written_before(batch.shard))
            if batch.records:
                self._add(batch, work)
            work.broken += [(self.index.key(record), reason) for record, reason in batch.broken]
            work.waited += came - asked
            work.seconds += time.monotonic() - asked
            if batch.end == self.index.shard_starts[batch.shard + 1]:
                self._finish(work, claims)
            progress.tell(batch, work)
            asked = time.monotonic()
        return broken

    def _add(self, batch: Batch, work: Done) -> None:
        """The rows of a batch's pictures: the shards' own texts, the synthetic ones by captioner, and all scores."""
        first = int(self.index.shard_starts[batch.shard])
        name = records.text_of(self.names[batch.shard])
        keys = [self.index.key(record) for record in batch.records]
        pixels = {size: list(images.numpy()) for size, images in batch.pixels.items()}
        empty = dict.fromkeys(CAPTION) | {"shard": name}
        rows: list[list[dict[str, Any]]] = []  # of each picture
        for record, key, texts in zip(batch.records, keys, batch.texts, strict=True):
            of_all = empty | {"record": record - first, "key": key}
            own = [of_all | {"source": self.source, "number": n, "text": text} for n, text in enumerate(texts)]
            rows.append((own if self.scorers else []) + work.synthetic.get(record - first, []))
        seeds = [_seed(self.seed, name, key) for key in keys]
        for captioner, model in self.captioners.items():
            about = {"source": SYNTHETIC, "captioner": captioner, "captioner_model": model.fingerprint}
            about["decoding"] = json.dumps(model.decoding, ensure_ascii=False)
            written = model.write(pixels[model.image_size], seeds)
            for of_picture, record, key, seed, said in zip(rows, batch.records, keys, seeds, written, strict=True):
                of_all = empty | about | {"record": record - first, "key": key, "seed": seed}
                for number, one in enumerate(said):
                    told = {"number": number, "text": one.text, "log_prob": one.log_prob, "tokens": one.tokens}
                    of_picture.append(of_all | told)
        for scorer, model in self.scorers.items():
            to_score = [[row["text"] for row in of_picture] for of_picture in rows]
            columns = [records.column(scorer, score) for score in model.columns]
            for of_picture, scores in zip(rows, model.score(pixels[model.image_size], to_score), strict=True):
                for row, score in zip(of_picture, scores, strict=True):
                    row.update(zip(columns, score, strict=True), scorers=self.scored_by)
        work.rows += [row for of_picture in rows for row in of_picture]
        work.pictures += len(batch.records)

    def _written_before(self, shard: int) -> dict[int, list[dict[str, Any]]]:
        """Record -> rows of its texts in the folders of `synthetic`."""
        found: dict[int, list[dict[str, Any]]] = {}
        if self.synthetic:
            table = records.read([record_file(folder, self.names[shard]) for folder in self.synthetic], CAPTION)
            written = [row for row in table.to_pylist() if row["source"] == SYNTHETIC]
            for row in sorted(written, key=lambda row: (row["captioner"], row["number"])):
                found.setdefault(row["record"], []).append(row)
        return found

    def _finish(self, work: Done, claims: Claims) -> None:
        """Writes the records of a shard and frees it."""
        shard, name = work.shard, self.names[work.shard]
        columns = records.schema(self.scores).names
        start, end = self.index.shard_starts[shard : shard + 2]
        own_texts = int(self.index.text_starts[end] - self.index.text_starts[start])
        texts_in = {self.source: own_texts} if self.scorers else {}
        if self.synthetic:
            texts_in[SYNTHETIC] = sum(map(len, work.synthetic.values()))
        sources = [row["source"] for row in work.rows]
        about = {
            "shard": records.text_of(name),
            "digest": self.index.digests[shard].decode(),
            "description": self.description,
            "pictures": work.pictures,
            "broken": work.broken,
            "in": texts_in,
            "rows": {source: sources.count(source) for source in sorted({*sources})},
            "seconds": round(work.seconds, 3),
            "waited": round(work.waited, 3),
        }
        rows = {column: [row[column] for row in work.rows] for column in columns}
        records.write(record_file(self.folder, name), rows, self.scores, about, claims.partial(shard))
        claims.release(shard)

    def _describe(self) -> str:
        """Says what decides the records in description.json, or ValueError where the folder is of something else."""
        before = [manifest.description(folder) for folder in self.synthetic]
        for folder, other in zip(self.synthetic, before, strict=True):
            if not other["captioners"]:
                raise ValueError(f"{folder}: no captioner wrote texts there; name a folder of stage=generate")
            if not manifest.complete(folder):
                raise ValueError(f"{folder}: its records are not complete; run that stage to its end first")
            if other["input"] != self.index.fingerprint:
                raise ValueError(f"{folder}: texts for other shards ({other['shards'][0]} ...) than {self.shards}")
        names = [*self.captioners, *(name for other in before for name in other["captioners"])]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two captioners are called {', '.join(twice)}; give one another name")
        decides = {
            "input": self.index.fingerprint,
            "source": self.source,
            "captioners": {n: {"model": c.fingerprint, "decoding": c.decoding} for n, c in self.captioners.items()},
            "synthetic": [other["hash"] for other in before],
            "scorers": {n: {"model": s.fingerprint, "columns": s.columns} for n, s in self.scorers.items()},
            "seed": self.seed if self.captioners else None,  # no other pass draws anything
            "batch_size": self.batch_size,
            "columns": records.schema(self.scores).names,
        }
        places = {
            "shards": [self.index.location(shard) for shard in range(len(self.names))],
            "index": self.index_path,
            "synthetic_folders": [str(folder.resolve()) for folder in self.synthetic],
        }
        return manifest.describe(self.folder, decides, places)


@dataclass
class Done:
    """What was done of a shard so far."""

    shard: int
    synthetic: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    pictures: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # of these, for the loader


class Progress:
    """A line of the log now and then: pictures of all processes together, this one's rate, time left."""

    def __init__(self, index: Index, claims: Claims) -> None:
        self.counts, self.claims = (index.shard_starts[1:] - index.shard_starts[:-1]).tolist(), claims
        self.began = self.shown = time.monotonic()
        self.before, self.pictures = self._finished(), 0

    def _finished(self) -> int:
        return sum(self.counts[shard] for shard in self.claims.done())

    def tell(self, batch: Batch, work: Done) -> None:
        self.pictures += len(batch.records)
        now = time.monotonic()
        if now - self.shown < SECONDS:
            return
        self.shown, seconds, total = now, now - self.began, sum(self.counts)
        done = self._finished() + (work.pictures if batch.shard in self.claims.held else 0)
        left = ""
        if done > self.before:
            left = f" | {timedelta(seconds=round((total - done) * seconds / (done - self.before)))} left"
        share, rate = 100 * done / max(1, total), self.pictures / seconds
        log.info(f"{done:,} of {total:,} pictures {share:3.0f} % | {rate:.0f} pictures/s{left}")


def _on(device: str, node: Any) -> Any:
    """A model: made on this device where its node is `_partial_`."""
    return node(device=device) if isinstance(node, partial) else node


def _own_device() -> str:
    """The GPU of this process, counted on its machine; cpu where there is none."""
    if not torch.cuda.is_available():
        return "cpu"
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return f"cuda:{rank % torch.cuda.device_count()}"


def _rank() -> int:
    """Which of the processes this is that one launcher started."""
    return int(os.environ.get("SLURM_PROCID", os.environ.get("RANK", 0)))


def _seed(seed: int, shard: str, key: str) -> int:
    """Of a picture, whatever is before it: from the stage's seed, the shard's name and the record's key."""
    told = json.dumps([seed, shard, key]).encode()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little") >> 1

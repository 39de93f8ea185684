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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blip.capfilt import records
from blip.capfilt.claims import Claims
from blip.capfilt.records import SYNTHETIC, WEB
from blip.datamodules.images import decode, resize_square
from blip.datamodules.index import Index, open_index
from blip.datamodules.records import entries_of
from blip.datamodules.shards import Reader, Span

SECONDS = 10.0  # between two lines of progress
NAMED = 20  # broken pictures named for each reason
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
        if source not in (WEB, records.HUMAN):
            raise ValueError(f"source={source!r}: the shards' own texts are {WEB} or {records.HUMAN}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: at least 1")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.num_workers, self.prefetch, self.worker, self.device = num_workers, prefetch, worker, device
        self.cache_bytes = None if cache_gb is None else int(cache_gb * 2**30)

    def run(self, folder: Path) -> None:
        """Does all shards that no other process does. ValueError names the shards that could not be read, all others are done."""
        self.folder = Path(self.out) if self.out is not None else folder
        self.index = open_index(self.shards, self.index_path, progress=_tell_indexing, check=False)
        self.names = [self.index.name(shard) for shard in range(len(self.index.names))]
        device = self.device or _own_device()
        self.captioners = {name: _on(device, node) for name, node in self.captioners.items()}
        self.scorers = {name: _on(device, node) for name, node in self.scorers.items()}
        self.scores = [records.column(name, score) for name, made in self.scorers.items() for score in made.columns]
        self.models = json.dumps({name: scorer.fingerprint for name, scorer in self.scorers.items()})
        self.described = self._describe()
        claims = Claims(self.folder, self.names, self.worker + int(os.environ.get("SLURM_PROCID", 0)))
        try:
            broken = self._go_through(claims)
            left = len(self.names) - len(claims.done())
        finally:
            claims.close()
        if broken:
            listed = "\n".join(f"  {name}: {why}" for name, why in broken.items())
            raise ValueError(
                f"{len(broken)} shard(s) cannot be read, all others are done or in work; fetch them anew and start again:\n{listed}"
            )
        if left:
            log.info("%d shards are in the hands of other processes, the last of which writes manifest.json", left)
        else:
            self._write_manifest()

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

        sizes = {model.image_size for model in [*self.captioners.values(), *self.scorers.values()]}
        loader: DataLoader = DataLoader(
            Pictures(self.index, sizes, self.cache_bytes),
            batch_sampler=batches(),  # type: ignore[arg-type]  # any iterable of keys
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # the pictures come as a batch
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch if self.num_workers else None,
            worker_init_fn=_one_thread,
        )
        progress = Progress(self.index, claims)
        work: Done | None = None
        asked = time.monotonic()
        for batch in loader:
            came = time.monotonic()
            if batch.shard not in claims.held:
                continue
            if batch.wrong:
                broken[self.names[batch.shard]] = batch.wrong
                claims.release(batch.shard, give_up=True)
                continue
            if work is None or work.shard != batch.shard:
                work = Done(batch.shard, synthetic=self._written_before(batch.shard))
            self._add(batch, work)
            work.waited += came - asked
            work.seconds += time.monotonic() - asked
            asked = time.monotonic()
            if batch.end == self.index.shard_starts[batch.shard + 1]:
                self._finish(work, claims)
            progress.tell(batch, work)
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
                    row.update(zip(columns, score, strict=True), scorers=self.models)
        work.rows += [row for of_picture in rows for row in of_picture]
        work.broken += [(self.index.key(record), reason) for record, reason in batch.broken]
        work.pictures += len(batch.records)

    def _written_before(self, shard: int) -> dict[int, list[dict[str, Any]]]:
        """Record -> rows of its texts in the folders of `synthetic`."""
        found: dict[int, list[dict[str, Any]]] = {}
        if self.synthetic:
            table = records.read([records.path_of(folder, self.names[shard]) for folder in self.synthetic], CAPTION)
            for row in sorted(table.to_pylist(), key=lambda row: (row["captioner"], row["number"])):
                if row["source"] == SYNTHETIC:
                    found.setdefault(row["record"], []).append(row)
        return found

    def _finish(self, work: Done, claims: Claims) -> None:
        """Writes the records of a shard and frees it."""
        shard, name = work.shard, self.names[work.shard]
        columns = records.schema(self.scores).names
        start, end = self.index.shard_starts[shard : shard + 2]
        texts_in = (
            {self.source: int(self.index.text_starts[end] - self.index.text_starts[start])} if self.scorers else {}
        )
        if self.synthetic:
            texts_in[SYNTHETIC] = sum(map(len, work.synthetic.values()))
        sources = [row["source"] for row in work.rows]
        about = {
            "shard": records.text_of(name),
            "digest": self.index.digests[shard].decode(),
            "description": self.described["hash"],
            "pictures": work.pictures,
            "broken": work.broken,
            "in": texts_in,
            "rows": {source: sources.count(source) for source in sorted({*sources})},
            "seconds": round(work.seconds, 3),
            "waited": round(work.waited, 3),
        }
        rows = {column: [row[column] for row in work.rows] for column in columns}
        records.write(records.path_of(self.folder, name), rows, self.scores, about, claims.partial(shard))
        claims.release(shard)

    # what is beside the records

    def _describe(self) -> dict[str, Any]:
        """Writes description.json, or ValueError where the folder has one that says otherwise."""
        before = [_described(folder) for folder in self.synthetic]
        for folder, other in zip(self.synthetic, before, strict=True):
            if not (folder / "manifest.json").is_file():
                raise ValueError(f"{folder}: its records are not complete; run that stage to its end first")
            if other["input"] != self.index.fingerprint:
                raise ValueError(f"{folder}: written for other shards ({other['shards'][:1]} ...) than {self.shards}")
        captioners = [*self.captioners, *(name for other in before for name in other["captioners"])]
        if twice := {name for name in captioners if captioners.count(name) > 1}:
            raise ValueError(f"two captioners are called {', '.join(sorted(twice))}: give one another name")
        decides: dict[str, Any] = {
            "input": self.index.fingerprint,
            "source": self.source,
            "captioners": {
                name: {"model": model.fingerprint, "decoding": model.decoding}
                for name, model in self.captioners.items()
            },
            "synthetic": [other["hash"] for other in before],
            "scorers": {
                name: {"model": model.fingerprint, "columns": list(model.columns)}
                for name, model in self.scorers.items()
            },
            "seed": self.seed,
            "batch_size": self.batch_size,
            "columns": records.schema(self.scores).names,
        }
        decides = json.loads(json.dumps(decides))
        told = json.dumps(decides, sort_keys=True).encode()
        described = {"hash": hashlib.blake2b(told, digest_size=16).hexdigest(), **decides}
        described |= {"shards": [self.index.location(shard) for shard in range(len(self.names))]}
        described |= {"index": self.index_path, "synthetic_folders": [str(f.resolve()) for f in self.synthetic]}
        path = self.folder / "description.json"
        if not path.is_file():
            _create(path, json.dumps(described, indent=2))
        there = _described(self.folder)
        if there["hash"] != described["hash"]:
            differ = [
                f"  {key}: {there.get(key)} there, {decides[key]} now"
                for key in decides
                if there.get(key) != decides[key]
            ]
            raise ValueError(
                f"{self.folder} holds records of another pass; name another folder (stage.out, hydra.run.dir):\n"
                + "\n".join(differ)
            )
        return described

    def _write_manifest(self) -> None:
        """Sums up all shards; the same whoever writes it, but for times where a shard was done twice."""
        shards = {name: records.about(records.path_of(self.folder, name)) for name in self.names}
        if other := [name for name, about in shards.items() if about["description"] != self.described["hash"]]:
            raise ValueError(
                f"{self.folder}: records of another pass lie there ({other[0]} ...); take them away and start again"
            )
        broken: dict[str, list[str]] = {}
        for name, about in shards.items():
            for key, reason in about["broken"]:
                broken.setdefault(reason, []).append(f"{name}: {key}")

        def total(what: str) -> dict[str, int]:
            sources = sorted({source for about in shards.values() for source in about[what]})
            return {source: sum(about[what].get(source, 0) for about in shards.values()) for source in sources}

        pictures, seconds, waited = (sum(a[key] for a in shards.values()) for key in ("pictures", "seconds", "waited"))
        manifest = {
            "description": self.described["hash"],
            "pictures": pictures,
            "in": total("in"),
            "rows": total("rows"),
            "broken": {
                reason: {"count": len(names), "first": names[:NAMED]} for reason, names in sorted(broken.items())
            },
            "left_out_by_the_index": self.index.report.skipped,
            "seconds": round(seconds, 3),  # of all workers together
            "pictures_per_s": round(pictures / seconds, 3) if seconds else None,  # of one worker
            "waited_for_data": round(waited / seconds, 4) if seconds else None,
            "shards": {
                name: {key: about[key] for key in ("pictures", "rows", "seconds")} for name, about in shards.items()
            },
        }
        path = self.folder / "manifest.json"
        records.replace(
            path, json.dumps(manifest, indent=2).encode(), path.with_name(f"manifest.{records.own_name()}.partial")
        )
        log.info(
            "%s: %s texts of %s pictures (%s left out as broken), %.1f pictures/s a worker, %.0f %% of the time waiting for data",
            *(self.folder, f"{sum(manifest['rows'].values()):,}", f"{pictures:,}", sum(map(len, broken.values()))),
            *(manifest["pictures_per_s"] or 0.0, 100 * (manifest["waited_for_data"] or 0.0)),
        )


@dataclass
class Batch:
    """Pictures of one shard: those that decoded, [B, S, S, 3] uint8 for each size, their texts, and which are broken and why."""

    shard: int
    end: int  # the record behind its last
    records: list[int] = field(default_factory=list)
    pixels: dict[int, Tensor] = field(default_factory=dict)
    texts: list[list[str]] = field(default_factory=list)
    broken: list[tuple[int, str]] = field(default_factory=list)
    wrong: str = ""  # why the shard cannot be read


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


class Pictures(Dataset):
    """Records by number; each picture is read and decoded once and resized for each of `sizes`."""

    def __init__(self, index: Index, sizes: set[int], cache_bytes: int | None) -> None:
        self.index, self.sizes, self.reader = index, sorted(sizes), Reader(cache_bytes)

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        places = [self.index.places(number) for number in numbers]
        batch = Batch(places[0][0], numbers[-1] + 1)
        views: dict[int, list[Tensor]] = {size: [] for size in self.sizes}
        try:
            read = self.reader.read([Span(self.index.shard(shard), *parts) for shard, parts, _ in places])
        except (OSError, ValueError) as error:
            batch.wrong = str(error)
            return batch
        for number, (data, text), (_, _, is_json) in zip(numbers, read, places, strict=True):
            try:
                texts, image = entries_of(text, is_json, self.index.kind)[0], decode(data)
            except ValueError as error:  # an ImageError is one with a reason
                batch.broken.append((number, getattr(error, "reason", str(error))))
                continue
            batch.records.append(number)
            batch.texts.append(texts)
            for size in self.sizes:
                views[size].append(torch.from_numpy(resize_square(image, size)))
        batch.pixels = {size: torch.stack(images) for size, images in views.items() if images}
        return batch


class Progress:
    """A line of the log now and then: pictures of all processes together, this one's rate, time left."""

    def __init__(self, index: Index, claims: Claims) -> None:
        self.index, self.claims = index, claims
        self.counts = (index.shard_starts[1:] - index.shard_starts[:-1]).tolist()
        self.began = self.shown = time.monotonic()
        self.before = self._there()
        self.pictures = 0

    def _there(self) -> int:
        return sum(self.counts[shard] for shard in self.claims.done())

    def tell(self, batch: Batch, work: Done) -> None:
        now = time.monotonic()
        self.pictures += len(batch.records)
        if now - self.shown < SECONDS:
            return
        self.shown = now
        done, total = self._there() + (work.pictures if batch.shard in self.claims.held else 0), sum(self.counts)
        rate, all_rates = self.pictures / (now - self.began), (done - self.before) / (now - self.began)
        left = f"{(total - done) / all_rates / 60:.0f} min left" if all_rates > 0 else ""
        log.info(
            "%s of %s pictures %3.0f %% | %.0f pictures/s | %s",
            f"{done:,}",
            f"{total:,}",
            100 * done / total,
            rate,
            left,
        )


def _on(device: str, node: Any) -> Any:
    """A model: made on this device where its node is `_partial_`."""
    return node(device=device) if isinstance(node, partial) else node


def _own_device() -> str:
    """The GPU of this process, counted on its machine; cpu where there is none."""
    if not torch.cuda.is_available():
        return "cpu"
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return f"cuda:{rank % torch.cuda.device_count()}"


def _seed(seed: int, shard: str, key: str) -> int:
    """Of a picture, whatever is before it: from the stage's seed, the shard's name and the record's key."""
    told = json.dumps([seed, shard, key]).encode()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little") >> 1


def _described(folder: Path) -> dict[str, Any]:
    path = folder / "description.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not the description of a pass ({error})") from None


def _create(path: Path, text: str) -> None:
    """Puts a file there, whole, where none is; of several that do so at once one is first."""
    new = path.with_name(f"{path.stem}.{records.own_name()}.new")
    records.replace(new, text.encode(), new.with_suffix(".partial"))
    try:
        os.link(new, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(new, path)
    new.unlink(missing_ok=True)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _tell_indexing(done: int, of: int, name: str) -> None:
    if done == of or done % max(1, of // 20) == 0:
        log.info("indexing shards: %d of %d (%s)", done, of, name)

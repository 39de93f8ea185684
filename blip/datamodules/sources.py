"""What a config says of data, checked: sources to train on, sets to evaluate on, and their indexes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from blip.datamodules.index import Index, open_index
from blip.datamodules.locations import expand
from blip.datamodules.plan import Phase, Source
from blip.datamodules.records import OF_CLIPS, PAIRS, Kind

SOURCE_KEYS = {"name", "shards", "index", "view", "weight", "epochs", "part_of_epoch", "phases"}
SET_KEYS = {"shards", "index", "view"}

log = logging.getLogger(__name__)


def checked_sources(sources: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [_checked(spec, f"source {number}", SOURCE_KEYS) for number, spec in enumerate(sources)]


def checked_sets(sets: Mapping[str, Mapping[str, Any]] | None, stage: str, kind: Kind) -> dict[str, dict[str, Any]]:
    """Evaluation sets by name, "main" first."""
    known = SET_KEYS | ({"captions"} if kind is PAIRS else set()) | ({"frames"} if kind.name in OF_CLIPS else set())
    specs = {name: _checked(spec, f"{stage} set {name}", known) for name, spec in (sets or {}).items()}
    if bad := [name for name, spec in specs.items() if spec.get("captions", "first") not in ("first", "all")]:
        raise ValueError(f"{stage} sets {bad}: captions must be `first` or `all`")
    if bad := [name for name, spec in specs.items() if not _is_count(spec.get("frames"))]:
        raise ValueError(f"{stage} sets {bad}: frames says how many of a clip are seen, or nothing for pictures")
    return dict(sorted(specs.items(), key=lambda item: item[0] != "main"))


def _is_count(frames: Any) -> bool:
    return frames is None or (isinstance(frames, int) and not isinstance(frames, bool) and 1 <= frames <= 1000)


def _checked(spec: Mapping[str, Any], where: str, known: set[str]) -> dict[str, Any]:
    if unknown := set(spec) - known:
        raise ValueError(f"{where}: unknown {sorted(unknown)}; it may say {sorted(known)}")
    if not spec.get("shards") and not spec.get("phases"):
        raise ValueError(f"{where}: `shards` is missing")
    if spec.get("view"):
        from blip.datamodules.views import View

        return {**spec, "view": View.of(spec["view"])}
    return dict(spec)


def index_of(spec: Mapping[str, Any], kind: Kind) -> Index:
    """The index of a source or set, made where it is missing; a source with phases is indexed as one, a view as what it keeps."""
    kind = OF_CLIPS[kind.name] if spec.get("frames") is not None else kind
    index = open_index(_all_shards(spec), spec.get("index"), progress=tell_indexing, records=kind.name)
    if not spec.get("view"):
        return index
    from blip.datamodules.view_index import view_index

    return view_index(index, spec["view"])


def part(source: Mapping[str, Any], index: Index, entries: str, number: int) -> Source:
    """A source in the plan's numbers; its units are entries (`all`) or records (`one`)."""
    if source.get("weight") is not None and (
        source.get("epochs") is not None or source.get("part_of_epoch") is not None
    ):
        raise ValueError(
            f"source {source.get('name', number)}: `weight` says how much; leave `epochs` and `part_of_epoch`"
        )
    ends = index.shard_starts if entries == "one" else index.text_starts[index.shard_starts]
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


def counts(index: Index) -> str:
    """What an index holds and what it left out, in words."""
    report = index.report
    rows = "texts" if index.kind.text is str else f"{index.kind.row}s"
    text = f"{report.pictures:,} {index.kind.seen}s with {report.texts:,} {rows} in {report.shards:,} shards"
    left_out: Iterable[str] = (f"{count:,} {reason}" for reason, count in report.skipped.items())
    return f"{text}; left out: {', '.join(left_out)}" if report.skipped else text


def _all_shards(spec: Mapping[str, Any]) -> list[str]:
    """Locations of all shards of a source, those that only its phases name included, each once."""
    patterns = _as_list(spec["shards"]) if spec.get("shards") else []
    patterns += [p for phase in spec.get("phases") or [] for p in _as_list(phase["shards"])]
    return list(dict.fromkeys(location for pattern in patterns for location in expand(pattern)))


def _as_list(shards: Any) -> list[Any]:
    return [shards] if isinstance(shards, str | Path) else list(shards)


def tell_indexing(done: int, of: int, name: str) -> None:
    """Says in the log now and then how far the making of an index is."""
    if done == of or done % max(1, of // 20) == 0:
        log.info("indexing shards: %d of %d (%s)", done, of, name)

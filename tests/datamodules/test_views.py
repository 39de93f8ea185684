"""A view keeps the texts that its rule says, and streams as shards would that hold just these."""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip.datamodules.index import Index, open_index
from blip.datamodules.pairs import PairsDataModule
from blip.datamodules.shards import EvaluationRecords, texts_in
from blip.datamodules.view_index import names_of, view_index
from blip.datamodules.views import View, decide, evenly, kept_rows
from tests.datamodules.making import picture, tar_of, write_records, write_shards, write_vocabulary
from tests.datamodules.scoring import write_pass
from tests.datamodules.serving import serving
from tests.datamodules.test_stream import as_rank, trace

SIZES = [13, 5, 22]


def text(picture: int, number: int) -> str:
    return f"a picture of number {picture} text {number}"


def score(picture: int, source: str, number: int) -> dict[str, float]:
    """Of web texts those of even pictures fit, of odd ones the second; a synthetic text fits where 3 divides its picture's number."""
    fits = picture % 3 == 0 if source == "synthetic" else picture % 2 == 0 or number == 1
    return {"itm": 0.9 if fits else 0.1, "itc": picture / 100}


# what a threshold of 0.5 keeps of 40 pictures: two web texts of 20, one of 20, and 14 synthetic ones
KEPT = [(n, ([0, 1] if n % 2 == 0 else [1]) + ([9] if n % 3 == 0 else [])) for n in range(40)]


def shown(index: Index) -> list[tuple[str, list[str]]]:
    """(key, texts) of each record, as evaluation shows them."""
    samples = map(EvaluationRecords(index, "all", 8).__getitem__, range(len(index.pictures)))
    return [(sample.key, sample.entries) for sample in samples]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """40 pictures of two texts each in three shards, and a vocabulary."""
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder / "web", SIZES, texts=2)
    write_vocabulary(folder / "vocab.txt")
    return folder


@pytest.fixture(scope="module")
def index(shards) -> Index:
    return open_index(shards / "web" / "*.tar")


@pytest.fixture(scope="module")
def records(index, tmp_path_factory) -> Path:
    return write_pass(tmp_path_factory.mktemp("pass"), index, score, ("itm", "itc"))


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> Path:
    """Shards that hold what a threshold of 0.5 keeps, with these texts and no others."""
    folder, first = tmp_path_factory.mktemp("held"), 0
    for shard, size in enumerate(SIZES):
        members: dict[str, bytes] = {}
        for n, numbers in KEPT[first : first + size]:
            members |= {f"{n:05d}.png": picture(n)}
            members |= {f"{n:05d}.json": json.dumps({"captions": [text(n, i) for i in numbers]}).encode()}
        (folder / f"{shard:05d}.tar").write_bytes(tar_of(members))
        first += size
    return folder


def module(shards: Path, source: dict[str, Any], **options: Any) -> PairsDataModule:
    defaults = {"image_size": 8, "batch_size": 8, "eval_batch_size": 4, "seed": 1, "max_words": 30, "max_tokens": 12}
    more = {"window": 30, "augment": {}, "tokenizer": shards / "vocab.txt"}
    return PairsDataModule(sources=[{"name": "web", **source}], **(defaults | more | options))


# what is kept


def test_a_view_holds_the_texts_kept_and_pictures_without_one_are_gone(index, records):
    expected = [(f"{n:05d}", [text(n, i) for i in numbers]) for n, numbers in KEPT]
    kept = view_index(index, View(records))
    assert shown(kept) == expected
    assert list(texts_in(kept)) == [each for _, texts in expected for each in texts]
    assert (len(kept), kept.report.pictures, kept.report.texts) == (74, 40, 74)
    assert kept.report.skipped == {"synthetic texts not kept": 26, "web texts not kept": 20}
    written = view_index(index, View(records, sources="synthetic"))
    assert shown(written) == [(f"{n:05d}", [text(n, 9)]) for n in range(0, 40, 3)]
    assert written.report.skipped["pictures without a kept text"] == 26
    assert [written.full_name(n) for n in (0, 5)] == ["00000.tar: 00000", "00001.tar: 00015"]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [1, 2, 4]),
        ({"threshold": 0.6}, [1, 4]),
        ({"scores": "itc", "threshold": 0.3}, [0, 1, 5]),  # as LAION did
        ({"scores": ["itm", "itc"], "combine": "mean"}, [1]),
        ({"scores": ["itm", "itc"], "combine": "unanimous", "threshold": 0.3}, [1]),
        ({"scores": ["itm", "itc"], "combine": "unanimous", "threshold": 0.2}, [1, 2, 5]),
        ({"share": 0.5}, [1, 2, 4]),
        ({"share": 1 / 3}, [1, 4]),
        ({"sources": "web", "share": 0.5}, [1, 4]),
        ({"sources": ["synthetic"]}, [2]),
        ({"scores": []}, [0, 1, 2, 3, 4, 5]),
        ({"share": 1.0}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_rule_keeps_the_texts_that_it_says(options, kept):
    table = pa.table(
        {
            "source": ["web", "web", "synthetic", "synthetic", "web", "web"],
            "text": list("abcdef"),
            "itm": np.array([0.1, 0.9, 0.5, 0.49, 0.7, 0.25], np.float32),
            "itc": np.array([0.8, 0.5, 0.2, 0.1, 0.0, 0.3], np.float32),
        }
    )
    assert np.flatnonzero(decide(table, View("x", **options))).tolist() == kept


def test_what_has_no_score_or_says_nothing_is_not_kept():
    scores = pa.array([0.9, None, float("nan"), 0.9, 0.9], pa.float32())
    table = pa.table({"source": ["synthetic"] * 5, "text": ["a", "b", "c", " .!", ""], "itm": scores})
    assert decide(table, View("x")).tolist() == [True, False, False, False, False]
    for share in (0.3, 1.0):
        assert decide(table, View("x", share=share)).tolist() == [True, False, False, False, False]


def test_a_share_is_exact_over_all_shards_whatever_scores_are_equal(index, tmp_path):
    """Of 120 texts 80 score 1.0: a share of a quarter takes 30 of these, from all shards alike."""
    pass_ = write_pass(tmp_path, index, lambda n, source, number: {"itm": 1.0 if number == 0 else n / 1000})
    kept = [times for _, times in kept_rows(View(pass_, share=0.25), names_of(index))]
    assert [int(times.sum()) for times in kept] == [9, 4, 17], "of 26, 10 and 44"
    for share in (0.001, 0.25, 0.5, 0.7, 0.9):
        rows = [*kept_rows(View(pass_, share=share), names_of(index))]
        scores = np.concatenate([table["itm"].to_numpy() for table, _ in rows])
        times = np.concatenate([times for _, times in rows])
        assert times.sum() == round(120 * share)
        assert scores[times == 1].min(initial=1) >= scores[times == 0].max()
    assert len(view_index(index, View(pass_, share=0.7))) == 84


@pytest.mark.parametrize(("number", "places"), [(0, 5), (3, 7), (7, 7), (20, 7)])
def test_evenly_gives_each_place_as_much_as_the_others_or_one_more(number, places):
    found = evenly(number, places)
    assert found.sum() == number
    assert set(found.tolist()) <= {number // places, number // places + 1}
    assert evenly(number, places, 2, 5).tolist() == found[2:5].tolist()
    assert set(evenly(247 * 10**6, 153 * 10**6, 153 * 10**6 - 900).tolist()) == {1, 2}, (
        "also of as many as 129M pictures have"
    )


@pytest.mark.parametrize("options", [{"threshold": 0.5}, {"threshold": 0.95}, {"share": 0.9}, {"share": 0.25}])
def test_the_control_has_as_many_texts_as_the_view_all_of_them_the_shards_own(index, tmp_path, options):
    def rated(n: int, source: str, number: int) -> dict[str, float]:
        return {"itm": 0.99 if n % 4 == 0 else 0.6}

    pass_ = write_pass(tmp_path, index, rated, written=lambda n: [text(n, 8), text(n, 9)])
    view, control = View(pass_, **options), View(pass_, **options, control=True)
    kept, repeated = view_index(index, view), view_index(index, control)
    assert len(repeated) == len(kept) == {0.5: 160, 0.95: 40, 0.9: 144, 0.25: 40}[next(iter(options.values()))]
    texts = list(texts_in(repeated))
    counts = [texts.count(text(n, i)) for n in range(40) for i in range(2)]
    assert sum(counts) == len(texts)
    assert max(counts) - min(counts) <= 1
    assert repeated.fingerprint != kept.fingerprint


def test_filters_are_combined_over_the_same_texts(index, records, tmp_path):
    other = write_pass(tmp_path / "other", index, lambda n, *_: {"itm": 0.7 if n < 20 else 0.2})
    both = [records, other]
    assert len(view_index(index, View(both, combine="mean", threshold=0.75))) == sum(
        len(numbers) for n, numbers in KEPT if n < 20
    )
    assert len(view_index(index, View(both, combine="unanimous"))) == sum(len(k) for n, k in KEPT if n < 20)
    assert len(view_index(index, View(both, combine="mean", threshold=0.4))) > 74
    strange = write_pass(tmp_path / "strange", index, score, ("itm", "itc"), written=lambda n: ["a picture"])
    with pytest.raises(ValueError, match="other texts than those of"):
        view_index(index, View([records, strange]))
    path = strange / "records" / "00000.tar.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["captioner"]), path)
    with pytest.raises(
        ValueError, match=r"00000\.tar\.parquet: no records of a pass, which have a column \['captioner'\]"
    ):
        view_index(index, View([records, strange]))


def test_texts_are_as_written_in_whatever_characters(tmp_path):
    index = open_index(write_shards(tmp_path / "data", [1]))
    texts = ['two\nlines, "quoted" \\ud83d \\n', "ein Bär 🐻", "a \u2028 line", "{}"]
    pass_ = write_pass(tmp_path / "pass", index, lambda *_: {"itm": 1}, written=lambda n: [*texts, "...", ""])
    assert shown(view_index(index, View(pass_))) == [("00000", [text(0, 0), *texts])]


def test_any_reader_of_parquet_reads_the_records_as_they_are(records):
    files = str(records / "records" / "*.parquet")
    ((count,),) = duckdb.sql(f"SELECT count(*) FROM '{files}' WHERE itm >= 0.5 AND source = 'web'").fetchall()
    frame = pandas.concat(pandas.read_parquet(path) for path in sorted((records / "records").glob("*.parquet")))
    lazy = polars.scan_parquet(files).filter((polars.col("itm") >= 0.5) & (polars.col("source") == "web"))
    assert count == 60
    assert len(frame[(frame.itm >= 0.5) & (frame.source == "web")]) == 60
    assert lazy.select(polars.len()).collect().item() == 60
    assert set(frame.text[frame.source == "synthetic"]) == {text(n, 9) for n in range(40)}
    assert frame.captioner[frame.source == "web"].isna().all()


# how it streams


@pytest.mark.parametrize("captions", ["all", "one"])
def test_a_view_streams_as_shards_do_that_hold_its_texts_alone(shards, records, held, captions):
    view = {"shards": str(shards / "web" / "*.tar"), "view": {"records": str(records)}}
    seen, expected = (module(shards, source, captions=captions) for source in (view, {"shards": str(held / "*.tar")}))
    for _ in range(2):
        batches = [*seen.train_dataloader()]
        assert [trace(batch) for batch in batches] == [trace(batch) for batch in expected.train_dataloader()]
        for each in (seen, expected):
            each.advance(batches[-1])
    assert seen.pairs_per_epoch == (74 if captions == "all" else 40)


def test_a_view_shows_each_kept_text_once_on_any_number_of_ranks_and_goes_on_after_a_stop(shards, records):
    source = {"shards": str(shards / "web" / "*.tar"), "view": {"records": str(records)}}
    whole = [*module(shards, source).train_dataloader()]
    parts = [[*as_rank(module(shards, source, batch_size=4), rank, 2).train_dataloader()] for rank in range(2)]
    texts = [batch.texts for batch in whole]
    assert [one.texts + other.texts for one, other in zip(*parts, strict=True)] == texts
    assert len({each for batch in texts for each in batch}) == 72
    stopped, resumed = module(shards, source), module(shards, source, num_workers=2)
    stopped.advance(whole[3])
    resumed.load_state_dict(stopped.state_dict())
    assert [trace(batch) for batch in resumed.train_dataloader()] == [trace(batch) for batch in whole[4:]]


def test_a_run_does_not_go_on_with_another_view_and_the_same_rule_is_the_same_data(shards, records):
    def data(**options: Any) -> PairsDataModule:
        view = {"records": str(records), **options}
        return module(shards, {"shards": str(shards / "web" / "*.tar"), "view": view})

    first = data()
    assert data(threshold=0.6).fingerprint == first.fingerprint, "no text scores between 0.5 and 0.6"
    data(threshold=0.6).load_state_dict(first.state_dict())
    for options in ({"threshold": 0.05}, {"sources": ["web"]}, {"control": True}):
        with pytest.raises(ValueError, match="not those of the checkpoint"):
            data(**options).load_state_dict(first.state_dict())
    plain = module(shards, {"shards": str(shards / "web" / "*.tar"), "view": None})
    assert plain.pairs_per_epoch == 80
    with pytest.raises(ValueError, match="not those of the checkpoint"):
        plain.load_state_dict(first.state_dict())


def test_phases_of_a_view_are_named_by_shard(shards, records):
    web = str(shards / "web" / "*.tar")
    phases = [{"until": 0.5, "shards": str(shards / "web" / "00001.tar")}, {"until": 1.0, "shards": web}]
    source = {"shards": web, "phases": phases, "view": {"records": str(records), "sources": ["web"]}}
    numbers, seen = [], module(shards, source, total_pairs=120, batch_size=10)
    for _ in range(2):
        for batch in seen.train_dataloader():
            numbers.append({int(key) for key in batch.keys})
            seen.advance(batch)
    assert set().union(*numbers[:6]) == set(range(13, 18))
    assert set().union(*numbers) == set(range(40))
    without = source | {"view": {"records": str(records), "scores": ["itc"], "threshold": 0.3}}
    with pytest.raises(ValueError, match=r"nothing in the shards of the phases until \[0.5\]"):
        _ = module(shards, without, total_pairs=120).plan


@pytest.mark.parametrize("ranges", [True, False])
def test_a_view_of_urls_streams_the_bytes_of_local_files(shards, records, tmp_path, monkeypatch, ranges):
    view = {"records": str(records)}
    local = [
        trace(b) for b in module(shards, {"shards": str(shards / "web" / "*.tar"), "view": view}).train_dataloader()
    ]
    monkeypatch.setenv("BLIP_CACHE", str(tmp_path))
    with serving(shards / "web", ranges) as server:
        distant = module(shards, {"shards": f"{server.url}/{{00000..00002}}.tar", "view": view})
        assert [trace(batch) for batch in distant.train_dataloader()] == local


def test_a_set_of_evaluation_can_be_a_view(shards, records):
    spec = {"shards": str(shards / "web" / "*.tar"), "view": {"records": str(records)}, "captions": "all"}
    datamodule = module(shards, {"shards": "x"}, test={"main": spec})
    (loader,) = datamodule.test_dataloader()
    assert [each for batch in loader for each in batch.texts] == [text(n, i) for n, numbers in KEPT for i in numbers]
    assert datamodule.evaluation_shards("test", "main") == {
        d.decode() for d in open_index(spec["shards"]).digests.tolist()
    }


# how it is kept


def test_a_view_is_made_once_also_by_many_at_once_and_anew_when_records_change(index, tmp_path):
    pass_ = write_pass(tmp_path, index, score, ("itm", "itc"))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: view_index(index, View(pass_)), range(6)))
    (path,) = {each.path for each in found}
    assert path.parent == pass_ / "views"
    made = path.stat().st_mtime_ns
    assert view_index(index, View(pass_)).path.stat().st_mtime_ns == made
    assert [p.name for p in sorted(path.parent.iterdir())] == [path.name, f"{path.name}.lock"]
    write_pass(tmp_path, index, lambda *_: {"itm": 0.9, "itc": 0.0}, ("itm", "itc"))
    assert len(view_index(index, View(pass_))) == 120


def test_a_full_disk_leaves_no_view_and_names_it(index, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    pass_ = write_pass(tmp_path, index, score, ("itm", "itc"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*/views/.*index'"):
            view_index(index, View(pass_))
    assert [path.suffix for path in (pass_ / "views").iterdir()] == [".lock"]
    assert len(view_index(index, View(pass_))) == 74


def test_of_a_read_only_folder_the_view_lies_in_the_cache(index, tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP_CACHE", str(tmp_path / "cache"))
    pass_ = write_pass(tmp_path / "pass", index, score, ("itm", "itc"))
    pass_.chmod(0o555)
    try:
        before = sorted(os.walk(pass_))
        made = view_index(index, View(pass_))
        assert made.path.is_relative_to(tmp_path / "cache")
        assert len(made) == len(view_index(index, View(pass_))) == 74
        assert sorted(os.walk(pass_)) == before
    finally:
        pass_.chmod(0o755)


# what is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"treshold": 0.5}, r"unknown \['treshold'\]"),
        ({"combine": "median"}, "combine='median'"),
        ({"threshold": 0.5, "share": 0.5}, "one of them, not both"),
        ({"share": 0}, "share=0: of the texts"),
        ({"share": 30}, "share=30: of the texts"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"sources": ["web", "robot"]}, "sources out of"),
        ({"scores": [], "threshold": 0.5}, "without scores keeps every text"),
        ({"records": []}, "needs the folder of its records"),
    ],
)
def test_a_view_that_says_nonsense_is_refused_with_the_config(shards, options, said):
    with pytest.raises(ValueError, match=said):
        module(shards, {"shards": "x", "view": {"records": "x"} | options})
    with pytest.raises(ValueError, match="`records` is missing"):
        module(shards, {"shards": "x", "view": {"threshold": 0.5}})


def test_records_of_another_input_or_of_some_shards_only_are_refused(shards, index, records, tmp_path):
    with pytest.raises(ValueError, match="records of another input"):
        view_index(open_index(shards / "web" / "0000[01].tar"), View(records))
    part = write_pass(tmp_path / "part", index, score, ("itm", "itc"), leave=[0, 2])
    with pytest.raises(ValueError, match=r"2 of 3 shards have no records yet, first 00000\.tar"):
        view_index(index, View(part))
    with pytest.raises(ValueError, match="no records there"):
        view_index(index, View(tmp_path))
    with pytest.raises(ValueError, match=r"no score \['itm_clip'\]; its columns are .*'itc'"):
        view_index(index, View(records, scores=["itm", "itm_clip"]))
    with pytest.raises(ValueError, match="keeps no text of its 3 shards"):
        view_index(index, View(records, threshold=0.95))
    assert [path.name for path in (records / "views").glob("*.partial")] == []
    (part / "records" / "00000.tar.parquet").write_bytes(b"PAR1 cut")
    (part / "records" / "00002.tar.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ValueError, match=r"00000\.tar\.parquet: not a whole Parquet file"):
        view_index(index, View(part))


def test_a_view_is_of_pairs(tmp_path):
    questions = open_index(write_records(tmp_path, [2], "questions"), records="questions")
    with pytest.raises(ValueError, match="a view is of pairs"):
        view_index(questions, View(tmp_path))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([b"a.tar", b"b.tar", b"a.tar"], "several shards are called a.tar"),  # of URLs with a query each
        ([b"a.tar", b"../b.tar"], r"called '\.\./b\.tar'"),
        ([b"a.tar", b""], "called ''"),
    ],
    ids=["twice", "outside", "nothing"],
)
def test_shards_whose_names_are_not_those_of_files_of_their_own_have_no_records(shards, names, said):
    index = open_index(shards / "web" / "*.tar")
    index.names = np.array(names)
    with pytest.raises(ValueError, match=said):
        names_of(index)

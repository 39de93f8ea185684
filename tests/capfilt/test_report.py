"""The report: its numbers are those of the records and of the truth, its page is whole, harmless and needs nothing else."""

from __future__ import annotations

import json
import random
import re
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from blip.capfilt import records
from blip.capfilt.report import write_report
from blip.capfilt.tally import tally
from blip.cli import main
from blip.datamodules.index import build_index, open_index
from blip.datamodules.shapes import write_world
from blip.datamodules.shapes_language import caption, wrong_attribute
from blip.datamodules.shapes_truth import described
from blip.datamodules.views import View, record_file

SIZES = {"train": 3, "web": 120, "val": 3, "test": 3, "reserved": 3}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> \u202e\x00\x1b[31m\"'&amp;"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("worlds") / "world", seed=5, sizes=SIZES, processes=1) / "web"


def told(shard: Path) -> Iterator[tuple[str, dict]]:
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith(".json"):
                yield member.name.removesuffix(".json"), json.load(tar.extractfile(member))  # type: ignore[arg-type]


def scored(folder: Path, world: Path, hostile: str = "") -> list[dict[str, Any]]:
    """Records of the world as a filter leaves them that errs in every tenth text; returns their rows."""
    index = build_index(str(world / "*.tar"))
    rows = []
    for shard in range(len(index.names)):
        name, of_shard, rng = index.name(shard), [], random.Random(shard)
        for number, (record_key, record) in enumerate(told(Path(index.location(shard)))):
            scene = described(record)
            assert scene is not None
            right = rng.random() < 0.7
            written = caption(scene if right else wrong_attribute(scene, rng), rng)
            for source, captioner, text, true in (
                ("web", None, record["captions"][0], record["truth"]),
                ("synthetic", "captioner", hostile or written, right and not hostile),
            ):
                likely = true != (rng.random() < 0.1)
                itm = rng.uniform(0.5, 1) if likely else rng.uniform(0, 0.499)
                row = dict.fromkeys(column for column, _ in records.TEXT)
                row |= {"shard": name, "record": number, "key": record_key, "source": source, "captioner": captioner}
                row |= {"number": 0, "text": text, "itm": itm, "itc": itm / 2 - 0.1, "scorers": "{}"}
                of_shard.append(row | {"true": true})
        columns = records.schema(("itm", "itc")).names
        about = {"shard": name, "digest": "", "description": "", "pictures": number + 1, "broken": [], "seconds": 2.0}
        if not shard:
            about["broken"] = [["000000007<b>", "cut short"]]
        path = record_file(folder, name)
        as_columns = {column: [row[column] for row in of_shard] for column in columns}
        records.write(path, as_columns, ("itm", "itc"), about, path.with_suffix(".partial"))
        rows += of_shard
    described_by = {"hash": "", "input": index.fingerprint, "captioners": {}}
    described_by["shards"] = [index.location(shard) for shard in range(len(index.names))]
    (folder / "description.json").write_text(json.dumps(described_by))
    (folder / "manifest.json").write_text("{}")
    return rows


@pytest.fixture(scope="module")
def passed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("records")
    return folder, scored(folder, world)


class Tags(HTMLParser):
    """What a page holds: tags with their attributes, and whether each is closed."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def test_counts_and_detection_of_noise_are_those_of_the_records(passed: tuple, tmp_path: Path) -> None:
    folder, rows = passed
    numbers = write_report(tmp_path / "report.html", View(folder))
    for source in ("web", "synthetic"):
        of_source = [row for row in rows if row["source"] == source]
        true = np.array([row["true"] for row in of_source])
        kept = np.array([row["itm"] >= 0.5 for row in of_source])
        assert numbers[f"{source}/texts"] == len(of_source)
        assert numbers[f"{source}/kept"] == kept.sum()
        assert numbers[f"{source}/dropped/below_the_threshold"] == (~kept).sum()
        assert numbers[f"{source}/noise_ratio"] == pytest.approx(100 * (~kept).mean())
        hit, false, missed = (~true & ~kept).sum(), (true & ~kept).sum(), (~true & kept).sum()
        assert numbers[f"{source}/truth/precision"] == pytest.approx(100 * hit / (hit + false))
        assert numbers[f"{source}/truth/recall"] == pytest.approx(100 * hit / (hit + missed))
        assert numbers[f"{source}/truth/f1"] == pytest.approx(200 * hit / (2 * hit + false + missed))
        itm = np.array([row["itm"] for row in of_source], np.float32)
        area = (itm[true][:, None] > itm[~true][None, :]).mean()
        low, value, high = (numbers[f"{source}/truth/auc{end}"] for end in ("_low", "", "_high"))
        assert value == pytest.approx(100 * area)
        assert low < value < high
    assert numbers["all/texts"] == len(rows) == 240
    assert numbers["pictures"] == 120
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(numbers))


def test_recall_is_told_for_each_kind_that_the_web_records(passed: tuple, world: Path, tmp_path: Path) -> None:
    numbers = write_report(tmp_path / "report.html", View(passed[0]))
    kinds = [record["kind"] for shard in sorted(world.glob("*.tar")) for _, record in told(shard)]
    for kind in {*kinds} - {"true"}:
        assert numbers[f"web/truth/texts/{kind}"] == kinds.count(kind)
        low, value, high = (numbers[f"web/truth/recall/{kind}{end}"] for end in ("_low", "", "_high"))
        assert 0 <= low <= value <= high <= 100
    attribute = [name for name in numbers if name.startswith("web/truth/texts/attribute/")]
    assert sum(numbers[name] for name in attribute) == kinds.count("attribute")


def test_attribute_f1_rises_where_the_filter_is_right(passed: tuple, tmp_path: Path) -> None:
    numbers = write_report(tmp_path / "report.html", View(passed[0]))
    assert 80 < numbers["synthetic/truth/attributes_before"] < numbers["synthetic/truth/attributes_after"] <= 100


def test_the_page_needs_nothing_else_and_runs_nothing(passed: tuple, tmp_path: Path) -> None:
    write_report(
        tmp_path / "report.html", View(passed[0]), costs=[{"stage": "generate", "seconds": 90, "pictures": 120}]
    )
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Tags(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "form", "base"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "default-src 'none'" in text
    named = [each for _, attributes in page.tags for name in ("src", "href") if (each := attributes.get(name))]
    assert all(each.startswith(("data:image/jpeg;base64,", "#")) for each in named)
    assert "url(" not in text
    assert text.count("data:image/jpeg;base64,") >= 24
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.json"}
    assert len(text) < 2_000_000


def test_texts_of_strangers_stand_as_text_and_are_cut(world: Path, tmp_path: Path) -> None:
    scored(tmp_path / "records", world, hostile=HOSTILE + "x" * 5000)
    write_report(tmp_path / "report.html", View(tmp_path / "records"))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Tags(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [tag for tag, attributes in page.tags if "onerror" in attributes]
    assert any("<script>alert(1)</script>" in said for said in page.said)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", text)
    assert "x" * 300 not in text
    assert "000000007&lt;b&gt;" in text


def test_the_same_seed_gives_the_same_page_and_another_one_other_pictures(passed: tuple, tmp_path: Path) -> None:
    pages = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_report(tmp_path / f"{name}.html", View(passed[0]), seed=seed)
        pages.append((tmp_path / f"{name}.html").read_text(encoding="utf-8"))
    assert pages[0] == pages[1] != pages[2]


@pytest.mark.parametrize("gone", ["shards", "description", "order"])
def test_without_the_shards_the_report_has_no_pictures_and_says_so(world: Path, tmp_path: Path, gone: str) -> None:
    folder = tmp_path / "records"
    rows = scored(folder, world)
    described_by = json.loads((folder / "description.json").read_text())
    if gone == "shards":
        (folder / "description.json").write_text(json.dumps(described_by | {"shards": [str(tmp_path / "gone-0.tar")]}))
    elif gone == "order":
        (folder / "description.json").write_text(json.dumps(described_by | {"shards": described_by["shards"][::-1]}))
    else:
        (folder / "description.json").unlink()
    numbers = write_report(tmp_path / "report.html", View(folder))
    assert numbers["all/texts"] == len(rows)
    assert "web/truth/recall" not in numbers
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "data:image" not in text
    assert "the shards cannot be read" in text


def test_texts_of_a_shard_that_is_lost_meanwhile_are_counted(world: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(world, shards)
    rows = scored(tmp_path / "records", shards)
    index = open_index(str(shards / "*.tar"))
    lost = index.name(1)
    Path(index.location(1)).unlink()
    found = tally(View(tmp_path / "records"), index, seed=0)
    (reason,) = found.broken.keys() - {"cut short"}
    assert "truth is not known" in reason
    assert found.broken[reason] == sum(row["shard"] == lost for row in rows)
    assert found.broken_names[reason] == [lost]
    judged = sum(len(label.kinds) for label in found.labels.values())
    assert judged == len(rows) - found.broken[reason]


def test_a_pass_that_is_not_finished_is_reported_as_such(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    scored(folder, world)
    write_report(tmp_path / "report.html", View(folder))
    assert "not finished" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    (folder / "manifest.json").unlink()
    records.files(folder)[0].unlink()
    assert write_report(tmp_path / "report.html", View(folder))["pictures"] == 80
    assert "2 of 3 shards have records" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_share_and_several_scores_are_told_as_they_decide(passed: tuple, tmp_path: Path) -> None:
    folder, rows = passed
    numbers = write_report(tmp_path / "share.html", View(folder, share=0.25))
    assert numbers["all/kept"] == round(0.25 * len(rows))
    numbers = write_report(
        tmp_path / "both.html", View(folder, scores=("itm", "itc"), combine="unanimous", threshold=0.3)
    )
    assert numbers["all/kept"] == sum(row["itc"] >= 0.3 for row in rows)
    several = write_report(tmp_path / "folders.html", View([folder, folder]))
    assert several["all/kept"] == sum(row["itm"] >= 0.5 for row in rows)
    web = write_report(tmp_path / "web.html", View(folder, sources=("web",)))
    assert web["synthetic/kept"] == 0
    assert web["synthetic/dropped/source_not_taken"] == 120
    assert web["synthetic/noise_ratio"] is None
    assert web["all/noise_ratio"] == web["web/noise_ratio"]
    assert web == replace_view(
        write_report(tmp_path / "control.html", replace(View(folder, sources=("web",)), control=True))
    )


def test_filters_of_several_folders_are_told_together(passed: tuple, tmp_path: Path) -> None:
    folder, rows = passed
    for path in records.files(folder):  # another filter, of another column, that is as good
        table = (
            records.read([path]).drop_columns(["itm", "itc"]).append_column("cosine_clip", records.read([path])["itm"])
        )
        other = tmp_path / path.relative_to(folder)
        other.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, other)
    view = View([folder, tmp_path], scores=["itm", "cosine_clip"])
    numbers = write_report(tmp_path / "two.html", view)
    assert numbers["all/kept"] == sum(row["itm"] >= 0.5 for row in rows)
    assert "mean of ITM and cosine clip" in (tmp_path / "two.html").read_text()
    alone = write_report(tmp_path / "alone.html", replace(view, scores=["cosine_clip"]))
    assert alone["all/kept"] == numbers["all/kept"]
    with pytest.raises(ValueError, match=r"no score \['nothing'\]"):
        write_report(tmp_path / "none.html", View(folder, scores=["itm", "nothing"]))


def test_every_text_is_counted_by_who_wrote_it_and_why_it_is_dropped(tmp_path: Path) -> None:
    said = [
        ("web", None, "a dog", 0.9),
        ("web", None, " .!", 0.9),
        ("human", None, "a cat", 0.1),
        ("synthetic", "beam", "a dog", 0.5),
        ("synthetic", "beam", "a cow", 0.4),
        ("synthetic", "nucleus", "a dog runs", float("nan")),
    ]
    rows: dict[str, list] = {column: [None] * len(said) for column in records.schema(("itm",)).names}
    rows |= {"record": [0] * len(said), "key": ["k"] * len(said)}
    rows |= dict(zip(("source", "captioner", "text", "itm"), map(list, zip(*said, strict=True)), strict=True))
    about = {"pictures": 1, "seconds": 0.0, "broken": [["one", "empty"], ["two", "empty"]]}
    path = record_file(tmp_path / "records", "a/0.tar")
    records.write(path, rows, ("itm",), about, path.with_suffix(".partial"))
    numbers = write_report(tmp_path / "report.html", View(tmp_path / "records"))
    assert (numbers["web/kept"], numbers["web/dropped/empty"], numbers["web/noise_ratio"]) == (1, 1, 50.0)
    assert (numbers["human/dropped/source_not_taken"], numbers["human/noise_ratio"]) == (1, None)
    assert (numbers["synthetic_beam/kept"], numbers["synthetic_beam/dropped/below_the_threshold"]) == (1, 1)
    assert numbers["synthetic_nucleus/dropped/not_scored"] == 1
    assert (numbers["synthetic/texts"], numbers["synthetic/kept"], numbers["all/texts"]) == (3, 1, 6)
    assert numbers["all/noise_ratio"] == pytest.approx(60.0)  # of the five that the view asks about
    assert numbers["broken/empty"] == 2
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "T<sub>s</sub> beam" in text
    assert "a/0.tar: two" in text


def replace_view(numbers: dict[str, Any]) -> dict[str, Any]:
    return numbers | {"view": numbers["view"] | {"control": False}}


def test_the_command_takes_the_rule_and_tells_where_the_page_is(
    passed: tuple, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, rows = passed
    out = tmp_path / "a" / "page.html"
    rule = [
        "--score",
        "itc",
        "--threshold",
        "0.3",
        "--sources",
        "web",
        "--shards",
        str(world / "*.tar"),
        "--title",
        "<b>Mine",
    ]
    assert main(["report", str(folder), *rule, "--out", str(out)]) == 0
    kept = sum(row["source"] == "web" and row["itc"] >= 0.3 for row in rows)
    assert capsys.readouterr().out == f"{out}: {kept} of 240 texts of 120 pictures are kept\n"
    text = out.read_text(encoding="utf-8")
    assert "&lt;b&gt;Mine" in text
    assert "A text of web is kept if ITC is at least 0.3." in text
    assert main(["report", str(tmp_path), "--out", str(out)]) == 1
    assert "no records there" in capsys.readouterr().err


def other_thresholds(page: Path) -> tuple[list[str], list[list[str]]]:
    """(heading, rows) of the table of other thresholds, as text."""
    table = page.read_text(encoding="utf-8").partition("With another threshold")[2].partition("</table>")[0]
    head, *rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in table.split("<tr")[1:]]
    return head, rows


def test_other_thresholds_are_spread_over_the_texts_beside_the_one_in_use(passed: tuple, tmp_path: Path) -> None:
    folder, rows = passed
    write_report(tmp_path / "page.html", View(folder, scores=("itm", "itc"), threshold=0.44))
    head, found = other_thresholds(tmp_path / "page.html")
    assert head == ["Threshold", "Web kept", "Synthetic kept", "Texts kept", "Noise precision", "Noise recall"]
    score = np.array([[row["itm"], row["itc"]] for row in rows], np.float32).mean(1)
    source, noise = np.array([row["source"] for row in rows]), ~np.array([row["true"] for row in rows])
    in_use = [row[0] for row in found if "in use" in row[0]]
    assert in_use == ["0.44, in use"]
    thresholds = [float(row[0].removesuffix(", in use")) for row in found]
    assert thresholds == sorted(set(thresholds))
    shares = []
    for threshold, row in zip(thresholds, found, strict=True):
        kept = score >= np.float32(threshold)
        assert row[1:4] == [
            *(f"{100 * kept[source == each].mean():.1f} %" for each in ("web", "synthetic")),
            str(kept.sum()),
        ]
        dropped = ~kept
        precision, recall = (dropped & noise).sum() / dropped.sum(), (dropped & noise).sum() / noise.sum()
        assert row[4:] == [f"{100 * precision:.1f} %", f"{100 * recall:.1f} %"]
        shares.append(kept.mean())
    wanted = [0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05]
    assert [min(abs(np.array(shares) - each)) < 0.01 for each in wanted] == [True] * len(wanted)
    assert len(set(shares)) == len(found) <= len(wanted) + 1


def alone(folder: Path, itm: np.ndarray, source: str = "web") -> Path:
    """A pass over one shard of pictures with a text each, of these scores."""
    rows: dict[str, list] = {column: [None] * len(itm) for column in records.schema(("itm",)).names}
    rows |= {"record": list(range(len(itm))), "key": ["k"] * len(itm), "source": [source] * len(itm)}
    rows |= {"text": ["a dog"] * len(itm), "itm": itm.tolist()}
    path = record_file(folder, "a.tar")
    about = {"pictures": len(itm), "seconds": 0.0, "broken": []}
    records.write(path, rows, ("itm",), about, path.with_suffix(".partial"))
    return folder


def test_scores_that_crowd_near_one_are_told_apart(tmp_path: Path) -> None:
    itm = 1 / (1 + np.exp(-np.random.default_rng(0).normal(7, 1, 4000)))
    folder = alone(tmp_path / "crowded", itm.astype(np.float32))
    write_report(tmp_path / "page.html", View(folder))
    head, rows = other_thresholds(tmp_path / "page.html")
    assert head == ["Threshold", "Web kept", "Synthetic kept", "Texts kept"]
    assert rows[0] == ["0.5, in use", "100.0 %", "n/a", "4,000"]
    assert len(rows) == 12
    for row, wanted in zip(rows[1:], (95, 90, 80, 70, 60, 50, 40, 30, 20, 10, 5), strict=True):
        kept = (itm.astype(np.float32) >= np.float32(row[0])).sum()
        assert int(row[3].replace(",", "")) == kept == pytest.approx(40 * wanted, abs=20)
        assert row[2] == "n/a"
        assert len(row[0]) < 10, "no more digits than are needed"


def test_thresholds_beyond_every_score_and_texts_of_one_score_have_no_equal_rows(tmp_path: Path) -> None:
    folder = alone(tmp_path / "equal", np.full(50, 0.25, np.float32))
    write_report(tmp_path / "page.html", View(folder, threshold=1.5))
    rows = other_thresholds(tmp_path / "page.html")[1]
    assert [row[1:] for row in rows] == [["100.0 %", "n/a", "50"], ["0.0 %", "n/a", "0"]]
    assert float(rows[0][0]) <= 0.25
    assert rows[1][0] == "1.5, in use"


def test_several_scores_are_named_in_one_go_or_one_by_one(passed: tuple, tmp_path: Path) -> None:
    rule = ["--combine", "unanimous", "--threshold", "0.3", "--out", str(tmp_path / "page.html")]
    kept = []
    for scores in (["--score", "itm", "itc"], ["--score", "itm", "--score", "itc"], ["--score", "itm"]):
        assert main(["report", str(passed[0]), *scores, *rule]) == 0
        kept.append(json.loads((tmp_path / "page.json").read_text())["all/kept"])
    assert kept[0] == kept[1] == sum(row["itc"] >= 0.3 for row in passed[1]) < kept[2]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (["--sources", "human"], "no texts of human there; the records hold 120 web and 120 synthetic"),
        (["--sources", "web", "human"], "no texts of human there; the records hold 120 web and 120 synthetic"),
        (["--threshold", "1.5"], "a threshold of 1.5 keeps no text: the highest itm is {itm_highest}"),
        (["--threshold", "-1"], "a threshold of -1 drops no text: the lowest itm is {itm_lowest}"),
        (
            ["--score", "itm", "itc", "--threshold", "1.5"],
            "a threshold of 1.5 keeps no text: the highest mean of itm and itc is {mean_highest}",
        ),
        (["--share", "0.001"], "a share of 0.001 keeps no text: there are 240"),
        (["--threshold", "0.5"], ""),
        ([], ""),
        (["--share", "1"], ""),
    ],
)
def test_a_rule_that_finds_drops_or_keeps_nothing_warns_in_one_line(
    passed: tuple, tmp_path: Path, capsys: pytest.CaptureFixture, rule: list[str], said: str
) -> None:
    folder, rows = passed
    both = np.array([[row["itm"], row["itc"]] for row in rows], np.float32)
    ends = {"itm_highest": both[:, 0].max(), "itm_lowest": both[:, 0].min(), "mean_highest": both.mean(1).max()}
    assert main(["report", str(folder), *rule, "--out", str(tmp_path / "page.html")]) == 0
    expected = said.format(**ends)
    assert capsys.readouterr().err == (f"blip: warning: {folder}: {expected}\n" if said else "")


def test_errors_name_what_is_wrong(passed: tuple, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no records there"):
        write_report(tmp_path / "report.html", View(tmp_path))
    with pytest.raises(ValueError, match=r"an \.html file"):
        write_report(tmp_path / "report.json", View(passed[0]))
    with pytest.raises(ValueError, match="no score"):
        write_report(tmp_path / "report.html", View(passed[0], scores=("itm_large",)))
    assert not list(tmp_path.iterdir())

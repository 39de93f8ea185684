"""Thresholds from labelled texts are those of the definitions, and labels meet the texts that they name."""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from blip.capfilt.calibrate import Cases, calibrate, curve, draw, known, labelled, read_labels, sample, write_sample
from blip.cli import main
from blip.datamodules.index import Index, open_index
from blip.datamodules.shapes import write_world
from blip.datamodules.views import View, decide, read_records
from blip.metrics.rates import auc
from tests.datamodules.making import write_shards
from tests.datamodules.scoring import write_pass


def cases(count: int, seed: int = 0, steps: int = 40) -> Cases:
    """Texts of `count` pictures, some of equal scores; what fits scores higher."""
    rng = np.random.default_rng(seed)
    fits = rng.random(count) < 0.5
    score = np.round((rng.normal(0, 1, count) + 1.5 * fits) * steps / 6) / steps
    return Cases(score.astype(np.float32), fits, np.arange(count))


def rates(of: Cases, threshold: float) -> tuple[float, float, float]:
    """(precision, recall, F1) counted one by one."""
    kept = [(bool(fits), bool(score >= np.float32(threshold))) for score, fits in zip(of.score, of.fits, strict=True)]
    right, all_kept, all_fit = kept.count((True, True)), sum(k for _, k in kept), sum(f for f, _ in kept)
    return right / all_kept, right / all_fit, 2 * right / (all_kept + all_fit)


def test_the_curve_has_precision_and_recall_of_every_score_that_occurs():
    of = cases(300)
    found = curve(of)
    assert found.threshold.tolist() == sorted(set(of.score.tolist()), reverse=True)
    for threshold, kept, right in zip(*found, strict=True):
        precision, recall, _ = rates(of, threshold)
        assert (right / kept, right / of.fits.sum()) == pytest.approx((precision, recall))


def test_thresholds_are_the_best_that_the_labels_allow():
    of = cases(400)
    found = calibrate(of, precision=[0.9, 0.75], recall=[0.8], thresholds=[0.1])
    every = {float(t): rates(of, float(t)) for t in set(of.score.tolist())}
    assert found["best_f1"]["f1"]["value"] == pytest.approx(max(f1 for _, _, f1 in every.values()), abs=1e-6)
    for wanted in (0.9, 0.75):
        point = found[f"precision_{wanted}"]
        assert point["precision"]["value"] >= wanted
        assert point["recall"]["value"] == pytest.approx(max(r for p, r, _ in every.values() if p >= wanted), abs=1e-6)
    assert found["recall_0.8"]["recall"]["value"] >= 0.8
    best = max(p for p, r, _ in every.values() if r >= 0.8)
    assert found["recall_0.8"]["precision"]["value"] == pytest.approx(best, abs=1e-6)
    given, (precision, recall, _) = found["threshold_0.1"], rates(of, 0.1)
    assert (given["threshold"], given["precision"]["value"], given["recall"]["value"]) == pytest.approx(
        (0.1, precision, recall), abs=1e-6
    )
    kept = of.score >= np.float32(0.1)
    assert given["noise_recall"]["value"] == pytest.approx((~kept & ~of.fits).sum() / (~of.fits).sum(), abs=1e-6)
    assert given["noise_precision"]["value"] == pytest.approx((~kept & ~of.fits).sum() / (~kept).sum(), abs=1e-6)
    assert found["auc"]["value"] == pytest.approx(auc(of.score, of.fits).value, abs=1e-6)
    assert json.loads(json.dumps(found)) == found


def test_a_precision_that_no_threshold_has_is_none_and_alike_labels_tell_nothing():
    of = Cases(np.array([0.9, 0.5, 0.1], np.float32), np.array([False, True, True]), np.arange(3))
    assert calibrate(of, precision=[0.99])["precision_0.99"] is None
    with pytest.raises(ValueError, match="all 3 labelled texts are alike"):
        calibrate(of._replace(fits=np.ones(3, bool)))
    with pytest.raises(ValueError, match="fractions above 0"):
        calibrate(of, recall=[95])


def test_the_interval_counts_pictures_not_texts():
    one = cases(60)
    four = Cases(*(np.repeat(each, 4) for each in one[:3]))
    first, repeated = calibrate(one)["auc"], calibrate(four)["auc"]
    assert repeated == pytest.approx(first, abs=1e-5)
    assert calibrate(four)["pictures"] == 60


@pytest.fixture
def index(tmp_path) -> Index:
    return open_index(write_shards(tmp_path / "data", [6, 4], texts=2))


@pytest.fixture
def records(index, tmp_path) -> Path:
    return write_pass(tmp_path / "pass", index, lambda n, source, number: {"itm": n / 16 + 0.25 * (source == "web")})


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_labels_meet_the_texts_that_they_name(records, tmp_path, kind):
    rows = [
        {"shard": "00000.tar", "key": "00002", "captioner": "", "number": 1, "label": "yes", "text": "x"},
        {"shard": "00000.tar", "key": "00002", "captioner": "tiny", "number": 0, "label": 0, "text": "y"},
        {"shard": "00001.tar", "key": "00008", "captioner": None, "number": 0, "label": True, "text": "z"},
        {"shard": "00001.tar", "key": "00099", "captioner": None, "number": 0, "label": False, "text": "z"},
    ]
    path = tmp_path / f"labels.{kind}"
    if kind == "csv":
        lines = [",".join(rows[0]), *(",".join("" if v is None else str(v) for v in row.values()) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    found = labelled(View(records), read_labels(path))
    assert found.score.tolist() == [2 / 16 + 0.25, 2 / 16, 8 / 16 + 0.25]
    assert found.fits.tolist() == [True, False, True]
    assert len(set(found.picture.tolist())) == 2
    assert found.unmatched == 1
    assert labelled(View(records, sources="web"), read_labels(path)).fits.tolist() == [True, True]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"shard": "a", "key": "b"}', "row 2: no label; needed are the columns shard, key, label"),
        (
            '{"key": "b", "label": 1}',
            "row 2: no shard; needed are the columns shard, key, label, and number and captioner",
        ),
        ('{"shard": "a", "key": "b", "label": "perhaps"}', "row 2: label 'perhaps' is none of"),
        ('{"shard": "00000.tar", "key": "00000", "label": 1}', "row 2: the text .* is labelled otherwise before"),
        ('{"shard": "a"', "row 2: "),
        ("[1]", "row 2: "),
    ],
)
def test_labels_that_cannot_be_read_are_named_by_row(tmp_path, line, said):
    (tmp_path / "labels.jsonl").write_text('{"shard": "00000.tar", "key": "00000", "label": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=said):
        read_labels(tmp_path / "labels.jsonl")


def test_a_table_of_labels_that_is_none_is_named_by_row(tmp_path):
    (tmp_path / "labels.csv").write_text(f"shard,key,label\n0.tar,{'0' * 200_000},1\n")
    with pytest.raises(ValueError, match=r"labels\.csv: row 1: field larger than"):
        read_labels(tmp_path / "labels.csv")


def test_texts_that_are_not_judged_yet_are_passed_over_and_counted(records, tmp_path):
    path = tmp_path / "labels.csv"
    head, blank = "shard,key,number,label", ["00000.tar,00001,0,", "00000.tar,00002,0,  ", "00001.tar,00007,1,"]
    path.write_text(
        "\n".join([head, "00000.tar,00000,0,1", *blank, "00001.tar,00008,0,0", "00000.tar,00000,0,"]) + "\n"
    )
    found = labelled(View(records), read_labels(path))
    assert (found.fits.tolist(), found.unmatched, found.unlabelled) == ([True, False], 0, 3)
    assert calibrate(found)["unlabelled"] == 3
    path.write_text("\n".join([head, *blank]) + "\n")
    with pytest.raises(ValueError, match="no labels there: 3 texts, whose label is empty"):
        read_labels(path)
    path.write_text(head + "\n")
    with pytest.raises(ValueError, match="no labels there"):
        read_labels(path)


@pytest.fixture
def crowded(tmp_path) -> Path:
    """A pass over 60 pictures, of whose 180 texts most score near 1; what the captioner wrote is hostile."""
    index = open_index(write_shards(tmp_path / "many", [25, 20, 15], texts=2))

    def score(n: int, source: str, number: int) -> dict[str, float]:
        return {"itm": float("nan") if n == 7 else 1 - (n / 60) ** 4 / 2 - 0.001 * number - 0.0005 * (source == "web")}

    def written(n: int) -> list[str]:
        return [" .!"] if n == 8 else [f'=1+1, "{n}"\r\n\x00;\u202e' + "x" * 200_000 * (n == 9)]

    return write_pass(tmp_path / "crowded", index, score, written=written)


def test_texts_to_label_are_drawn_evenly_over_the_ranks_of_the_score(crowded):
    view = View(crowded)
    every = sample(view, 1000)
    assert len(every) == 180 - 4, "neither texts without a score nor such as say nothing"
    ranked = sorted(row["score"] for row in every)
    drawn = [sample(view, 16, seed) for seed in range(3)]
    for rows in drawn:
        ranks = sorted(np.searchsorted(ranked, row["score"]) for row in rows)
        assert [int(rank) // 11 for rank in ranks] == list(range(16)), "one of each sixteenth"
        assert ranks != [np.searchsorted(ranked, row["score"]) for row in rows], "shuffled"
        assert len({(row["shard"], row["key"], row["captioner"], row["number"]) for row in rows}) == 16
    assert drawn[0] != drawn[1]
    assert drawn[0] == sample(view, 16, 0)
    assert {row["source"] for row in sample(View(crowded, sources="web"), 16)} == {"web"}
    for count in (0, -1):
        with pytest.raises(ValueError, match="at least one"):
            sample(view, count)
    with pytest.raises(ValueError, match="no text of human with a score"):
        sample(View(crowded, sources="human"), 16)


def test_texts_to_label_are_read_back_as_they_were_written_once_they_are_labelled(crowded, tmp_path):
    out = tmp_path / "deep" / "labels.csv"
    assert write_sample(View(crowded), 1000, out) == 176
    assert [path.name for path in out.parent.iterdir()] == ["labels.csv"]
    with pytest.raises(ValueError, match="no labels there: 176 texts"):
        read_labels(out)
    with open(out, newline="", encoding="utf-8") as file:
        told = list(csv.DictReader(file))
    assert list(told[0]) == ["shard", "key", "captioner", "number", "source", "score", "text", "label"]
    assert len(told) == 176
    for row in told:
        n = int(row["key"])
        if row["source"] == "synthetic":
            assert row["text"].startswith(f'\'=1+1, "{n}"'), "a sheet shows it and computes nothing"
            assert len(row["text"]) < 2000
            row["label"] = "1" if n % 2 else "0"
    with open(out, "w", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, list(told[0])).writeheader()
        csv.DictWriter(file, list(told[0])).writerows(told)
    found = labelled(View(crowded), read_labels(out))
    assert (len(found.fits), found.unmatched, found.unlabelled) == (58, 0, 118)
    with pytest.raises(ValueError, match="is there already"):
        write_sample(View(crowded), 1000, out)


def test_the_command_draws_texts_to_label_and_finds_the_threshold_once_they_are(crowded, tmp_path, capsys):
    out = tmp_path / "labels.csv"
    command = ["calibrate", str(crowded), "--score", "itm", "--sample", "40", "--out", str(out), "--seed", "3"]
    assert main(command) == 0
    assert str(out) in capsys.readouterr().out
    lines = list(csv.DictReader(out.open(newline="", encoding="utf-8")))
    assert [row["key"] for row in lines] == [row["key"] for row in sample(View(crowded), 40, 3)]
    assert main(command) == 1
    assert "is there already" in capsys.readouterr().err
    for row in lines[:30]:
        row["label"] = "yes" if float(row["score"]) > 0.97 else "no"
    with out.open("w", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, list(lines[0])).writeheader()
        csv.DictWriter(file, list(lines[0])).writerows(lines)
    assert main(["calibrate", str(crowded), "--labels", str(out), "--out", str(tmp_path / "curve.png")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["texts"], told["unlabelled"], told["best_f1"]["f1"]["value"]) == (30, 10, 1.0)
    assert main(["calibrate", str(crowded), "--sample", "5", "--out", str(tmp_path / "labels.txt")]) == 1
    assert "a .csv file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["calibrate", str(crowded), "--sample", "5", "--labels", str(out)])


def test_labels_of_other_texts_are_refused(records):
    with pytest.raises(ValueError, match=r"no records of the shard 'other\.tar'"):
        labelled(View(records), {"other.tar": {("a", "", 0): True}})
    with pytest.raises(ValueError, match="no label names a text"):
        labelled(View(records), {"00000.tar": {("a", "", 0): True}})
    with pytest.raises(ValueError, match="no score"):
        labelled(View(records, scores="itc"), {"00000.tar": {("00000", "", 0): True}})


def test_a_view_at_a_threshold_keeps_what_its_point_says(records):
    view = View(records, sources="web")
    labels = {(f"{n:05d}", "", number): n > 2 for n in range(6) for number in range(2)}
    found = labelled(view, {"00000.tar": labels})
    for point in (calibrate(found)["best_f1"], calibrate(found, recall=[0.5])["recall_0.5"]):
        mask = decide(read_records(view, "00000.tar"), View(records, sources="web", threshold=point["threshold"]))
        assert mask.sum() == round(point["kept"] * 12)


def test_the_embedded_worlds_own_truth_needs_no_labels(index, records, tmp_path):
    with pytest.raises(ValueError, match="none of the embedded world"):
        known(View(records), index)
    sizes = {"train": 3, "web": 40, "val": 3, "test": 3, "reserved": 3}
    world = write_world(tmp_path / "world", seed=5, sizes=sizes, processes=1) / "web"
    web = open_index(str(world / "*.tar"))
    truth = []
    for shard in sorted(world.glob("*.tar")):
        with tarfile.open(shard) as tar:
            told = [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]  # type: ignore[arg-type]
        truth += [record["truth"] for record in told]
    scored = write_pass(tmp_path / "scored", web, lambda n, source, _: {"itm": 0.8 if truth[n] else 0.2})
    found = calibrate(known(View(scored, sources="web"), web))
    assert (found["texts"], found["fitting"]) == (40, sum(truth))
    assert (found["auc"]["value"], found["best_f1"]["threshold"]) == (1.0, 0.8)
    assert found["auc"]["low"] < 0.9, "40 texts are no certainty"
    assert not known(View(scored, sources="synthetic"), web).fits.any(), "what is written there tells of no thing"


def test_precision_and_recall_are_drawn(tmp_path):
    of = cases(500)
    found = calibrate(of, precision=[0.9])
    draw(of, tmp_path / "deep" / "curve.png", "itm", found)
    image = cv2.imread(str(tmp_path / "deep" / "curve.png"))
    assert image is not None
    assert min(image.shape[:2]) > 400
    for colour in ((0x1B, 0x6C, 0xA8), (0xC8, 0x55, 0x3D)):  # of precision and of recall
        assert (np.abs(image[:, :, ::-1].astype(int) - colour).sum(-1) < 12).sum() > 200
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["curve.png"]

"""The commands over CapFilt's records as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blip.cli import main
from blip.datamodules.index import Index, open_index
from tests.datamodules.making import write_shards
from tests.datamodules.scoring import write_pass


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    return (status, *capsys.readouterr())


@pytest.fixture
def index(tmp_path) -> Index:
    return open_index(write_shards(tmp_path / "data", [6, 4], texts=2))


@pytest.fixture
def records(index, tmp_path) -> Path:
    """Web texts score 0.9 beside the first six pictures, what is written 0.6 throughout; `itc` is 0.35 of the first texts."""

    def score(picture: int, source: str, number: int) -> dict[str, float]:
        itm = 0.6 if source == "synthetic" else 0.9 if picture < 6 else 0.1
        return {"itm": itm, "itc": 0.35 if number == 0 else 0.25}

    return write_pass(tmp_path / "pass", index, score, ("itm", "itc"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "10 pictures, texts: 10 synthetic, 12 web; shards: 2 written, 0 were there, 0 keep no text"),
        (["--threshold", 0.7], "6 pictures, texts: 12 web; shards: 1 written, 0 were there, 1 keep no text"),
        (["--share", 0.2], "6 web; shards: 1 written"),
        (["--score", "itc", "--threshold", 0.3], "10 pictures, texts: 10 synthetic, 10 web; shards: 2 written"),
        (
            ["--score", "itm", "--score", "itc", "--combine", "unanimous", "--threshold", 0.3],
            "texts: 10 synthetic, 6 web",
        ),
        (["--sources", "synthetic"], "10 pictures, texts: 10 synthetic; shards: 2 written"),
        (["--control"], "10 pictures, texts: 22 web; shards: 2 written"),
    ],
)
def test_materialize_says_what_a_view_keeps(capsys, records, tmp_path, options, said):
    shards = tmp_path / "data" / "*.tar"
    status, out, err = run(
        capsys, "data", "materialize", shards, "--records", records, *options, "--out", tmp_path / "out"
    )
    assert (status, err) == (0, "")
    assert said in out
    again = run(capsys, "data", "materialize", shards, "--records", records, *options, "--out", tmp_path / "out")[1]
    assert "0 pictures, texts: none; shards: 0 written" in again


def test_a_mistake_of_materialize_is_one_line(capsys, records, tmp_path):
    shards = tmp_path / "data" / "*.tar"
    for options, said in (
        (["--records", records, "--threshold", 0.5, "--share", 0.5], "one of them, not both"),
        (["--records", tmp_path], "no records there"),
        (["--records", records, "--score", "cosine"], "no score ['cosine']"),
    ):
        status, out, err = run(capsys, "data", "materialize", shards, *options, "--out", tmp_path / "out")
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert said in err


def test_calibrate_prints_thresholds_and_draws_them(capsys, records, tmp_path):
    """Beside the first six pictures the web's texts fit, beside the others none does; what is written fits beside even ones."""
    rows = [
        {"shard": f"{n // 6:05d}.tar", "key": f"{n:05d}", "number": 0, "captioner": by, "label": int(fits)}
        for n in range(10)
        for by, fits in (("", n < 6), ("tiny", n % 2 == 0))
    ]
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        "--labels",
        labels,
        "--precision",
        1.0,
        "--recall",
        0.9,
        "--threshold",
        0.5,
        "--out",
        tmp_path / "curve.png",
    ]
    status, out, err = run(capsys, "calibrate", records, *options)
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert (found["texts"], found["fitting"], found["pictures"], found["score"]) == (20, 11, 10, "itm")
    assert found["precision_1"]["threshold"] == 0.9
    assert found["best_f1"]["threshold"] == found["recall_0.9"]["threshold"] == 0.6
    assert found["best_f1"]["recall"]["value"] == 1.0
    assert found["threshold_0.5"]["precision"]["value"] == pytest.approx(11 / 16)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_mistake_of_calibrate_is_one_line(capsys, records, tmp_path):
    (tmp_path / "labels.csv").write_text("shard,key,label\n00000.tar,nobody,1\n")
    for options, said in (
        (["--labels", tmp_path / "none.csv"], "No such file"),
        (["--labels", tmp_path / "labels.csv"], "no label names a text"),
        (["--truth"], "none of the embedded world"),
    ):
        status, out, err = run(capsys, "calibrate", records, *options, "--out", tmp_path / "curve.png")
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert said in err
    assert not (tmp_path / "curve.png").exists()

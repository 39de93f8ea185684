"""The `blip` command as it is typed: what it prints, its exit status, and that a mistake is one line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from blip.cli import main
from blip.datamodules.records import KINDS
from blip.text import Tokenizer
from tests.datamodules.making import write_records


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of six pictures with two captions each, one of the pictures broken."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for n in range(6):
        pixels = np.random.default_rng(n).integers(0, 256, (10 + n, 20, 3), dtype=np.uint8)
        out = io.BytesIO()
        PIL.Image.fromarray(pixels).save(out, "JPEG")
        (folder / f"{n}.jpg").write_bytes(out.getvalue()[: 100 if n == 3 else None])
        lines.append(json.dumps({"image": f"{n}.jpg", "captions": ["a red dog", f"picture {n} of many"]}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    return folder


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    return (status, *capsys.readouterr())


def test_build_then_check_tells_what_is_there_and_what_is_not(pictures: Path, capsys: pytest.CaptureFixture):
    out = pictures.parent / "shards"
    status, said, _ = run(capsys, "data", "build", pictures, pictures.parent / "captions.jsonl", out, "--shard-size", 2)
    assert status == 0
    assert "5 pictures" in said
    assert "10 captions, 3 shards" in said
    assert "1 picture cut short: 3.jpg" in said
    status, said, _ = run(capsys, "data", "check", out / "*.tar", "--ranks", 2, "--batch-size", 2)
    assert status == 0
    assert "3 shards" in said
    assert "5 pictures, 10 captions" in said
    assert "height: 10 to 15 px, median 12" in said
    assert "caption: 3 to 4 words" in said
    assert "2 ranks x 2 pairs a step: 2 steps an epoch on every rank, 2 pairs left out" in said


def test_check_says_no_by_its_status(pictures: Path, capsys: pytest.CaptureFixture):
    out = pictures.parent / "shards"
    run(capsys, "data", "build", pictures, pictures.parent / "captions.jsonl", out)
    status, said, _ = run(capsys, "data", "check", out / "*.tar", "--ranks", 4, "--batch-size", 3)
    assert status == 1
    assert "NOT ENOUGH" in said
    status, said, _ = run(capsys, "data", "check", out / "*.tar", "--batch-size", 5, "--workers", 3)
    assert status == 0
    assert "only 2 of the 3" in said
    assert "readers that deal whole shards" in said
    assert run(capsys, "data", "check", out / "*.tar", "--batch-size", 6, "--captions", "one")[0] == 1


@pytest.mark.parametrize(
    ("records", "held", "row"),
    [
        ("questions", "3 pictures, 6 questions", "question"),
        ("statements", "3 picture pairs, 6 statements", "statement"),
        ("rounds", "3 pictures, 6 rounds", "round"),
    ],
)
def test_index_and_check_say_what_a_row_is(tmp_path: Path, capsys: pytest.CaptureFixture, records, held, row):
    (shard,) = write_records(tmp_path / "data", [3], records)
    status, said, _ = run(capsys, "data", "index", shard, "--records", records)
    assert status == 0
    assert f"MB of {records}: {held}\n" in said
    assert f"{row}: 4 to 4 words" in said
    status, said, _ = run(capsys, "data", "check", shard, "--records", records, "--batch-size", 4)
    assert status == 0
    assert f"1 rank x 4 {records} a step: 1 step an epoch on every rank, 2 {records} left out" in said
    assert run(capsys, "data", "check", shard, "--records", records, "--captions", "one")[0] == 1
    status, _, complaint = run(capsys, "data", "check", shard, "--records", "captions")
    assert (status, "there are pairs, questions" in complaint) == (1, True)


def test_the_help_names_every_kind_of_records(capsys: pytest.CaptureFixture):
    for command in ("index", "check"):
        with pytest.raises(SystemExit):
            main(["data", command, "--help"])
        said = capsys.readouterr().out
        assert all(name in said for name in KINDS)


def test_index_is_written_where_asked(pictures: Path, capsys: pytest.CaptureFixture):
    out, index = pictures.parent / "shards", pictures.parent / "elsewhere/own.index"
    run(capsys, "data", "build", pictures, pictures.parent / "captions.jsonl", out)
    status, said, _ = run(capsys, "data", "index", out / "00000.tar", "--out", index)
    assert status == 0
    assert index.is_file()
    assert str(index) in said
    assert run(capsys, "data", "check", out / "00000.tar", "--index", index, "--batch-size", 1)[0] == 0
    assert [path.name for path in out.glob("*.tar")] == ["00000.tar"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "check", "nowhere/*.tar"),
        ("data", "index", "nowhere/{00..03}.tar"),
        ("data", "build", "nowhere", "captions.jsonl", "out"),
        ("data", "check", "nowhere/*.tar", "--ranks", "0"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(pictures: Path, capsys: pytest.CaptureFixture, monkeypatch, arguments):
    monkeypatch.chdir(pictures.parent)
    status, said, complaint = run(capsys, *arguments)
    assert (status, said) == (1, "")
    assert complaint.startswith("blip: error: ")
    assert complaint.count("\n") == 1


def test_a_damaged_shard_is_named(pictures: Path, capsys: pytest.CaptureFixture):
    out = pictures.parent / "shards"
    run(capsys, "data", "build", pictures, pictures.parent / "captions.jsonl", out)
    (out / "00000.tar").write_bytes((out / "00000.tar").read_bytes()[:2000])
    status, _, complaint = run(capsys, "data", "check", out / "*.tar")
    assert status == 1
    assert "00000.tar" in complaint


def test_help_loads_nothing_heavy():
    code = (
        "import sys, blip.cli\ntry: blip.cli.main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "data" in done.stdout
    assert done.stdout.endswith("False\n")


def test_convert_writes_other_layouts_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    cases = Path(__file__).parent / "golden_cases"
    tensors = load_file(cases / "pretrain" / "weights.safetensors")
    torch.save({"model": tensors}, tmp_path / "released.pth")
    heads = ["--heads", "4", "4"]
    ours, back = str(tmp_path / "ours.ckpt"), str(tmp_path / "back.pth")
    vocabulary = str(cases / "vocab.txt")
    assert (
        main(["convert", str(tmp_path / "released.pth"), ours, "--to", "blip", "--tokenizer", vocabulary, *heads]) == 0
    )
    assert main(["convert", ours, back, "--to", "released", "--task", "pretrain", *heads]) == 0
    assert "image encoder" in capsys.readouterr().out
    found = torch.load(back, weights_only=True)["model"]
    assert all(torch.equal(found[name], tensors[name]) for name in found if "crossattention" not in name)


def test_convert_says_in_one_line_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path / "none.pth"), str(tmp_path / "out.ckpt"), "--to", "blip"]) == 1
    assert "none.pth" in capsys.readouterr().err


def test_a_vocabulary_is_learned_from_the_captions_of_shards(pictures: Path, capsys: pytest.CaptureFixture):
    out, file = pictures.parent / "shards", pictures.parent / "new" / "tokenizer.json"
    run(capsys, "data", "build", pictures, pictures.parent / "captions.jsonl", out)
    status, said, _ = run(capsys, "data", "vocabulary", out / "*.tar", "--out", file, "--size", 100)
    assert status == 0
    assert "from 10 captions" in said
    tokenizer = Tokenizer.load(file)
    (ids,) = tokenizer.encode(["a red dog"], 30)
    assert len(ids) == 5  # words of the captions are whole
    assert tokenizer.decode(ids) == "a red dog"
    assert tokenizer.decode(tokenizer.encode(["go 2 tour"], 30)[0]) == "go 2 tour"  # others are spelled
    status, _, error = run(capsys, "data", "vocabulary", out / "*.tar", "--out", file, "--size", 5)
    assert (status, error.count("\n")) == (1, 1)


def test_the_most_typical_caption_of_shards_is_all_that_is_printed(pictures: Path, capsys: pytest.CaptureFixture):
    out = pictures.parent / "shards"
    run(capsys, "data", "build", pictures, pictures.parent / "captions.jsonl", out)
    # what is said of every picture tells nothing; the others are right of one in five, half of whose captions they are
    assert run(capsys, "data", "typical", out / "*.tar") == (0, "picture 0 of many\n", "CIDEr 100.00 of 5 pictures\n")

"""The numbers of the released model: the shipped cases everywhere, the complete ones where the reference data lies."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip.modules.blip import BLIP, Backbone, BLIPConfig
from blip.modules.med import MEDConfig
from blip.modules.momentum import MomentumEncoder, Queue
from blip.modules.names import RELEASED, from_released, released_names, to_released
from blip.modules.nlvr import NLVR
from blip.modules.vit import ViTConfig
from blip.modules.vqa import VQA
from blip.text import Tokenizer
from tests.golden import check, main

CASES = Path(__file__).parent / "golden_cases"


@pytest.mark.parametrize("name", ["pretrain", "itm", "interpolate_pos_embed"])
def test_shipped_cases_agree(name: str):
    lines: list[str] = []
    assert check(CASES / name, lines.append), "\n".join(lines)


@pytest.mark.parametrize(
    "name", ["pretrain", "captioner", "feature_extractor", "itm", "nlvr", "retrieval", "vqa", "interpolate_pos_embed"]
)
def test_reference_cases_agree(reference: Path, name: str):
    lines: list[str] = []
    assert check(reference / "golden" / name, lines.append), "\n".join(lines)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the smallest case, to be spoilt."""
    shutil.copy(CASES / "vocab.txt", tmp_path)
    return shutil.copytree(CASES / "itm", tmp_path / "itm")


def test_a_number_outside_its_tolerance_is_an_error(copied: Path, capsys: pytest.CaptureFixture[str]):
    tensors = load_file(copied / "f64.safetensors")
    tensors["itc_sim"][1, 2] += 1e-7
    save_file(tensors, copied / "f64.safetensors")
    assert main([str(copied)]) == 1
    assert "itc_sim: worst 1.00e-07 (1 tensor)  OUTSIDE 1e-08 at itc_sim" in capsys.readouterr().out


def test_a_tensor_list_or_case_that_nobody_knows_is_an_error(copied: Path, capsys: pytest.CaptureFixture[str]):
    save_file(load_file(copied / "f64.safetensors") | {"new": torch.ones(2)}, copied / "f64.safetensors")
    case = json.loads((copied / "case.json").read_text())
    (copied / "case.json").write_text(json.dumps(case | {"answers": [1, 2]}))
    assert main([str(copied)]) == 1
    out = capsys.readouterr().out
    assert "new: UNKNOWN" in out
    assert "answers: UNKNOWN" in out
    (copied / "case.json").write_text(json.dumps(case | {"case": "unheard"}))
    assert main([str(copied)]) == 1
    assert "unknown case 'unheard'" in capsys.readouterr().out


def test_weights_of_another_release_are_an_error(copied: Path, capsys: pytest.CaptureFixture[str]):
    weights = load_file(copied / "weights.safetensors")
    weights["text_encoder.pooler.dense.weight"] = torch.ones(2)
    save_file(weights, copied / "weights.safetensors")
    assert main([str(copied)]) == 1
    assert "text_encoder.pooler.dense.weight" in capsys.readouterr().out


def test_tokens_are_the_released_tokenizers():
    golden = json.loads((CASES / "tokenizer.json").read_text())
    tokenizer = Tokenizer.load(CASES / "vocab.txt")
    special = golden["special_ids"]
    assert len(tokenizer) == golden["len"]
    assert (
        tokenizer.pad_id,
        tokenizer.unk_id,
        tokenizer.cls_id,
        tokenizer.sep_id,
        tokenizer.dec_id,
        tokenizer.enc_id,
    ) == (*(special[name] for name in ("pad", "unk", "cls", "sep", "bos", "enc")),)
    for row in golden["encode"]:
        assert tokenizer.encode([row["text"]], 512) == [row["ids"]]
        assert tokenizer.decode(row["ids"]) == row["decoded_skip_special"]
    for row in golden["decode"]:
        assert tokenizer.decode(row["ids"]) == row["skip"]
    short = golden["padded_max_length_8_truncated"]
    for text, ids, mask in zip(short["texts"], short["input_ids"], short["attention_mask"], strict=True):
        assert tokenizer.encode([text], 8) == [ids[: sum(mask)]]


# sizes of the released models, built without memory --------------------------------------------------------------------


def config(size: str, image_size: int, share: str = "all_but_sa") -> BLIPConfig:
    """The released base or large model."""
    width, depth = {"base": (768, 12), "large": (1024, 24)}[size]
    vit = ViTConfig(image_size, 16, width, depth, width // 64, 0.0)
    med = MEDConfig(30524, 768, 12, 12, 3072, 512, width, share, 0.1, 0.1)
    return BLIPConfig(vit, med, 256, 0.07, 30522, 30523)


def network(size: str, kind: str, image_size: int) -> Backbone:
    """The model whose weights a file of this kind holds."""
    if kind == "nlvr":
        return NLVR(config(size, image_size), merge_from=6)
    if kind == "vqa":
        return VQA(config(size, image_size))
    return BLIP(config(size, image_size), encoder=kind != "captioner", decoder=kind in ("pretrain", "captioner"))


def state(size: str, kind: str, image_size: int) -> dict[str, torch.Tensor]:
    """A state dict of ours, without memory, with what a file of this kind is made of."""
    with torch.device("meta"):
        model = network(size, kind, image_size)
        tensors = {f"model.{n}": t for n, t in model.state_dict().items()}
        if "queue" in RELEASED[kind]:
            tensors |= {f"momentum.{n}": t for n, t in MomentumEncoder(model, True).state_dict().items()}
            tensors |= {f"queue.{n}": t for n, t in Queue(57600, 256).state_dict().items()}
    return tensors


@pytest.mark.parametrize("kind", list(RELEASED))
def test_released_files_have_the_released_keys_and_shapes(reference: Path, kind: str):
    path = reference / "golden" / "state_dict_keys_base.json.gz"
    models = json.loads(gzip.decompress(path.read_bytes()))["models"]
    sizes = json.loads((reference / "golden" / "sizes.json").read_text())
    keys = models[kind]["keys"]
    made, _ = to_released(state("base", kind, sizes["base"][kind]["image_size"]), kind)
    assert {n: [str(t.dtype)[6:], list(t.shape)] for n, t in made.items()} == keys
    back, _ = from_released(made)
    assert len(keys) == sizes["base"][kind]["state_dict_entries"]
    assert set(to_released(back, kind)[0]) == set(keys)


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("kind", list(RELEASED))
def test_parameters_are_counted_as_in_the_released_models(reference: Path, size: str, kind: str):
    row = json.loads((reference / "golden" / "sizes.json").read_text())[size][kind]
    with torch.device("meta"):
        model = network(size, kind, row["image_size"])
    kept = set(to_released(state(size, kind, row["image_size"]), kind)[0])
    unique = {
        id(p): p.numel()
        for n, p in model.named_parameters(remove_duplicate=False)
        if set(released_names({f"model.{n}": p})) & kept
    }
    assert sum(unique.values()) == row["parameters"]


def test_momentum_parameters_are_the_released_ones_without_cross_attention(reference: Path):
    row = json.loads((reference / "golden" / "sizes.json").read_text())["base"]["pretrain"]
    with torch.device("meta"):
        model = BLIP(config("base", row["image_size"]))
        momentum = MomentumEncoder(model, True)
    cross = sum(p.numel() for block in model.med.encoder for p in block.cross_attention.parameters())
    assert sum(p.numel() for p in momentum.parameters()) == row["momentum_parameters"] - cross

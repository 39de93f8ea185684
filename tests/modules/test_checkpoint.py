"""Weights of others: round trips of every layout, sizes from shapes, and files that are wrong, foreign or hostile."""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip.modules.blip import BLIP
from blip.modules.checkpoint import Weights, blip_config, convert, load, nodes, read, sizes
from blip.modules.momentum import MomentumEncoder, Queue
from blip.modules.names import RELEASED, TRANSFORMERS, from_released, from_transformers, to_released, to_transformers
from blip.modules.nlvr import NLVR, merges_from
from blip.modules.vqa import VQA
from blip.text import Tokenizer
from tests.modules.small import small_config, small_model

HEADS = (6, 4)  # of `small_config`
CASES = Path(__file__).parents[1] / "golden_cases"


def state(share: str = "all_but_sa") -> dict[str, torch.Tensor]:
    """All that pre-training keeps, under our names."""
    model = small_model(share)
    queue = Queue(6, 16)
    queue.enqueue(torch.ones(2, 16), torch.ones(2, 16), torch.tensor([4, 5]))
    parts = {"model": model, "momentum": MomentumEncoder(model, dropout=True), "queue": queue}
    return {f"{prefix}.{n}": t for prefix, part in parts.items() for n, t in part.state_dict().items()}


def nlvr_state() -> dict[str, torch.Tensor]:
    """An NLVR2 model whose second block merges."""
    torch.manual_seed(0)
    return {
        f"model.{name}": tensor for name, tensor in NLVR(small_config(), merge_from=1).double().state_dict().items()
    }


def weights(tensors: dict[str, torch.Tensor]) -> Weights:
    return Weights(Path("weights.pth"), "released", tensors, {})


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save({"model": tensors, "epoch": 3, "config": {"lr": 1e-4}}, path)
    return path


@pytest.fixture(scope="module")
def vocabulary() -> str:
    return Tokenizer.load(CASES / "vocab.txt").to_json()


# round trips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(RELEASED))
def test_a_released_file_of_each_kind_comes_back_as_it_went(kind: str):
    ours = nlvr_state() if kind == "nlvr" else state()
    released, left = to_released(ours, kind)
    back, dropped = from_released(released)
    kept = {n: t for n, t in ours.items() if n not in left}
    for name, tensor in kept.items():
        if kind == "pretrain" and name == "queue.ids":
            continue  # the released pre-training queue knows no pictures
        assert torch.equal(back[name], tensor), name
    assert set(back) - set(kept) <= {n for n in back if n.startswith("model.med.embeddings.")}
    assert all("position_ids" in n or "text_encoder_m" in n for n in dropped)


def test_a_shallow_nlvr_model_merges_nowhere_and_its_file_comes_back():
    torch.manual_seed(0)
    ours = {f"model.{n}": t for n, t in NLVR(small_config(), merge_from=6).state_dict().items()}
    assert merges_from(ours) == 2
    assert merges_from(nlvr_state()) == 1
    back, _ = from_released(to_released(ours, "nlvr")[0])
    assert back.keys() == ours.keys()
    assert sizes(ours, HEADS, dropout=0.0).med.look_width == 48


@pytest.mark.parametrize(("to", "kind"), [(to_released, "base"), (to_transformers, "BlipForImageTextRetrieval")])
def test_two_cross_attentions_do_not_go_where_one_belongs(to, kind: str):
    ours = state() | nlvr_state()
    with pytest.raises(ValueError, match=f"a .* {kind} file has one cross-attention in a block, and not NLVR2's two"):
        to(ours, kind)


@pytest.mark.parametrize("kind", list(TRANSFORMERS))
def test_a_transformers_file_of_each_class_comes_back_as_it_went(kind: str):
    ours = state("none")
    theirs, left = to_transformers(ours, kind)
    back, _ = from_transformers(theirs)
    for name in ours:
        assert name in left or torch.equal(back[name], ours[name]), name
    assert {why for why in left.values() if "queue" in why}


def test_a_decoder_that_looks_at_narrower_states_has_no_place_with_transformers():
    ours = {f"model.{name}": tensor for name, tensor in VQA(small_config()).state_dict().items()}
    back, _ = from_released(to_released(ours, "vqa")[0])
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())
    with pytest.raises(ValueError, match=r"one width of what encoder and decoder look at, and not \[32, 48\]"):
        to_transformers(ours, "BlipForQuestionAnswering")


def test_the_queue_of_retrieval_keeps_which_picture_it_shows():
    released, _ = to_released(state(), "retrieval")
    assert released["idx_queue"].tolist() == [[4, 5, -100, -100, -100, -100]]
    assert released["ptr_queue"].tolist() == [2]
    assert released["image_queue"].shape == (16, 6)
    assert from_released(released)[0]["queue.ids"].tolist() == [4, 5, -1, -1, -1, -1]


@pytest.mark.parametrize("share", ["all", "all_but_sa", "all_but_ca", "none"])
def test_sizes_and_sharing_are_read_from_the_tensors(share: str):
    assert sizes(state(share), HEADS, dropout=0.0) == replace(
        small_config(share), med=replace(small_config(share).med, init_std=0.02), temperature=float(torch.tensor(0.07))
    )


def test_heads_are_64_wide_unless_told():
    with pytest.raises(ValueError, match="a width of 48 is no multiple of 64: give the numbers of heads"):
        sizes(state())


def test_files_go_through_every_layout_and_back(tmp_path: Path, vocabulary: str):
    """released -> ours -> transformers -> ours -> released gives the released captioner bit for bit."""
    first = save(tmp_path / "first.pth", to_released(state(), "captioner")[0])
    convert(first, tmp_path / "ours.ckpt", "blip", tokenizer=vocabulary, heads=HEADS)
    report = convert(
        tmp_path / "ours.ckpt", tmp_path / "folder", "transformers", "BlipForConditionalGeneration", heads=HEADS
    )
    assert "released" not in str(report)
    assert read(tmp_path / "folder").tokenizer == vocabulary
    assert read(tmp_path / "folder").heads == HEADS
    convert(tmp_path / "folder", tmp_path / "last.pth", "released", "captioner")
    before, after = (torch.load(p, weights_only=True)["model"] for p in (first, tmp_path / "last.pth"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(tmp_path.glob("**/*.partial"))


def test_the_config_that_a_checkpoint_carries_rebuilds_its_model():
    config = small_config()
    nodes_of_it = nodes(config)
    assert "vocab_size" not in nodes_of_it["med"]
    assert blip_config(nodes_of_it, config.med.vocab_size, config.dec_id, config.enc_id) == config


def test_what_the_target_cannot_hold_is_listed(tmp_path: Path):
    source = save(tmp_path / "all.pth", to_released(state(), "pretrain")[0])
    text = str(convert(source, tmp_path / "out", "transformers", "BlipForImageTextRetrieval", heads=HEADS))
    assert "loaded   text encoder" in text
    assert "a transformers BlipForImageTextRetrieval file has no text decoder" in text
    assert "the momentum encoder never looks at pictures" in text


def test_a_layout_is_not_written_without_its_parts(tmp_path: Path):
    captioner = save(tmp_path / "captioner.pth", to_released(state(), "captioner")[0])
    with pytest.raises(ValueError, match="needs what this model lacks: text encoder, ITC projections, ITM head"):
        convert(captioner, tmp_path / "out.pth", "released", "itm")
    with pytest.raises(ValueError, match="no task 'capshun'; choose one of pretrain, captioner"):
        convert(captioner, tmp_path / "out.pth", "released", "capshun")
    with pytest.raises(ValueError, match="unknown layout 'onnx'"):
        convert(captioner, tmp_path / "out.pth", "onnx")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        convert(captioner, tmp_path / "out.ckpt", "blip", heads=HEADS)
    assert not (tmp_path / "out.pth").exists()


# loading ----------------------------------------------------------------------------------------------------------------


def test_loading_fills_every_parameter_and_says_so():
    ours = state()
    torch.manual_seed(9)
    model = BLIP(small_config()).double()
    report = load(model, weights(ours))
    assert all(torch.equal(ours[f"model.{n}"], t) for n, t in model.state_dict().items())
    assert len(report.loaded) + len(set(model.state_dict()) - {n[6:] for n in report.loaded}) == len(model.state_dict())
    assert "this model has no momentum encoder" in str(report)
    momentum = MomentumEncoder(BLIP(small_config()).double(), dropout=True)
    load(momentum, weights(ours), prefix="momentum.")
    assert all(torch.equal(ours[f"momentum.{n}"], t) for n, t in momentum.state_dict().items())


def test_a_lone_decoder_takes_the_decoders_embeddings():
    ours = state("none")
    model = small_model("none", encoder=False)
    load(model, weights(ours))
    word = ours["model.med.decoder_embeddings.word.weight"]
    assert torch.equal(model.med.embeddings.word.weight, word)
    assert torch.equal(model.med.lm_head.output.weight, word)
    assert not torch.equal(ours["model.med.embeddings.word.weight"], word)


def test_pictures_of_another_size_resize_the_position_table():
    config = small_config()
    model = BLIP(replace(config, vit=replace(config.vit, image_size=48))).double()
    report = load(model, weights(state()))
    assert report.resized == {"model.visual_encoder.pos_embed": "16 -> 36 patches"}
    assert model.visual_encoder.pos_embed.shape == (1, 37, 48)
    assert "resized  model.visual_encoder.pos_embed: 16 -> 36 patches" in str(report)


def test_a_task_that_needs_what_the_file_lacks_is_refused():
    captioner, _ = from_released(to_released(state(), "captioner")[0])
    with pytest.raises(
        ValueError, match=r"has no ITC projections, no ITM head, no text encoder, which this task needs"
    ):
        load(small_model(), weights(captioner))
    base, _ = from_released(to_released(state(), "base")[0])
    report = load(small_model(decoder=False), weights(base), spare=("ITM head", "ITC projections", "temperature"))
    assert "the ITM head keeps its start values" in str(report)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda t: t.pop("model.med.encoder.1.feed_forward.fc1.bias"),
            r"encoder\.1\.feed_forward\.fc1\.bias is missing",
        ),
        (
            lambda t: t.update({"model.med.encoder.2.feed_forward.fc1.bias": torch.ones(3)}),
            r"encoder\.2\.feed_forward\.fc1\.bias is one too many",
        ),
        (
            lambda t: t.update({"model.itm_head.weight": torch.ones(3, 32)}),
            r"itm_head\.weight has shape \[3, 32\], the model \[2, 32\]",
        ),
        (
            lambda t: t.update({"model.med.decoder.0.cross_attention.out.bias": torch.ones(32).double()}),
            r"differs from .*, which the model ties to it: choose another model\.med\.share",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(spoil, message: str):
    ours = state()
    spoil(ours)
    model = small_model()
    with pytest.raises(ValueError, match=message):
        load(model, weights(ours))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("text_encoder.encoder.layer.0.attention.self.key.bias"), "is made of 3 tensors of the file"),
        (
            lambda t: t.update({"text_encoder.pooler.bias": torch.ones(1)}),
            r"belong to no released layout.*pooler\.bias",
        ),
        (
            lambda t: t.update({"text_decoder.cls.predictions.decoder.bias": torch.ones(60)}),
            r"decoder\.bias differs from the tensor it is tied to",
        ),
    ],
)
def test_a_released_file_that_is_not_one_is_refused_by_name(tmp_path: Path, spoil, message: str):
    tensors, _ = to_released(state(), "pretrain")
    spoil(tensors)
    with pytest.raises(ValueError, match=message):
        read(save(tmp_path / "spoilt.pth", tensors))


# hostile and damaged files --------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (open, ("/nowhere/touched", "w"))


def test_code_in_a_file_is_not_run(tmp_path: Path):
    path = tmp_path / "bomb.pth"
    torch.save({"model": {"visual_encoder.cls_token": torch.ones(1)}, "extra": Bomb()}, path)
    with pytest.raises(ValueError, match="holds more than tensors and plain values, refused unread"):
        read(path)
    path.write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(ValueError, match=r"refused unread|damaged"):
        read(path)


def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path):
    path = save(tmp_path / "wide.pth", {"visual_encoder.cls_token": torch.ones(1).expand(1 << 40)})
    with pytest.raises(ValueError, match="is not stored in this file of"):
        read(path)


def test_compressed_records_are_refused(tmp_path: Path):
    buffer, path = io.BytesIO(), tmp_path / "packed.pth"
    torch.save({"model": {"visual_encoder.cls_token": torch.zeros(1 << 16)}}, buffer)
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(ValueError, match="compressed records"):
        read(path)


def test_damaged_or_foreign_files_are_refused(tmp_path: Path):
    path = save(tmp_path / "cut.pth", to_released(state(), "base")[0])
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"damaged or not a checkpoint|refused unread"):
        read(path)
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="belong to no released layout known here: weight"):
        read(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_bytes(b"not a header")
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        read(tmp_path / "text.safetensors")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, not a dictionary"):
        read(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        read(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match=r"neither a run.s folder .* nor transformers. \(config\.json"):
        read(tmp_path)


def test_blocks_with_a_gap_are_refused():
    ours = {n.replace("blocks.1.", "blocks.7."): t for n, t in state().items()}
    with pytest.raises(ValueError, match=r"blocks \[0, 7\] are not numbered from 0 without gaps"):
        sizes(ours, HEADS)


def test_a_released_file_may_be_bare_or_safetensors(tmp_path: Path):
    tensors, _ = to_released(state(), "itm")
    torch.save(tensors, tmp_path / "bare.pth")
    save_file(tensors, tmp_path / "same.safetensors")
    ours = [read(tmp_path / name).tensors for name in ("bare.pth", "same.safetensors")]
    assert set(ours[0]) == set(ours[1])
    assert set(load_file(tmp_path / "same.safetensors")) == set(tensors)

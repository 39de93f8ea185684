"""Retrieval: the numbers of a plain computation, on any number of ranks and in bounded memory; ranks are counted strictly."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.rerank import arithmetic, base
from blip.evaluators.retrieval import Cut, RetrievalEvaluator, Words, ahead_of, recalls
from blip.evaluators.rows import Rows
from blip.modules.blip import BLIP
from tests.modules.small import pictures, small_model, texts
from tests.ranks import as_ranks

TEXTS = (2, 1, 3, 1, 1, 4, 2)  # of each picture
LENGTHS = (3, 9, 5, 4, 7, 6, 3, 8, 5, 4, 6, 7, 3, 5)
IDS = (40, 3, 17, 8, 21, 5, 30)


def evaluator(top_k: int = 2, texts_at_once: int = 4, itc_scale: float | None = 1.0, **kwargs: Any) -> Any:
    tokenizer: Any = SimpleNamespace(pad_id=0)
    return RetrievalEvaluator(tokenizer, top_k, texts_at_once, itc_scale, **kwargs)


@pytest.fixture(scope="module")
def model() -> BLIP:
    return apart(small_model())


def apart(model: BLIP) -> BLIP:
    """The model with answers that differ more from pair to pair: random weights say nearly the same of all."""
    with torch.no_grad():
        model.itm_head.weight.mul_(20)
    return model


def batch(numbers: Sequence[int]) -> Any:
    """Some of the set's pictures with all their texts."""
    ids, layout = texts(*LENGTHS)
    parts = ids.split(layout.mask.sum(1).tolist())
    starts = [sum(TEXTS[:i]) for i in range(len(TEXTS))]
    mine = [(row, starts[n] + i) for row, n in enumerate(numbers) for i in range(TEXTS[n])]
    _, layout = texts(*(LENGTHS[text] for _, text in mine))
    return SimpleNamespace(
        image=pictures(len(IDS))[list(numbers)],
        image_ids=torch.tensor([IDS[n] for n in numbers]),
        input_ids=torch.cat([parts[text] for _, text in mine]),
        layout=layout,
        text_row=torch.tensor([row for row, _ in mine]),
    )


def measured(model: BLIP, rank: int = 0, world: int = 1, at_once: int = 2, **kwargs: Any) -> dict[str, float]:
    """What the evaluator says when this rank has every world-th picture, `at_once` a batch."""
    judge = evaluator(**kwargs)
    mine = range(rank, len(IDS), world)
    for start in range(0, len(mine), at_once):
        judge.update(model, batch(list(mine[start : start + at_once])))
    return judge.compute(model)


@torch.no_grad()
def plain(model: BLIP, top_k: int) -> dict[str, float]:
    """The same numbers with every pair computed, and all of it in memory."""
    whole = batch(range(len(IDS)))
    states = model.visual_encoder(whole.image)
    cosine = model.image_features(states) @ model.text_features(whole.input_ids, whole.layout).T  # [I, T]
    words = whole.input_ids.split(whole.layout.mask.sum(1).tolist())
    itm = torch.tensor([[alone(model, state, text.tolist()) for text in words] for state in states])
    truth = torch.arange(len(IDS))[:, None] == whole.text_row
    results = {"chance_r1": 100 / len(IDS)}
    for name, similarity, logits, true in (("i2t", cosine, itm, truth), ("t2i", cosine.T, itm.T, truth.T)):
        near = torch.zeros_like(true).scatter(1, similarity.topk(min(top_k, true.shape[1])).indices, True)
        scores = (similarity + logits).masked_fill(~near, float("-inf"))
        for label, made in (("", scores), ("_itc", similarity)):
            ahead = [int(((s >= s[t].max()) & ~t).sum()) for s, t in zip(made, true, strict=True)]
            results |= {f"{name}_r{k}{label}": 100 * sum(a < k for a in ahead) / len(ahead) for k in (1, 5, 10)}
            if not label:
                results[f"{name}_median_rank"] = 1 + float(torch.tensor(ahead).double().quantile(0.5))
    results["mean"] = sum(results[f"{name}_r{k}"] for name in ("i2t", "t2i") for k in (1, 5, 10)) / 6
    return results


def alone(model: BLIP, state: Tensor, ids: list[int]) -> float:
    packed, layout = torch.tensor(ids), texts(len(ids))[1]
    return model.itm_logits(packed, layout, model.med.look(state[None]))[0, 1].item()


@pytest.mark.parametrize("top_k", [1, 3, 100])
@pytest.mark.parametrize("similarities_at_once", [1, 30, 10**6])
def test_the_numbers_are_those_of_a_plain_computation(model: BLIP, top_k: int, similarities_at_once: int) -> None:
    got = measured(model, top_k=top_k, similarities_at_once=similarities_at_once)
    assert got == pytest.approx(plain(model, top_k), abs=1e-9)


@pytest.mark.parametrize("world", [2, 3, 8])  # of eight ranks one has no picture
def test_any_number_of_ranks_gives_the_numbers_of_one(model: BLIP, world: int) -> None:
    expected = measured(model, top_k=3)
    for got in as_ranks(world, lambda rank: measured(model, rank, world, at_once=1, top_k=3)):
        assert got == expected


def in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(measured(apart(small_model()), rank, 2, top_k=3), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(model: BLIP, tmp_path: Any) -> None:
    mp.spawn(in_process, (str(tmp_path),), nprocs=2)
    expected = measured(model, top_k=3)
    assert len(set(expected.values())) > 4  # that it is no matter of zeros
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == expected


def test_a_set_without_pictures_has_no_numbers(model: BLIP) -> None:
    assert evaluator().compute(model) == {}


def test_a_picture_that_comes_twice_is_refused(model: BLIP) -> None:
    judge = evaluator()
    judge.update(model, batch([0, 1]))
    judge.update(model, batch([2, 1]))
    with pytest.raises(ValueError, match="picture 3 came 2 times"):
        judge.compute(model)


def test_what_the_directions_are_called_is_told(model: BLIP) -> None:
    got = measured(model, names=["v2t", "t2v"])
    assert {"v2t_r1", "t2v_r10", "t2v_median_rank", "v2t_r5_itc", "mean"} <= got.keys()
    assert not any("i2t" in name for name in got)


def test_of_a_clip_features_are_averaged_and_all_frames_looked_at(model: BLIP) -> None:
    clip = pictures(6).view(2, 3, 3, 32, 32)  # two clips of three frames
    states = model.image_states(clip)
    frames = model.vision_proj(model.visual_encoder(clip.flatten(0, 1))[:, 0]).view(2, 3, -1)
    torch.testing.assert_close(
        model.image_features(states), torch.nn.functional.normalize(frames.mean(1), dim=-1), rtol=1e-12, atol=0
    )
    judge = evaluator(top_k=9)
    shown = batch([0, 1])
    shown.image = clip
    judge.update(model, shown)
    assert judge.states.take([0]).shape == (1, 3 * 17, 48)
    assert judge.compute(model)["chance_r1"] == 50


# the second stage -------------------------------------------------------------------------------------------------------

WANTED = torch.zeros(5, 9, dtype=torch.bool)
WANTED[2] = True  # a picture that is near to all texts
WANTED[torch.tensor([0, 0, 1, 4]), torch.tensor([8, 1, 3, 0])] = True


@pytest.fixture
def held(model: BLIP) -> tuple[Tensor, list[Tensor], Words]:
    """States of pictures, and texts as they are and as the evaluator holds them."""
    ids, layout = texts(*LENGTHS[: WANTED.shape[1]])
    grid = Rows(None)
    grid.append(layout.pad(ids).int())
    lengths = layout.mask.sum(1)
    with torch.no_grad():
        return model.visual_encoder(pictures(len(WANTED))), list(ids.split(lengths.tolist())), Words(grid, lengths)


@pytest.mark.parametrize("texts_at_once", [1, 4, 100])
@torch.no_grad()
def test_each_wanted_pair_gets_the_logit_that_it_has_alone(model: BLIP, held: tuple, texts_at_once: int) -> None:
    states, told, words = held
    judge = evaluator(texts_at_once=texts_at_once)
    judge.states.append(states)
    logits = judge.rerank(model, torch.arange(5), words, WANTED)
    for picture, text in WANTED.nonzero().tolist():
        expected = alone(model, states[picture], told[text].tolist())
        assert logits[picture, text].item() == pytest.approx(expected, abs=1e-5)
    assert (logits[~WANTED] == 0).all()


@torch.no_grad()
def test_a_picture_near_to_all_texts_makes_no_work_for_the_others(
    model: BLIP, held: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    itm_logits = model.itm_logits
    monkeypatch.setattr(model, "itm_logits", lambda i, layout, c: rows.append(layout.rows) or itm_logits(i, layout, c))
    judge = evaluator(texts_at_once=4)
    judge.states.append(held[0])
    judge.rerank(model, torch.arange(5), held[2], WANTED)
    assert max(rows) <= 4
    # 9 + 2 + 1 + 1; the two with one text stand beside the one with two
    assert sum(rows) <= WANTED.sum() + 2


@pytest.mark.parametrize(("itc_scale", "found"), [(1.0, 0.0), (None, 100.0)])
def test_the_similarity_beside_itm_is_the_cosine_or_what_itc_makes_of_it(
    model: BLIP, monkeypatch: pytest.MonkeyPatch, itc_scale: float | None, found: float
) -> None:
    judge, same = evaluator(itc_scale=itc_scale), torch.eye(2)
    judge.image_ids, judge.owners, judge.lengths = [0, 1], [0, 1], [1, 1]
    for rows in (judge.images, judge.states, judge.texts):
        rows.append(same)
    judge.words.append(torch.tensor([7, 7], dtype=torch.int32))
    assert 1 / model.temperature.item() > 5
    monkeypatch.setattr(judge, "rerank", lambda *_: 5 * (1 - same))  # ITM errs by less than ITC is sure
    assert judge.compute(model)["i2t_r1"] == found


def test_re_ranking_coco_costs_what_the_arithmetic_says() -> None:
    shared, packed = arithmetic(base())
    assert (shared["value"], shared["peer_value"]) == pytest.approx((59.4, 184.8), abs=0.05)
    assert packed["value"] < 0.5 * shared["value"]


# counting ---------------------------------------------------------------------------------------------------------------


def test_a_true_candidate_comes_behind_all_that_score_the_same() -> None:
    similarity = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    truth = torch.tensor([[True, False, False], [False, True, False]])
    assert ahead_of(similarity, truth).tolist() == [1, 0]


def test_of_several_true_texts_the_best_counts() -> None:
    scores, truth = torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([[True, True, False]])
    assert recalls(ahead_of(scores, truth)) == {1: 100.0, 5: 100.0, 10: 100.0}


def test_a_model_whose_features_are_no_numbers_finds_nothing() -> None:
    model = small_model()
    with torch.no_grad():
        model.vision_proj.weight.fill_(float("nan"))
    got = measured(model, top_k=3)
    assert [got[name] for name in ("i2t_r1", "t2i_r1", "i2t_r1_itc", "t2i_r5_itc")] == [0.0] * 4


def test_a_cut_admits_k_of_each_row_the_first_of_equal_ones() -> None:
    similarity = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    every, cut = slice(0, 2), Cut.room(2)
    cut.fill(every, similarity, 3)
    admitted = cut.rows(every).admits(similarity, torch.arange(5))
    assert admitted.int().tolist() == [[1, 0, 1, 1, 0], [1, 1, 1, 0, 0]]
    cut.fill(every, similarity, 99)
    assert cut.rows(every).admits(similarity, torch.arange(5)).all()


# memory -----------------------------------------------------------------------------------------------------------------

PEAKS = """
import resource, sys
import torch
from types import SimpleNamespace
from blip.evaluators.retrieval import RetrievalEvaluator
from blip.layout import TextLayout

torch.set_num_threads(1)
width, captions = int(sys.argv[1]), int(sys.argv[2])
unit = lambda x: torch.nn.functional.normalize(x, dim=-1)
model = SimpleNamespace(
    image_states=lambda image: image,
    image_features=lambda states: unit(states[:, 0, :width]),
    text_features=lambda ids, layout: unit(torch.randn(layout.rows, width)),
    temperature=torch.tensor(0.07),
)
for texts in (2_000, 20_000):
    torch.manual_seed(0)
    judge = RetrievalEvaluator(None, top_k=64, texts_at_once=256, itc_scale=1.0)
    judge.rerank = lambda model, own, words, wanted: wanted * torch.rand(wanted.shape)  # of a model: what it needs of a set
    for start in range(0, texts // captions, 100):
        layout = TextLayout.from_lengths([9] * (100 * captions))
        judge.update(model, SimpleNamespace(
            image=torch.randn(100, 4, width),
            image_ids=torch.arange(start, start + 100),
            input_ids=torch.ones(900 * captions, dtype=torch.long),
            layout=layout,
            text_row=torch.arange(100).repeat_interleave(captions),
        ))
    judge.compute(model)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peaks(width: int, captions: int) -> list[float]:
    """Peak memory in MiB of a process that measured 2,000 texts, and of the same once it measured 20,000, too."""
    made = subprocess.run(
        [sys.executable, "-c", PEAKS, str(width), str(captions)], capture_output=True, text=True, check=True
    )
    return [float(line) for line in made.stdout.split()]


def test_ten_times_the_texts_need_no_more_memory() -> None:
    small, large = peaks(width=32, captions=5)
    assert large - small < 50

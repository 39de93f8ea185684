"""Fine-tuning for retrieval: ranks, negatives by online similarities, and what it starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blip.modules.checkpoint import Weights
from blip.tasks import contrastive
from blip.tasks.distributed import mean_over_ranks
from blip.tasks.retrieval import RetrievalTask
from tests.golden_models import recording
from tests.ranks import as_ranks
from tests.tasks.asking import started
from tests.tasks.steps import MAX_TOKENS, OBJECTIVES, batch, pairs, stepper

ONLY_PRETRAINING = ("lm_weight", "itm_start", "label_smoothing")
IDS = [0, 1, 2, 0, 4, 5]


class Stepper(RetrievalTask):
    """The task with a step counter of its own in place of the trainer's."""

    global_step, total_steps = 0, 10  # type: ignore[assignment]

    def log_dict(self, values: dict[str, torch.Tensor], **kwargs: Any) -> None:  # type: ignore[override]
        self.logged = {name.removeprefix("train/"): value.detach() for name, value in values.items()}


def retrieval_task(**objectives: Any) -> Stepper:
    goals = {name: value for name, value in OBJECTIVES.items() if name not in ONLY_PRETRAINING}
    goals |= {"positives": "image", "negative_floor": 0.0}
    return started(Stepper, objectives=goals | objectives, max_tokens=MAX_TOKENS)


def step(task: Stepper, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    """The losses, gradients and queue of a step over this rank's part of one global batch, averaged over the ranks."""
    rows = pairs(len(IDS), seed=0, image_ids=IDS)
    share = len(rows) // world
    task.training_step(batch(rows[rank * share : (rank + 1) * share]), 0).backward()
    made = {f"grad.{n}": p.grad for n, p in task.named_parameters() if p.grad is not None}
    made |= {"itc": task.logged["itc"], "itm": task.logged["itm"]}
    task.after_step()
    return {name: mean_over_ranks(value) for name, value in made.items()} | {"queue": task.queue.image}


def test_two_ranks_give_the_losses_gradients_and_queue_of_one() -> None:
    expected = step(retrieval_task())
    assert len(expected) > 50
    tasks = [retrieval_task() for _ in range(2)]  # before the threads, which draw from one generator
    for made in as_ranks(2, lambda rank: step(tasks[rank], rank, 2)):
        for name, value in expected.items():
            torch.testing.assert_close(made[name], value, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_with_keys_of_the_own_rank_negatives_still_come_from_all() -> None:
    tasks = [retrieval_task(keys="local") for _ in range(2)]
    with recording(negative_weights=contrastive, itc_loss=contrastive) as calls:
        as_ranks(2, lambda rank: step(tasks[rank], rank, 2))
    for rank in range(2):
        assert [weights.shape for _, weights in calls[rank]["negative_weights"]] == [(3, 6)] * 2
        ((similarities, _),) = calls[rank]["itc_loss"]
        assert similarities[0].shape == (3, 3 + 12)


def test_negatives_are_drawn_by_the_online_features_alone_without_a_floor() -> None:
    task = retrieval_task(negatives="local", keys="local")
    with torch.no_grad():
        for parameter in task.momentum.parameters():  # another place: the draws must not notice
            parameter.add_(torch.randn_like(parameter))
    rows = batch(pairs(4, seed=0, image_ids=[7, 7, 8, 9]))
    with recording(negative_weights=contrastive) as calls:
        task.training_step(rows, 0)
    model = task.model
    image = model.image_features(model.visual_encoder(rows.image))
    text = model.text_features(rows.input_ids, rows.layout)
    similarity = image @ text.T / model.temperature
    same = rows.image_ids[:, None] == rows.image_ids
    expected = [s.softmax(1).masked_fill(same, 0.0) for s in (similarity.T, similarity)]
    for (_, made), weights in zip(calls[0]["negative_weights"], expected, strict=True):
        torch.testing.assert_close(made, weights.detach(), rtol=1e-12, atol=1e-14)


def weights(task: Any, left_out: str = "nothing") -> Weights:
    tensors = {n: t.clone() for n, t in task.state_dict().items() if not n.startswith(left_out)}
    return Weights(Path("weights.ckpt"), "blip", tensors, {})


def pretrained() -> Any:
    """A pre-training task whose momentum encoder has gone other ways than its model."""
    task = stepper(seed=1)
    with torch.no_grad():
        for parameter in task.momentum.parameters():
            parameter.add_(0.01)
    return task


def test_it_starts_from_pre_training_with_its_momentum_encoder_and_without_its_decoder() -> None:
    source, task = pretrained(), retrieval_task()
    reports = task.take(weights(source))
    assert "this model has no text decoder" in str(reports[0])
    assert not hasattr(task.model.med, "decoder")
    theirs = source.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in task.model.state_dict().items())
    for ours, other in zip(task.momentum.parameters(), source.momentum.parameters(), strict=True):
        assert torch.equal(ours, other)


def test_without_a_momentum_encoder_in_the_file_it_is_a_copy_of_the_model() -> None:
    task = retrieval_task()
    task.take(weights(pretrained(), left_out="momentum."))
    copy = retrieval_task()
    copy.model.load_state_dict(task.model.state_dict())
    copy.momentum.copy_from(copy.model)
    assert all(torch.equal(a, b) for a, b in zip(task.momentum.parameters(), copy.momentum.parameters(), strict=True))


def test_every_parameter_of_the_model_takes_part_in_every_step() -> None:
    task = retrieval_task()
    task.training_step(batch(pairs(4, seed=0)), 0).backward()
    assert not [name for name, parameter in task.model.named_parameters() if parameter.grad is None]


def test_objectives_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"task\.objectives\.negatives must be one of .*'local', 'all'.*, not 'none'"):
        retrieval_task(negatives="none")


def test_a_prediction_gives_each_text_of_a_picture_what_it_gets_alone() -> None:
    task = retrieval_task().eval()
    rows = pairs(4, seed=0)
    whole = batch(rows)
    made = replace(whole, image=whole.image[:2], image_ids=whole.image_ids[:2])
    row = torch.tensor([0, 0, 0, 1])
    batched = SimpleNamespace(**vars(made), text_row=row, keys=["one", "two"], texts=["a", "b", "c", "d"])
    predicted = task.predict_step(batched, 0)
    assert [(r["key"], [t["text"] for t in r["texts"]]) for r in predicted] == [
        ("one", ["a", "b", "c"]),
        ("two", ["d"]),
    ]
    found = [text for r in predicted for text in r["texts"]]
    with torch.no_grad():
        for number, picture in enumerate(row.tolist()):
            alone = batch([rows[number]])
            states = task.model.visual_encoder(made.image[picture, None])
            cosine = task.model.image_features(states) @ task.model.text_features(alone.input_ids, alone.layout).T
            match = task.model.itm_logits(alone.input_ids, alone.layout, task.model.med.look(states)).softmax(1)[0, 1]
            assert found[number]["itc"] == pytest.approx(cosine.item(), abs=1e-6)
            assert found[number]["itm"] == pytest.approx(match.item(), abs=1e-6)

"""Fine-tuning for visual dialogue: each candidate judged for itself, from a pre-trained model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from blip.modules.checkpoint import Weights
from blip.modules.flops import counter
from blip.tasks.base import Task
from blip.tasks.visdial import VisDialTask
from tests.tasks.asking import nodes, pictures, round_batch, started

ROUNDS = [
    {"caption": "a b", "history": "", "question": "c d", "options": ["e", "f g", "h"], "answer_index": 1},
    {"caption": "b c d e", "history": "x y", "question": "c", "options": ["e", "k", "h i j"], "answer_index": 0},
]


def dialogue_task() -> VisDialTask:
    return started(VisDialTask, max_tokens=12)


def test_the_loss_is_the_mean_cross_entropy_of_all_candidates():
    task = dialogue_task()
    image = pictures(2)
    loss = task.training_step(round_batch(image, [0, 1], ROUNDS), 0)
    losses = []
    for row, entry in enumerate(ROUNDS):
        for number, option in enumerate(entry["options"]):
            one = round_batch(image[[row]], [0], [entry | {"options": [option], "answer_index": 0}])
            one.labels = torch.tensor([int(number == entry["answer_index"])])
            losses.append(task.training_step(one, 0))
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_every_parameter_takes_part_in_every_step():
    task = dialogue_task()
    task.training_step(round_batch(pictures(2), [0, 1], ROUNDS), 0).backward()
    assert not [name for name, parameter in task.named_parameters() if parameter.grad is None]


def test_encoder_and_matching_head_start_from_pre_training_and_the_decoder_is_left():
    start = started(Task, nodes()).model.state_dict()
    task = dialogue_task()
    tensors = {f"model.{name}": tensor + 1.0 for name, tensor in start.items()}
    (report,) = task.take(Weights(Path("weights.ckpt"), "blip", tensors, {}))
    assert all(torch.equal(tensor, start[name] + 1.0) for name, tensor in task.model.state_dict().items())
    assert "this model has no text decoder" in str(report)
    assert "this model has no ITC projections" in str(report)


def test_a_model_without_a_matching_head_does_not_start_it():
    tensors = {f"model.{name}": tensor for name, tensor in dialogue_task().model.state_dict().items()}
    less = {name: tensor for name, tensor in tensors.items() if "itm_head" not in name}
    with pytest.raises(ValueError, match="has no ITM head, which this task needs"):
        dialogue_task().take(Weights(Path("weights.ckpt"), "blip", less, {}))


def test_longer_dialogues_than_positions_are_refused():
    with pytest.raises(ValueError, match="max_tokens=17 is more than the 16"):
        started(VisDialTask, max_tokens=17)


def test_a_prediction_ranks_the_candidates_of_its_round():
    task = dialogue_task()
    scores = torch.tensor([[0.1, 2.0, -1.0], [0.0, 0.0, 3.0]])
    task.evaluators = {"visdial": SimpleNamespace(scores=lambda model, batch: scores)}
    batch = round_batch(pictures(2), [4, 5], ROUNDS)
    rows = task.predict_step(batch, 0)
    assert [(row["key"], row["answer"], row["ranks"]) for row in rows] == [
        ("k4", "f g", [2, 1, 3]),
        ("k5", "h i j", [2, 3, 1]),
    ]
    assert [card["true"] for card in task.gallery(batch)] == ["c d f g", "c e"]


def test_the_step_costs_what_is_counted():
    task = dialogue_task()
    batch = round_batch(pictures(2), [0, 1], ROUNDS)
    with counter() as seen:
        task.training_step(batch, 0).backward()
    assert seen.get_total_flops() / 1.1 < 2 * task.flops_per_pair(batch) < 1.1 * seen.get_total_flops()

"""Fine-tuning for questions: the weighted loss, and what it starts from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blip.modules.blip import BLIP
from blip.modules.checkpoint import Weights
from blip.modules.flops import counter
from blip.modules.names import from_released, to_released
from blip.tasks.base import Task
from blip.tasks.vqa import VQATask
from tests.tasks.asking import nodes, pictures, question_batch, started

ASKED = [[("a b c", ["d", "d", "e f", "d"])], [("c", ["g"])], [("b b", ["h i j", "d"])]]


def vqa_task(model: dict[str, Any] | None = None, smoothing: float = 0.1) -> VQATask:
    return started(VQATask, model, label_smoothing=smoothing, max_tokens=12)


def weights(task: Task, **changes: Any) -> Weights:
    tensors = {f"model.{n}": t.clone() for n, t in task.model.state_dict().items()}
    return replace(Weights(Path("weights.ckpt"), "blip", tensors, {}), **changes)


def pretrained(model: dict[str, Any] | None = None) -> Weights:
    """A checkpoint of pre-training, all heads and a momentum encoder's tensor included."""
    found = weights(started(Task, model))
    return replace(found, tensors=found.tensors | {"momentum.vision_proj.weight": torch.ones(1)})


def test_the_loss_is_the_weighted_sum_of_all_answers_over_the_pictures():
    task = vqa_task()
    image = pictures(3)
    whole = task.training_step(question_batch(image, ASKED), 0)
    alone = 0.0
    for row, [(question, answers)] in enumerate(ASKED):
        for answer in set(answers):
            one = task.training_step(question_batch(image[row : row + 1], [[(question, [answer])]]), 0)
            alone += answers.count(answer) / len(answers) * one
    torch.testing.assert_close(whole, alone / 3)


def test_every_parameter_takes_part_in_every_step():
    task = vqa_task()
    task.training_step(question_batch(pictures(3), ASKED), 0).backward()
    assert not [name for name, parameter in task.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("share", ["all", "all_but_sa", "all_but_ca", "none"])
def test_encoder_and_decoder_start_from_the_pre_trained_ones_and_share_nothing(share: str):
    model = nodes(share=share)
    start = pretrained(model)
    task = vqa_task(model)
    (report,) = task.take(start)
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(tensor, start.tensors[f"model.{name}"]), name
    med = task.model.med
    assert not {id(p) for p in med.encoder.parameters()} & {id(p) for p in med.decoder.parameters()}
    assert med.embeddings is not med.decoder_embeddings
    assert "ITM head" in str(report)
    assert not report.missing


def test_a_released_pre_trained_file_starts_it_too():
    start = pretrained()
    released, _ = to_released({n: t for n, t in start.tensors.items() if not n.startswith("momentum")}, "vqa")
    ours, dropped = from_released(released)
    task = vqa_task()
    task.take(Weights(Path("model_base.pth"), "released", ours, dropped))
    shared = start.tensors["model.med.encoder.0.feed_forward.fc1.weight"]
    assert torch.equal(task.model.med.decoder[0].feed_forward.fc1.weight, shared)


def test_keys_and_values_for_wider_pictures_are_left_and_said():
    model = nodes(vit={"width": 24, "heads": 3})
    task = vqa_task(model)
    before = {n: t.clone() for n, t in task.model.state_dict().items()}
    start = pretrained(model)
    (report,) = task.take(start)
    name = "model.med.decoder.1.cross_attention.key_value.weight"
    assert start.tensors[name].shape == (32, 24)
    assert torch.equal(task.model.med.decoder[1].cross_attention.key_value.weight, before[name.removeprefix("model.")])
    assert name in report.missing
    assert name not in report.loaded
    assert "another width than the questions' 16" in str(report)
    encoder = name.replace("decoder", "encoder")
    assert torch.equal(task.model.med.encoder[1].cross_attention.key_value.weight, start.tensors[encoder])


def test_pictures_of_another_size_have_their_positions_resized():
    task = vqa_task(nodes(vit={"image_size": 32}))
    (report,) = task.take(pretrained())
    assert report.resized == {"model.visual_encoder.pos_embed": "4 -> 16 patches"}


def test_a_model_of_questions_goes_on_as_it_was():
    first, second = vqa_task(), vqa_task()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    second.take(weights(first))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_captioner_has_no_question_encoder_to_start_from():
    captioner = started(type("Captions", (Task,), {"encoder": False}))
    with pytest.raises(ValueError, match="has no text encoder, which this task needs"):
        vqa_task().take(weights(captioner))


def test_longer_questions_than_positions_are_refused():
    with pytest.raises(ValueError, match="max_tokens=17 is more than the 16"):
        started(VQATask, label_smoothing=0.1, max_tokens=17)


def test_the_step_costs_what_is_counted():
    task = vqa_task()
    batch = question_batch(pictures(3), ASKED)
    with counter() as seen:
        task.training_step(batch, 0).backward()
    attention = 1.1  # a fused backward pass counts 2.5 forward passes, and not 2
    assert seen.get_total_flops() / attention < 3 * task.flops_per_pair(batch) < 1.1 * seen.get_total_flops()


def test_what_the_server_takes_is_written_for_a_set_whose_answers_nobody_knows(tmp_path: Path):
    task = vqa_task()
    task._trainer = SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path))
    rows = [{"id": 7, "answers": [], "said": "a dog"}, {"id": 9, "answers": [], "said": "2"}]
    task.scored("test", "vqa_std", SimpleNamespace(rows=rows))
    written = json.loads((tmp_path / "vqa_std_answers.json").read_text())
    assert written == [{"question_id": 7, "answer": "a dog"}, {"question_id": 9, "answer": "2"}]
    task.scored("test", "vqa", SimpleNamespace(rows=[{"id": 7, "answers": ["cat"], "said": "a dog"}]))
    assert not (tmp_path / "vqa_answers.json").exists()


def test_a_prediction_names_question_and_picture():
    task = vqa_task()
    task.evaluators = {"vqa": SimpleNamespace(answer=lambda model, batch: ["x", "y", "z"])}
    rows = task.predict_step(question_batch(pictures(2), [[("a", ["b"]), ("c", [])], [("d", ["e", "f"])]]), 0)
    assert rows[1] == {"key": "k0", "question_id": 1, "question": "c", "answer": "y", "references": []}
    assert rows[2]["key"] == "k1"
    cards = task.gallery(question_batch(pictures(2), [[("a", ["b"]), ("c", [])], [("d", ["e", "f"])]]))
    assert [(card["true"], card["generated"]) for card in cards] == [("a b", "x"), ("c", "y"), ("d e", "z")]
    assert cards[0]["image"].shape == (16, 16, 3)


def test_the_network_is_no_model_of_pre_training():
    assert not isinstance(vqa_task().model, BLIP)

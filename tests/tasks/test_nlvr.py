"""Fine-tuning for NLVR2: what it starts from, what it optimises, and what it says of statements."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blip.modules.checkpoint import Weights
from blip.tasks.nlvr import NLVRTask
from tests.tasks.asking import packed, pictures, started
from tests.tasks.steps import stepper


def nlvr_task(seed: int = 0) -> NLVRTask:
    task = started(NLVRTask, merge_from=1)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return task


def statement_batch(texts: list[str], rows: list[int], labels: list[int]) -> Any:
    ids, layout = packed(texts)
    return SimpleNamespace(
        image=pictures(2 * (max(rows) + 1)).unflatten(0, (-1, 2)),
        input_ids=ids,
        layout=layout,
        text_row=torch.tensor(rows),
        labels=torch.tensor(labels),
        keys=[f"pair{row}" for row in range(max(rows) + 1)],
        statements=[{"id": f"s{i}", "sentence": text, "label": bool(labels[i])} for i, text in enumerate(texts)],
    )


def weights(task: Any) -> Weights:
    return Weights(Path("weights.ckpt"), "blip", {n: t.clone() for n, t in task.state_dict().items()}, {})


def test_a_pre_trained_cross_attention_starts_both_halves_and_the_report_says_so() -> None:
    source, task = stepper(seed=1), nlvr_task()
    untouched = task.model.nlvr_head[0].weight.clone()
    (report,) = task.take(weights(source))
    for theirs, ours in zip(source.model.med.blocks(), task.model.med.blocks(), strict=True):
        for half in ours.cross_attention.halves:
            for name, tensor in half.state_dict().items():
                assert torch.equal(tensor, theirs.cross_attention.state_dict()[name])
        assert torch.equal(ours.cross_attention.norm.weight, theirs.cross_attention.norm.weight)
        assert torch.equal(ours.self_attention.qkv.weight, theirs.self_attention.qkv.weight)
    assert torch.equal(task.model.nlvr_head[0].weight, untouched)
    told = str(report)
    for line in (
        "to both halves of NLVR2's twin, one for each picture",
        "the merge layers keeps its start values",
        "the NLVR2 head keeps its start values",
        "this model has no text decoder",
        "loaded   twin cross-attention: 24 tensors",
    ):
        assert line in told


def test_an_nlvr_model_goes_on_as_it_was() -> None:
    source, task = nlvr_task(seed=5), nlvr_task(seed=6)
    (report,) = task.take(weights(source))
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), task.parameters(), strict=True))
    assert not report.missing
    assert not report.copied


def test_a_model_without_text_encoder_is_refused() -> None:
    source = weights(stepper())
    lone = {n: t for n, t in source.tensors.items() if not n.startswith("model.med.encoder.")}
    with pytest.raises(ValueError, match=r"no text encoder.*, which this task needs"):
        nlvr_task().take(replace(source, tensors=lone))


def test_the_loss_is_the_mean_cross_entropy_of_the_labels() -> None:
    task = nlvr_task()
    batch = statement_batch(["a b", "c d e", "f"], [0, 1, 2], [1, 0, 1])
    loss = task.training_step(batch, 0)
    logits = task.model.nlvr_logits(batch.image, batch.input_ids, batch.layout)
    expected = -(logits.log_softmax(1)[torch.arange(3), batch.labels]).mean()
    torch.testing.assert_close(loss, expected)


def test_a_prediction_names_its_statement_and_is_what_the_head_finds_likelier() -> None:
    task = nlvr_task()
    batch = statement_batch(["a b", "c d e", "f"], [0, 0, 1], [1, 0, 1])
    rows = task.predict_step(batch, 0)
    logits = task.model.nlvr_logits(batch.image, batch.input_ids, batch.layout, batch.text_row)
    assert [row["key"] for row in rows] == ["pair0", "pair0", "pair1"]
    assert [row["id"] for row in rows] == ["s0", "s1", "s2"]
    assert [row["prediction"] for row in rows] == [bool(i) for i in logits.argmax(1)]
    assert [row["probability"] for row in rows] == pytest.approx(logits.softmax(1)[:, 1].tolist(), abs=1e-6)

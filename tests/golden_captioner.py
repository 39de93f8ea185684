"""The golden case `captioner`: the loss behind a prompt, and texts written in every way that the case tells of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from blip.layout import TextLayout
from blip.modules import generation
from blip.modules.checkpoint import nodes
from blip.modules.decoding import Decoding, controlled, nucleus
from blip.modules.generation import Texts, generate
from blip.modules.med import CrossKV
from blip.tasks import caption
from blip.tasks.caption import CaptionTask
from blip.text import Tokenizer
from tests.golden_models import (
    PADDED,
    USED,
    _config,
    _gradients,
    _ids,
    _same_groups,
    _tied,
    _weights,
    digest,
    recording,
)

SETTINGS = {"num_beams": "beams", "no_repeat_ngram_size": "no_repeat_ngram", "num_return_sequences": "samples"}
PLAIN: dict[str, Any] = {
    **{"strategy": "greedy", "max_length": 20, "min_length": 5, "beams": 1, "samples": 1},
    **{"top_p": 0.9, "top_k": 0, "temperature": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram": 0},
    **{"length_penalty": 1.0, "length_counts": "all"},
}
NUCLEUS = {
    "repetition_penalty": 1.1,
    "min_length": 10,
    "max_length": 30,
}  # of the case's distributions, as its note says


class Replay(CaptionTask):
    """The task without a trainer."""

    def log(self, *args: Any, **kwargs: Any) -> None: ...


def run_captioner(
    out: Any,
    folder: Path,
    case: dict[str, Any],
    tensors: dict[str, Tensor],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    task = _task(folder, case, tensors, dtype)
    _train(out, folder, case, tensors, inputs, task)
    with torch.no_grad():
        image = inputs["generate.image"]
        states = task.model.visual_encoder(image.to(dtype))
        _write(out, case, task, task.model.med.look(states, decoder=True), inputs)
        _sequence_scores(out, case, task, states)
        other = _task(folder, case, tensors, torch.float32)
        _sequence_scores(out, case, other, other.model.visual_encoder(image), "_f32")
    out.reasons |= USED | {
        "digest_names": "names of rows",
        "zero_gradient_parameters": "names of what float32 leaves out",
    }


def _task(folder: Path, case: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> Replay:
    weights = _weights(folder, tensors)
    config = _config(case, weights)
    task = Replay(
        case["prompt"],
        case["train"]["label_smoothing"],
        case["train"]["max_length"] - (case["prompt_length"] - 1),
        model=nodes(config),
        tokenizer=Tokenizer.load(folder / case["vocab_file"]).to_json(),
        optimizer=None,
        schedule=None,
        evaluators={},
    )
    if len(task.prompt) + 1 != case["prompt_length"]:
        raise ValueError(f"{folder}: the prompt is {len(task.prompt) + 1} ids with [DEC], not {case['prompt_length']}")
    task.take(weights)
    return task.to(dtype)


def _train(
    out: Any, folder: Path, case: dict[str, Any], tensors: dict[str, Tensor], inputs: dict[str, Tensor], task: Replay
) -> None:
    """One step over captions whose prompt the task puts in itself."""
    train, model = case["train"], task.model
    ids, mask, targets = (inputs[f"train.{n}"] for n in ("input_ids", "attention_mask", "decoder_targets"))
    made = _ids(folder, case, train["captions"], train["max_length"], ids.shape[1])
    rest = [text.removeprefix(case["prompt"]) for text in train["captions"]]
    rows = task.tokenizer.encode(rest, train["max_length"] - len(task.prompt))
    batch = SimpleNamespace(
        image=inputs["train.image"].to(model.med.embeddings.word.weight.dtype),
        input_ids=torch.tensor([i for row in rows for i in row]),
        layout=TextLayout.from_lengths([len(row) for row in rows]),
    )
    states: list[Tensor] = []
    lm_states = model.lm_states

    def watched(*args: Any) -> Tensor:
        states.append(lm_states(*args))
        return states[-1]

    with recording(prompted=caption, lm_loss=caption) as calls, patch.object(model, "lm_states", watched):
        loss = task.training_step(batch, 0)
    loss.backward()
    gradients = _gradients(model)
    ((_, (packed, layout, followed)),) = calls[0]["prompted"]
    told = layout.pad(torch.full_like(packed, -100).index_copy(0, followed + 1, packed[followed + 1]))
    padding = layout.mask.logical_not()
    if not torch.equal(layout.pad(packed), ids) or not torch.equal(told.masked_fill(padding, -100), targets):
        raise ValueError(f"{folder}: the task's texts or targets are other than the folder's")
    out.tensors |= {
        "train.loss": loss,
        "train.logits": layout.pad(model.med.lm_head(states[0])),
        "train.digest.grad": digest(gradients, case["digest_names"]["grad"]),
        **{f"train.grad.{name}": gradient for name, gradient in gradients.items()},
    }
    out.masks["train.logits"] = (mask.bool(), PADDED)
    out.lists |= {
        "train.captions": train["captions"] if torch.equal(made, ids) else made.tolist(),
        "tied_groups": _same_groups(_tied(model, tensors), case["tied_groups"]),
        "parameters_without_gradient": sorted(set(case["digest_names"]["grad"]) - set(gradients)),
    }


# decoding -------------------------------------------------------------------------------------------------------------


def _decoding(kwargs: dict[str, Any], **more: Any) -> Decoding:
    given = {SETTINGS.get(name, name): value for name, value in kwargs.items()}
    if unknown := set(given) - {field.name for field in fields(Decoding)}:
        raise ValueError(f"the folder decodes with {', '.join(sorted(unknown))}, which nothing here knows")
    strategy = "beam" if given.get("beams", 1) > 1 else "greedy"
    return Decoding(**PLAIN | {"strategy": strategy} | given | more)


def _texts(task: Replay, cross: list[CrossKV], how: Decoding, uniform: Tensor | None = None) -> Texts:
    tokenizer = task.tokenizer
    prompt = [tokenizer.dec_id, *task.prompt]
    return generate(task.model.med, cross, prompt, how, tokenizer.sep_id, tokenizer.pad_id, uniform)


def _said(task: Replay, case: dict[str, Any], texts: Texts) -> list[str]:
    """As released: the prompt's characters cut from the decoded whole."""
    return [task.tokenizer.decode(row)[len(case["prompt"]) :] for row in texts.ids.tolist()]


@contextmanager
def _watched(name: str) -> Iterator[list[Tensor]]:
    """What a function of decoding gives at each step, of all rows to the end."""
    function, made = getattr(generation, name), []

    def call(*args: Any) -> Tensor:
        made.append(function(*args))
        return made[-1]

    with patch.object(generation, name, call), patch.object(generation, "look_every", lambda _: 10**6):
        yield made


def _write(out: Any, case: dict[str, Any], task: Replay, cross: list[CrossKV], inputs: dict[str, Tensor]) -> None:
    decoding, start = case["decoding"], case["prompt_length"]
    for name, setting in decoding["settings"].items():
        how = _decoding(setting["kwargs"])
        texts = _texts(task, cross, how)
        out.lists[f"decoding.settings.{name}.ids"] = texts.ids.tolist()
        out.lists[f"decoding.settings.{name}.texts"] = _said(task, case, texts)
        with _watched("controlled") as scores:
            whole = _texts(task, cross, how)
        if how.strategy == "greedy":
            out.tensors[f"{name}.step_scores"] = torch.stack([s[:, 0] for s in scores], 1)[
                :, : whole.ids.shape[1] - start
            ]
        else:  # the prompt was read once; all beams but the first begin far behind
            far = torch.tensor([0.0] + [-1e9] * (how.beams - 1)).to(scores[0])
            out.tensors[f"{name}.first_step_scores"] = (scores[0] + far[:, None]).flatten(0, 1)
    usual = _decoding({"num_beams": 3, "max_length": 30, "min_length": 10})  # the released function's own
    out.lists["decoding.default_generate_texts"] = _said(task, case, _texts(task, cross, usual))
    _nucleus(out, decoding["nucleus"], task, cross)

    sample, pictures = decoding["sample"], cross[0].key.shape[0]
    how = _decoding(sample["kwargs"], strategy="nucleus")
    uniform = inputs["sample.u"].new_zeros(how.max_length, pictures)
    given = inputs["sample.u"].view(-1, pictures)[: how.max_length]
    uniform[: len(given)] = given
    uniform = uniform[: how.max_length - start].T[:, None]
    texts = _texts(task, cross, how, uniform)
    out.lists["decoding.sample.ids"] = texts.ids.tolist()
    out.lists["decoding.sample.texts"] = _said(task, case, texts)
    with _watched("nucleus") as weights:
        _texts(task, cross, how, uniform)
    steps = torch.stack([w[:, 0] for w in weights])[: texts.ids.shape[1] - start]
    out.tensors["sample.step_probs"] = steps / steps.sum(-1, keepdim=True)


def _nucleus(out: Any, case: dict[str, Any], task: Replay, cross: list[CrossKV]) -> None:
    """Distributions along given ids."""
    ids, first = torch.tensor(case["sequence_ids"]), case["first_position"]
    layout = TextLayout.from_mask(torch.ones_like(ids, dtype=torch.bool))
    med = task.model.med
    raw = med.lm_head(layout.pad(med.decode(ids.flatten(), layout, cross))[:, first - 1 : -1])  # [B, n, V]
    how = Decoding(**PLAIN | NUCLEUS)
    processed = raw.clone()
    for i in range(raw.shape[1]):
        processed[:, i] = controlled(processed[:, i].clone(), ids[:, : first + i], how, task.tokenizer.sep_id)

    def probabilities(scores: Tensor, **kwargs: Any) -> Tensor:
        weights = nucleus(scores, Decoding(**PLAIN | kwargs))
        return weights / weights.sum(-1, keepdim=True)

    out.tensors |= {
        "nucleus.raw_logits": raw,
        "nucleus.processed_logits": processed,
        "nucleus.probs_topk50": probabilities(processed, top_k=50, top_p=1.0),
        "nucleus.probs_topk50_topp0.9_as_released": probabilities(processed, top_k=50, top_p=0.9),
        "nucleus.probs_topp0.9_of_raw_logits": probabilities(raw, top_p=0.9),
    }
    out.lists["decoding.nucleus.sequence_ids"] = case["sequence_ids"]  # an input of the run


def _sequence_scores(out: Any, case: dict[str, Any], task: Replay, states: Tensor, run: str = "") -> None:
    """Scores of beam search: the folder's own list where every one agrees with it."""
    cross = task.model.med.look(states, decoder=True)
    tolerance = 1e-4 if states.dtype == torch.float32 else 1e-8
    for name, setting in case["decoding"]["settings"].items():
        if f"sequences_scores{run}" in setting:
            want = setting[f"sequences_scores{run}"]
            made = _texts(task, cross, _decoding(setting["kwargs"])).score.tolist()
            near = len(made) == len(want) and all(
                abs(a - b) <= tolerance * max(1.0, abs(b)) for a, b in zip(made, want, strict=True)
            )
            out.lists[f"decoding.settings.{name}.sequences_scores{run}"] = want if near else made

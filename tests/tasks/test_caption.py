"""The captioner's loss is the language model's behind a prompt that is read and not asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor

from blip.layout import TextLayout
from blip.modules.checkpoint import Weights
from blip.modules.flops import counter
from blip.tasks.caption import CaptionTask, prompted
from tests.tasks.steps import MAX_TOKENS, MED, VIT, WORDS, batch, pairs, stepper

PROMPT = [9, 7]


class Alone(CaptionTask):
    """The task without a trainer."""

    def log(self, *args: Any, **kwargs: Any) -> None: ...


def captioner(prompt: str = "d b", smoothing: float = 0.1, max_tokens: int = MAX_TOKENS, **med: Any) -> Alone:
    torch.manual_seed(0)
    wordpiece = tokenizers.models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(wordpiece)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    task = Alone(
        prompt,
        smoothing,
        max_tokens,
        model={
            "vit": VIT,
            "med": {**MED, "dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.3, **med},
            "embed_width": 8,
            "temperature": 0.2,
        },
        tokenizer=json.dumps(json.loads(tokenizer.to_str())),
        optimizer=None,  # type: ignore[arg-type]
        schedule=None,  # type: ignore[arg-type]
        evaluators={},
    )
    return task.double()


def plain_loss(task: Alone, rows: list[tuple[Tensor, list[int], int]], prompt: list[int], smoothing: float) -> Tensor:
    """Text by text, whole: the mean over everything behind the prompt."""
    losses = []
    for image, (_, *words), _ in rows:
        ids = torch.tensor([task.model.config.dec_id, *prompt, *words])
        cross = task.model.med.look(task.model.visual_encoder(image[None]), decoder=True)
        logits = task.model.med.lm_head(task.model.med.decode(ids, TextLayout.from_lengths([len(ids)]), cross))
        told, targets = logits[len(prompt) : -1], ids[len(prompt) + 1 :]
        losses.append(F.cross_entropy(told, targets, reduction="none", label_smoothing=smoothing))
    return torch.cat(losses).mean()


@pytest.mark.parametrize(("prompt", "ids"), [("d b", PROMPT), ("", [])])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_what_follows_the_prompt(prompt: str, ids: list[int], smoothing: float) -> None:
    task, rows = captioner(prompt, smoothing), pairs(5, seed=1)
    assert task.prompt == ids
    torch.testing.assert_close(task.training_step(batch(rows), 0), plain_loss(task, rows, ids, smoothing))


def test_a_prompt_stands_behind_the_first_token_of_every_text() -> None:
    texts = [[2, 11, 3], [2, 12, 13, 14, 3], [2, 3]]
    layout = TextLayout.from_lengths([len(text) for text in texts])
    ids, longer, followed = prompted(torch.tensor([i for text in texts for i in text]), layout, PROMPT)
    whole = [[text[0], *PROMPT, *text[1:]] for text in texts]
    want = TextLayout.from_lengths([len(text) for text in whole])
    assert ids.tolist() == [i for text in whole for i in text]
    for name in ("index", "mask", "firsts"):
        assert torch.equal(getattr(longer, name), getattr(want, name))
    assert ids[followed + 1].tolist() == [i for text in texts for i in text[1:]]
    assert ids[followed].tolist() == [7, 11, 7, 12, 13, 14, 7]


def test_every_parameter_learns() -> None:
    task = captioner()
    task.training_step(batch(pairs(4, seed=0)), 0).backward()
    assert [name for name, p in task.named_parameters() if p.grad is None] == []


def test_it_starts_from_pre_training_and_says_what_it_leaves() -> None:
    pretrained, task = stepper(seed=3), captioner()
    task.take(Weights(path=None, layout="blip", tensors=pretrained.state_dict(), dropped={}))  # type: ignore[arg-type]
    rows = pairs(3, seed=2)
    picked = batch(rows)
    cross = pretrained.model.med.look(pretrained.model.visual_encoder(picked.image), decoder=True)
    states = pretrained.model.lm_states(picked.input_ids, picked.layout, cross)
    torch.testing.assert_close(task.model.lm_states(picked.input_ids, picked.layout, cross), states)
    assert not hasattr(task.model, "itm_head")


def test_texts_that_leave_no_room_for_the_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_tokens=15 and 2 pieces of task.prompt are more than the 16"):
        captioner(max_tokens=15)


def test_flops_are_those_that_torch_counts() -> None:
    task, some = captioner().float(), batch(pairs(5, seed=0))
    some.image = some.image.float()
    with torch.autocast("cpu", torch.bfloat16), counter() as flops:  # in bf16 attention is written out and seen
        task.training_step(some, 0).backward()
    assert flops.get_total_flops() == task.flops_per_pair(some) * 5

"""The three objectives, also where a batch gives them nothing to do."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from blip.modules.losses import (
    at_least_float32,
    draw,
    itc_loss,
    itm_loss,
    lm_loss,
    match_targets,
    negative_weights,
    soft_targets,
    text_losses,
)


def test_itc_is_cross_entropy_where_the_targets_are_hard():
    image, text = torch.randn(2, 4, 6, dtype=torch.float64)
    targets = match_targets(torch.arange(4), torch.arange(6), torch.arange(4), "pair", torch.float64)
    expected = (F.cross_entropy(image, torch.arange(4)) + F.cross_entropy(text, torch.arange(4))) / 2
    torch.testing.assert_close(itc_loss(image, text, targets, targets), expected)


def test_positives_by_image_share_the_target_among_all_columns_of_the_picture():
    columns = torch.tensor([7, 8, 7, -1, 7])
    by_image = match_targets(torch.tensor([7, 8, 7]), columns, torch.arange(3), "image", torch.float32)
    third = 1 / 3
    expected = torch.tensor([[third, 0, third, 0, third], [0, 1, 0, 0, 0], [third, 0, third, 0, third]])
    torch.testing.assert_close(by_image, expected)
    by_pair = match_targets(torch.tensor([7, 8, 7]), columns, torch.tensor([0, 1, 2]), "pair", torch.float32)
    assert by_pair.argmax(1).tolist() == [0, 1, 2]
    assert by_pair.sum() == 3


def test_soft_targets_mix_and_pass_no_gradient():
    similarity = torch.randn(3, 5, requires_grad=True)
    targets = F.one_hot(torch.arange(3), 5).float()
    mixed = soft_targets(targets, similarity, 0.4)
    assert not mixed.requires_grad
    torch.testing.assert_close(mixed.sum(1), torch.ones(3))
    torch.testing.assert_close(mixed, 0.4 * similarity.detach().softmax(1) + 0.6 * targets)


def test_a_batch_of_one_has_defined_losses():
    one = torch.zeros(1, 1)
    assert itc_loss(one, one, torch.ones(1, 1), torch.ones(1, 1)) == 0
    column, drawn = draw(negative_weights(one, torch.zeros(1, 1, dtype=torch.bool), 1e-4), torch.tensor([0.5]))
    assert column.tolist() == [0]
    assert drawn.tolist() == [False]
    logits = torch.tensor([[0.0, 1.0], [5.0, -5.0], [9.0, 9.0]], requires_grad=True)
    loss = itm_loss(logits, torch.tensor([True, False, False]), torch.tensor([True, False, False]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[1:].abs().sum() == 0


def test_no_valid_row_gives_zero_and_never_nan():
    logits = torch.randn(2, 2, requires_grad=True)
    loss = itm_loss(logits, torch.zeros(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(2, 2))
    assert lm_loss(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), 0.1).item() == 0


def test_a_pair_of_the_same_picture_is_never_drawn():
    ids = torch.tensor([1, 2, 1, 3, 1])
    admissible = ids[:, None] != ids[None]
    weights = negative_weights(torch.randn(5, 5) * 20, admissible, 1e-4)
    for u in torch.linspace(0, 1 - 2**-24, 41):
        columns, drawn = draw(weights, u.expand(5))
        assert drawn.all()
        assert (ids[columns] != ids).all()


def test_draws_follow_the_weights_and_the_rule_of_the_reference():
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]])
    u = torch.arange(400) / 400
    columns = torch.cat([draw(weights, u[i : i + 1])[0] for i in range(400)])
    assert columns.unique().tolist() == [1, 3]
    assert (columns == 1).sum() == 100
    assert draw(weights, torch.tensor([0.25]))[0].tolist() == [3]  # the first whose cumulative sum exceeds u * sum
    assert draw(weights, torch.tensor([1.0]))[0].tolist() == [3]  # the end of the range stays on a column with weight


def test_smoothed_lm_loss_is_torchs_mean_over_tokens():
    logits, targets = torch.randn(7, 11), torch.randint(11, (7,))
    expected = F.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(lm_loss(logits, targets, 0.1), expected)
    torch.testing.assert_close(lm_loss(logits, targets, 0.1, torch.tensor(14.0)), expected / 2)


def test_half_precisions_are_widened_and_others_kept():
    assert at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert at_least_float32(torch.ones(1, dtype=torch.float16)).dtype == torch.float32
    assert at_least_float32(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert lm_loss(torch.randn(3, 5).bfloat16(), torch.tensor([0, 1, 2]), 0.1).dtype == torch.float32


def test_the_losses_of_texts_are_sums_over_their_own_tokens():
    logits, targets = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3, 4, 5])
    found = text_losses(logits, targets, torch.tensor([0, 2, 2, 0, 3]), 4, 0.1)
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(found, torch.stack([each[0] + each[3], 0 * each[0], each[1] + each[2], each[4]]))
    likelihood = text_losses(logits, targets, torch.zeros(5, dtype=torch.long), 1, 0.0)
    torch.testing.assert_close(-likelihood[0], logits.log_softmax(1)[torch.arange(5), targets].sum())

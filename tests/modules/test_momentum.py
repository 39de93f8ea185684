"""The momentum encoder and the queue."""

from __future__ import annotations

import pytest
import torch

from blip.modules.momentum import MomentumEncoder, Queue
from tests.modules.small import pictures, small_model, texts


def online(model, name: str) -> torch.Tensor:
    """The online parameter that a momentum parameter follows."""
    kind, _, rest = name.partition(".")
    number, _, tail = rest.partition(".")
    state = dict(model.named_parameters(remove_duplicate=False))
    inside = {"self_attentions": "self_attention", "feed_forwards": "feed_forward"}
    if kind in inside:
        return state[f"med.encoder.{number}.{inside[kind]}.{tail}"]
    return state[f"med.{name}" if kind == "embeddings" else name]


def test_the_fused_update_is_the_formula_for_every_parameter():
    model = small_model()
    momentum = MomentumEncoder(model, dropout=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in momentum.parameters():
            p.add_(torch.randn_like(p))
    before = {name: p.clone() for name, p in momentum.named_parameters()}
    momentum.update(model, 0.9)
    for name, after in momentum.named_parameters():
        torch.testing.assert_close(
            after, 0.9 * before[name] + 0.1 * online(model, name), rtol=1e-12, atol=1e-12, msg=name
        )


def test_a_copy_gives_the_online_features_and_no_gradient():
    model = small_model()
    momentum = MomentumEncoder(model, dropout=True).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    momentum.copy_from(model)
    ids, layout = texts(5, 3)
    image, text = momentum(pictures(2), ids, layout)
    torch.testing.assert_close(image, model.image_features(model.visual_encoder(pictures(2))), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(text, model.text_features(ids, layout), rtol=1e-12, atol=1e-12)
    assert not image.requires_grad
    assert not any(p.requires_grad for p in momentum.parameters())


@pytest.mark.parametrize("acts", [True, False])
def test_dropout_of_the_momentum_encoder_is_a_choice(acts: bool):
    model = small_model(dropout=0.5)
    momentum = MomentumEncoder(model, dropout=acts).train()
    ids, layout = texts(5, 3)
    first, second = momentum(pictures(2), ids, layout)[1], momentum(pictures(2), ids, layout)[1]
    assert torch.equal(first, second) is not acts


@pytest.mark.parametrize("size", [1, 5, 8])
@pytest.mark.parametrize("batch", [1, 3, 5, 13])
def test_the_queue_holds_the_last_features_whatever_its_size_and_the_batches(size: int, batch: int):
    queue = Queue(size, 4)
    told: list[int] = []
    for step in range(6):
        ids = torch.arange(batch) + step * batch
        features = ids[:, None].expand(-1, 4).float()
        queue.enqueue(features, features + 0.5, ids)
        told += ids.tolist()
        last = told[-size:]
        held = sorted(i for i in queue.ids.tolist() if i >= 0)
        assert held == sorted(last)
        known = queue.ids >= 0
        assert torch.equal(queue.image[known, 0], queue.ids[known].float())
        assert torch.equal(queue.text[known, 0], queue.ids[known] + 0.5)
        assert queue.place == len(told) % size
        oldest_first = queue.ids.roll(-int(queue.place)).tolist()
        assert [i for i in oldest_first if i >= 0] == last


def test_a_queue_of_no_size_takes_everything_and_holds_nothing():
    queue = Queue(0, 4)
    queue.enqueue(torch.ones(3, 4), torch.ones(3, 4), torch.arange(3))
    assert queue.image.shape == (0, 4)


def test_the_queue_starts_with_unit_vectors_of_no_picture():
    queue = Queue(6, 4)
    torch.testing.assert_close(queue.image.norm(dim=1), torch.ones(6))
    assert queue.ids.tolist() == [-1] * 6

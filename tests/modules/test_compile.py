"""The image encoder and each mode of MED compile as one graph, and hardly again for texts of other lengths."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from blip.overrides import CONF
from tests.modules.small import pictures, small_model, texts
from tests.tasks.steps import batch, pairs, stepper


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("backend", "checkpoint"), [("eager", 0), ("aot_eager", 1)])
def test_each_part_is_one_graph_and_gives_the_same_gradients(backend: str, checkpoint: int):
    plain, compiled = (small_model(checkpoint_blocks=checkpoint).train() for _ in range(2))
    compiled.compile(partial(torch.compile, backend=backend, fullgraph=True))
    ids, layout = texts(5, 9, 3)
    gradients = []
    for model in (plain, compiled):
        states = model.visual_encoder(pictures(3))
        cross = model.med.look(states)
        features = model.text_features(ids, layout)
        decoded = model.med.lm_head(model.lm_states(ids, layout, cross))
        (features.sum() + model.itm_logits(ids, layout, cross).sum() + decoded.sin().sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert not counters["graph_break"]
    assert gradients[0].keys() == gradients[1].keys()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-11)


def test_the_option_compiles_a_task_whose_step_stays_the_same():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("config", ["compile=default"]).task.compile
    compiler = instantiate(node, backend="eager")
    assert compiler.func is torch.compile
    plain, compiled = stepper(), stepper()
    compiled.compile_with = compiler
    compiled.setup("fit")
    graphs = []
    for seed in range(3):  # texts of other lengths each
        losses = [task.training_step(batch(pairs(3, seed)), 0) for task in (plain, compiled)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-11)
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert graphs == [graphs[0]] * 3
    # the image encoder, and text, multimodal (one and two texts a picture), decoder
    assert graphs[0] == 5


def fifty() -> list[tuple[int, ...]]:
    """Lengths of the texts of 50 batches of 6."""
    draw = random.Random(0)
    return [tuple(draw.randint(3, 20) for _ in range(6)) for _ in range(50)]


@pytest.mark.parametrize("mode", ["text", "multimodal", "decoder"])
def test_fifty_batches_of_other_lengths_compile_at_most_twice_again(mode: str):
    model = small_model().train()
    counter = CompileCounterWithBackend("eager")
    model.compile(partial(torch.compile, backend=counter, fullgraph=True))
    looked_at = torch.randn(6, 17, 48, dtype=torch.float64)
    for lengths in fifty():
        ids, layout = texts(*lengths)
        if mode == "text":
            out = model.text_features(ids, layout)
        elif mode == "multimodal":
            out = model.itm_logits(ids, layout, model.med.look(looked_at))
        else:
            out = model.lm_states(ids, layout, model.med.look(looked_at))
        out.sum().backward()
    assert 1 <= counter.frame_count <= 3


def test_a_whole_step_told_that_lengths_vary_never_compiles_again():
    model = small_model().train()
    counter = CompileCounterWithBackend("eager")
    model.compile(partial(torch.compile, backend=counter, fullgraph=True, dynamic=True))
    counts = []
    for lengths in fifty()[:10]:
        ids, layout = texts(*lengths)
        cross = model.med.look(model.visual_encoder(pictures(6)))
        other = [kv.select(torch.arange(5, -1, -1)) for kv in cross]
        features, logits = model.text_features(ids, layout), model.itm_logits(ids, layout, other)
        (features.sum() + logits.sum() + model.lm_states(ids, layout, cross).sum()).backward()
        counts.append(counter.frame_count)
    assert counts == [4] * 10  # the image encoder, and text, multimodal, decoder

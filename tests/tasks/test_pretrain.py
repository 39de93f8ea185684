"""The pre-training step: two ranks equal one, hard cases of negatives, and what a step leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.tasks.steps import batch, pairs, stepper

STEPS, SIZE = 3, 3  # SIZE pairs a rank; image 0 of both ranks is one picture
IDS = [[0, 1, 2, 0, 4, 5], [6, 7, 8, 9, 1, 7], [3, 3, 3, 3, 3, 3]]


def run(rank: int, world: int, folder: str) -> None:
    """Three steps on this rank's part of each global batch; losses, gradients, queue and weights to a file."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    task = stepper(positives="image")
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.05)
    record: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        rows = pairs(2 * SIZE, seed=step, image_ids=IDS[step])
        task.step = step
        per_rank = len(rows) // world
        loss = task.training_step(batch(rows[rank * per_rank : (rank + 1) * per_rank]), step)
        optimizer.zero_grad()
        loss.backward()
        values = torch.stack([task.logged["itc"], task.logged["itm"], task.logged["lm"]]).double()
        if world > 1:
            for tensor in [values, *(p.grad for p in task.parameters() if p.grad is not None)]:
                dist.all_reduce(tensor)
                tensor /= world
        record[f"losses{step}"] = values
        record |= {f"grad{step}.{n}": p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}
        optimizer.step()
        task.after_step()
    record |= {f"state.{name}": value for name, value in task.state_dict().items()}
    torch.save(record, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_two_ranks_give_the_losses_gradients_and_queue_of_one(tmp_path: Path) -> None:
    mp.spawn(run, (2, str(tmp_path)), nprocs=2)
    run(0, 1, str(tmp_path))
    one, first, second = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert one.keys() == first.keys()
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(second[name], first[name], rtol=1e-12, atol=1e-12)


def test_pairs_of_one_picture_are_never_each_others_negatives() -> None:
    task = stepper(negatives="local", keys="local")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = task.model.itm_logits
    task.model.itm_logits = lambda ids, layout, cross: seen.append((ids, layout)) or original(ids, layout, cross)
    rows = pairs(4, seed=0, image_ids=[7, 7, 8, 7])
    for step in range(20):
        task.step = step
        seen.clear()
        task.training_step(batch(rows), step)
        ids, layout = seen[0]
        texts = layout.pad(ids)[1::2]  # the negative text of each picture
        own = [row[1][1:] for row in rows]
        for i, text in enumerate(texts.tolist()):
            negative = next(j for j, words in enumerate(own) if text[1 : 1 + len(words)] == words)
            assert rows[negative][2] != rows[i][2] or rows[i][2] == 8
    assert torch.isfinite(torch.stack(list(task.logged.values()))).all()


@pytest.mark.parametrize("image_ids", [[5], [5, 5, 5]])
def test_a_batch_without_any_negative_matches_its_pairs_alone(image_ids: list[int]) -> None:
    task = stepper()
    rows = batch(pairs(len(image_ids), seed=1, image_ids=image_ids))
    loss = task.training_step(rows, 0)
    loss.backward()
    with torch.no_grad():
        states = task.model.visual_encoder(rows.image)
        logits = task.model.itm_logits(rows.input_ids, rows.layout, task.model.med.look(states))
    expected = torch.nn.functional.cross_entropy(logits, torch.ones(len(image_ids), dtype=torch.long))
    torch.testing.assert_close(task.logged["itm"], expected)
    assert all(torch.isfinite(p.grad).all() for p in task.parameters() if p.grad is not None)


def test_the_queue_takes_all_micro_batches_of_a_step_and_momentum_moves_once() -> None:
    task = stepper(queue_size=7)
    before = [p.clone() for p in task.momentum.parameters()]
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(0.1)
    for micro in range(2):
        task.micro_batch = micro
        task.training_step(batch(pairs(3, seed=micro, image_ids=[3 * micro, 3 * micro + 1, 3 * micro + 2])), micro)
        assert (task.queue.ids == -1).all()
    task.after_step()
    assert task.queue.ids.tolist() == [0, 1, 2, 3, 4, 5, -1]
    moved = [(p - q).abs().max() for p, q in zip(task.momentum.parameters(), before, strict=True)]
    torch.testing.assert_close(torch.stack(moved), torch.full((len(moved),), 0.01, dtype=torch.float64))


def test_the_draws_depend_on_step_and_place_not_on_how_rows_are_dealt() -> None:
    task = stepper()
    first = task.uniform(4)
    assert torch.equal(first, task.uniform(4))
    task.step = 1
    assert not torch.equal(first, task.uniform(4))

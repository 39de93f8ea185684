"""The order of the stream is a function of numbers, and gives every pair its one place."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from blip.datamodules.plan import (
    Cursor,
    EvaluationSampler,
    Phase,
    Plan,
    Source,
    TrainSampler,
    draw,
    generator,
    permutation,
)

SIZES = [7, 31, 12, 1, 25, 40, 18, 9, 22, 35]  # 200 pairs in 10 unequal shards


def one(seed: int = 0, window: int = 50, sizes: list[int] = SIZES) -> Plan:
    return Plan([Source("only", np.array(sizes))], seed, window)


def order(plan: Plan, epoch: int) -> list[tuple[int, int]]:
    sources, units = plan.resolve(epoch, np.arange(plan.pairs))
    return list(zip(sources.tolist(), units.tolist(), strict=True))


def history(plan: Plan, layouts: list[tuple[int, int, int]], steps: int) -> list[tuple[int, int]]:
    """(epoch, position) of all ranks' keys in order, going on with another (ranks, batch, steps) layout after each stop."""
    cursor, seen = Cursor(), []
    for ranks, batch, stop in layouts:
        while stop and steps:
            loaders = [iter(TrainSampler(plan.pairs, batch, rank, ranks, cursor)) for rank in range(ranks)]
            for keys in zip(*loaders, strict=True):
                seen += [(key.epoch, key.position) for rank_keys in keys for key in rank_keys]
                cursor.epoch, cursor.pairs = keys[0][0].epoch, keys[0][0].stop
                stop, steps = stop - 1, steps - 1
                if not (stop and steps):
                    break
    return seen


def test_permutation_is_the_same_in_every_version_and_process():
    assert permutation(10, 0, 1, "window").tolist() == [4, 6, 0, 7, 5, 2, 8, 9, 3, 1]
    assert draw(1000, 3, 1, 4, "text") == 621


def test_draws_differ_by_each_part_of_their_key():
    keys = [(0, 0, 0, "crop"), (1, 0, 0, "crop"), (0, 1, 0, "crop"), (0, 0, 1, "crop"), (0, 0, 0, "text")]
    assert len({generator(*key).integers(1 << 40) for key in keys}) == 5
    assert generator(*keys[0]).random() == generator(*keys[0]).random()


@pytest.mark.parametrize("window", [1, 50, 10_000])
def test_each_pair_comes_once_an_epoch_in_an_order_new_each_epoch(window):
    plan = one(window=window)
    first, second = order(plan, 0), order(plan, 1)
    assert sorted(first) == sorted(second) == [(0, unit) for unit in range(200)]
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 20
    assert order(one(window=window), 1) == second, "an epoch can be asked for without those before it"
    assert order(one(seed=1, window=window), 0) != first


def test_positions_resolve_the_same_alone_and_together():
    plan = one()
    together = order(plan, 3)
    alone = [(int(s[0]), int(u[0])) for s, u in (one().resolve(3, np.array([p])) for p in range(0, 200, 17))]
    assert alone == together[::17]
    backwards = plan.resolve(3, np.arange(200)[::-1])
    assert list(zip(*(part.tolist() for part in backwards), strict=True)) == together[::-1]


def test_a_batch_mixes_the_shards_of_its_window():
    plan = one(window=100)
    _, units = plan.resolve(0, np.arange(32))
    assert len(set(np.searchsorted(np.cumsum(SIZES), units, side="right"))) >= 4


@pytest.mark.parametrize(("ranks", "batch"), itertools.product([1, 2, 3, 4], [1, 5, 8]))
def test_every_rank_takes_the_same_steps_and_no_pair_is_taken_twice(ranks, batch):
    plan = one()
    samplers = [TrainSampler(plan.pairs, batch, rank, ranks, Cursor()) for rank in range(ranks)]
    taken = [[keys for keys in sampler] for sampler in samplers]
    assert {len(keys) for keys in taken} == {len(sampler) for sampler in samplers} == {200 // (ranks * batch)}
    positions = [key.position for rank in taken for keys in rank for key in keys]
    assert sorted(positions) == list(range(200 // (ranks * batch) * ranks * batch)), (
        "the rest is less than a global batch"
    )


def test_ranks_and_batch_do_not_change_the_sequence_of_global_batches():
    plan = one()
    assert history(plan, [(1, 16, 30)], 30) == history(plan, [(2, 8, 30)], 30) == history(plan, [(4, 4, 30)], 30)


@pytest.mark.parametrize("stop", [1, 5, 11, 12, 13, 20])
@pytest.mark.parametrize(("ranks", "batch"), [(1, 16), (2, 8), (4, 4)])
def test_going_on_after_a_stop_continues_at_the_next_unseen_pair(stop, ranks, batch):
    plan = one()  # 12 steps an epoch
    assert history(plan, [(1, 16, stop), (ranks, batch, 30)], 30) == history(plan, [(1, 16, 30)], 30)


def test_another_global_batch_goes_on_without_repeating_or_missing_a_pair():
    plan = one()
    seen = [p for e, p in history(plan, [(1, 16, 3), (3, 7, 2), (2, 5, 100)], 5 + 11) if e == 0]
    assert seen == list(range(len(seen)))
    assert 200 - len(seen) < 10


def test_length_is_that_of_the_whole_epoch_wherever_it_begins():
    plan = one()
    for pairs, steps in [(0, 12), (16, 12), (160, 12), (191, 12), (7, 12)]:
        sampler = TrainSampler(plan.pairs, 16, 0, 1, Cursor(2, pairs))
        assert len(sampler) == steps
        assert len(list(sampler)) == (12 if 200 - pairs < 16 else (200 - pairs) // 16)


def test_fewer_pairs_than_a_global_batch_are_refused():
    with pytest.raises(ValueError, match="fewer than one step of"):
        TrainSampler(31, 16, 0, 2, Cursor())


@pytest.mark.parametrize(("pictures", "batch", "ranks"), itertools.product([1, 10, 33], [1, 4, 16], [1, 2, 3]))
def test_evaluation_shows_each_picture_once_on_one_rank_in_file_order(pictures, batch, ranks):
    samplers = [EvaluationSampler(pictures, batch, rank, ranks) for rank in range(ranks)]
    shown = [[p for keys in sampler for p in keys] for sampler in samplers]
    assert all(part == sorted(part) for part in shown)
    assert sorted(p for part in shown for p in part) == list(range(pictures))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]


# several sources


def two(**options) -> Plan:
    first, second = Source("human", np.array([100, 200])), Source("web", np.array([50, 300, 250]), **options)
    return Plan([first, second], 0, 64)


def test_sources_are_mixed_in_proportion_and_each_pair_comes_once():
    plan = two()
    seen = order(plan, 2)
    assert sorted(seen) == [(0, u) for u in range(300)] + [(1, u) for u in range(600)]
    shares = [sum(source for source, _ in seen[at : at + 90]) / 90 for at in range(0, 900, 90)]
    assert min(shares) > 0.5, shares
    assert max(shares) < 0.85, shares


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({"epochs": 2.0}, [300, 1200]),
        ({"epochs": 0.2}, [300, 120]),
        ({"weight": 0.25}, [300, 100]),
        ({"weight": 0.75}, [300, 900]),
    ],
)
def test_epochs_and_weight_set_the_pairs_of_a_source(options, pairs):
    plan = two(**options)
    assert plan.pairs_by_source == pairs
    assert np.bincount([source for source, _ in order(plan, 1)]).tolist() == pairs


def test_weights_alone_end_an_epoch_when_the_first_source_is_through():
    parts = [Source("a", np.array([100]), weight=3), Source("b", np.array([100]), weight=1)]
    assert Plan(parts, 0).pairs_by_source == [100, 33]


def test_a_fifth_each_epoch_in_rotation_shows_every_pair_once_in_five_epochs():
    plan = two(epochs=0.2)
    parts = np.array([[unit for source, unit in order(plan, epoch) if source == 1] for epoch in range(10)])  # [10, 120]
    for rotation in parts[:5], parts[5:]:
        assert sorted(rotation.ravel().tolist()) == list(range(600))
    assert (parts[0] != parts[5]).any()


def test_more_pairs_than_a_block_are_resolved_in_every_block():
    plan = Plan([Source("a", np.array([9000])), Source("b", np.array([3000, 1500]))], 0, 2000)
    assert sorted(order(plan, 0)) == [(0, u) for u in range(9000)] + [(1, u) for u in range(4500)]


def test_phases_draw_from_their_shards_until_their_share_of_the_run():
    phases = (Phase(0.25, (0,)), Phase(0.5, (0, 1)), Phase(1.0, (0, 1, 2)))
    plan = Plan([Source("human", np.array([40, 30, 30]), phases=phases)], 0, 16, total_pairs=400)
    run = [unit for epoch in range(4) for _, unit in order(plan, epoch)]
    assert set(run[:100]) == set(range(40))
    assert np.bincount(run[:80]).tolist() == [2] * 40, "a phase goes through its shards pass by pass"
    assert set(run[100:200]) == set(range(70))
    assert set(run[200:]) == set(range(100))
    assert sorted(run[200:300]) == sorted(run[300:]) == list(range(100))


def test_a_source_without_phases_is_not_touched_by_the_phases_of_another():
    phases = (Phase(0.5, (0,)), Phase(1.0, (0, 1)))
    plan = Plan(
        [Source("easy", np.array([50, 50]), phases=phases), Source("all", np.array([60, 40]))], 0, 16, total_pairs=400
    )
    first, second = order(plan, 0), order(plan, 1)
    for epoch in (first, second):
        assert sorted(unit for source, unit in epoch if source == 1) == list(range(100))
    assert (
        max(unit for source, unit in first if source == 0) < 50 <= max(unit for source, unit in second if source == 0)
    )


@pytest.mark.parametrize(
    ("phases", "total", "said"),
    [
        ((Phase(1.0, (0,)),), None, "total_pairs"),
        ((Phase(0.5, (0,)), Phase(0.9, (0,))), 100, "until: 1.0"),
        ((Phase(0.5, (0,)), Phase(0.4, (0,)), Phase(1.0, (0,))), 100, "must rise"),
    ],
)
def test_phases_that_say_too_little_are_refused(phases, total, said):
    with pytest.raises(ValueError, match=said):
        Plan([Source("human", np.array([10]), phases=phases)], 0, 16, total)


@pytest.mark.parametrize("options", [{"weight": 1.0}, {"weight": -1.0}, {"epochs": 0.0}, {"epochs": 0.0001}])
def test_sources_that_give_nothing_are_refused(options):
    with pytest.raises(ValueError, match=r"weight|no pair"):
        two(**options)


@pytest.mark.parametrize("names", [("a", "a"), ("a b", "c"), ("seed=1", "c"), ("", "c")])
def test_sources_without_a_name_of_their_own_are_refused(names):
    with pytest.raises(ValueError, match="sources need names"):
        Plan([Source(name, np.array([10])) for name in names], 0)


def test_what_is_fetched_ahead_is_the_next_window_also_over_the_end_of_an_epoch():
    plan = one()
    starts = [p for p in range(1, 200) if plan.ahead(0, p) != plan.ahead(0, p - 1)]
    for position, following in zip([0, *starts], [*starts, 200], strict=True):
        epoch, at = (0, following) if following < 200 else (1, 0)
        (_, shards), *_ = plan.ahead(0, position)
        _, units = plan.resolve(epoch, np.arange(at, at + 10))
        assert set(np.searchsorted(np.cumsum(SIZES), units, side="right")) <= set(shards)


def test_fingerprint_tells_seed_window_data_and_amounts():
    base = two().fingerprint
    assert two().fingerprint == base
    others = [two(epochs=2.0), two(weight=0.5), two(fingerprint="x")]
    assert len({base, *(plan.fingerprint for plan in others)}) == 4
    assert "seed=0" in base
    assert "window=64" in base


def test_a_large_plan_costs_little():
    plan = Plan([Source("laion", np.full(10_000, 1000))], 0, 65536)
    _, units = plan.resolve(7, np.arange(5_000_000, 5_000_064))
    assert len(set(units.tolist())) == 64
    assert sum(len(entry.shards) for key, entry in plan._memory.items() if key[0] == "pass") == 10_000

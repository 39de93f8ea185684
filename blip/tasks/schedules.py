"""Learning-rate schedules: (step, total_steps, steps_per_epoch) -> factor of the peak rate. Steps are optimizer steps from 0.

`released` and `cosine_by_epoch` are what the released code did in pre-training and in fine-tuning: the rate is constant
within an epoch, and warm-up exists in epoch 0 only, so that a data set with fewer steps than the warm-up never meets the
peak. `paper` and `cosine` are the same curves by step, for any size of data.
"""

from __future__ import annotations

import math


def released(
    step: int,
    total_steps: int,
    steps_per_epoch: int,
    *,
    warmup_steps: int,
    start: float,
    decay: float,
    floor: float,
) -> float:
    """Linear from `start` to 1 over `warmup_steps` of epoch 0, then `decay` ** epoch, at least `floor` (released code)."""
    epoch = step // steps_per_epoch
    if epoch == 0:
        return warm_up(step, warmup_steps, start)
    return max(floor, decay**epoch)


def paper(
    step: int,
    total_steps: int,
    steps_per_epoch: int,
    *,
    warmup_share: float,
    start: float,
    decay: float,
    epochs: int,
    floor: float,
) -> float:
    """As `released`, by share of the run: warm-up over `warmup_share`, then as much decay as `epochs` epochs bring."""
    warmup_steps = round(warmup_share * total_steps)
    if step < warmup_steps:
        return warm_up(step, warmup_steps, start)
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(floor, decay ** (epochs * share))


def cosine(
    step: int, total_steps: int, steps_per_epoch: int, *, warmup_share: float, start: float, floor: float
) -> float:
    """Linear from `start` to 1 over `warmup_share` of the run, then half a cosine down to `floor` at its end."""
    warmup_steps = round(warmup_share * total_steps)
    if step < warmup_steps:
        return warm_up(step, warmup_steps, start)
    share = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


def cosine_by_epoch(step: int, total_steps: int, steps_per_epoch: int, *, floor: float) -> float:
    """Half a cosine over the epochs of the run, constant within each (released code)."""
    epochs = max(1, round(total_steps / steps_per_epoch))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step // steps_per_epoch) / epochs))


def warm_up(step: int, warmup_steps: int, start: float) -> float:
    """Linear from `start` at step 0 to 1 at `warmup_steps`."""
    return min(1.0, start + (1 - start) * step / warmup_steps) if warmup_steps else 1.0

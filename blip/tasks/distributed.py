"""What tasks exchange between ranks; with one rank each function gives back what it was given."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """[B, ...] of every rank, in rank order, [world * B, ...]; no gradient."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # every rank's loss may use this rank's rows
        return gradient.chunk(world_size())[rank()]


def gather_with_gradient(x: Tensor) -> Tensor:
    """[B, ...] of every rank, [world * B, ...]; each rank's rows receive the gradients of all ranks, summed."""
    return x if world_size() == 1 else _GatherWithGradient.apply(x)


@torch.no_grad()
def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a number over the ranks; dividing each rank's sum by the mean count makes averaged gradients exact."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / world_size()

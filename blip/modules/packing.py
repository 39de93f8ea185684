"""On a CPU in bf16: matrices laid out once for products with few rows, which is what decoding token by token is made of.

A plain product lays the whole matrix out anew at each call: for eight rows that is a third of its time (benchmarks/generate.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
ROWS = 8  # what the layout is made for; it serves any number

_laid_out: WeakKeyDictionary[nn.Linear, tuple[tuple, Tensor, Tensor | None]] = WeakKeyDictionary()


@contextmanager
def packed(linears: Iterable[nn.Linear]) -> Iterator[None]:
    """Within it the linear layers multiply in bf16 by copies of their matrices; of layers that are not trained they are kept."""
    linears = [linear for linear in linears if AVAILABLE]
    for linear in linears:
        linear.forward = partial(_product, *_layout(linear))  # type: ignore[method-assign]
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _layout(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    weight, bias = linear.weight.detach(), linear.bias
    if linear.weight.requires_grad:  # fused optimizers change it and leave its version as it was
        return _copies(weight, bias)
    state = (weight.data_ptr(), weight.dtype, None if weight.is_inference() else weight._version)
    kept = _laid_out.get(linear)
    if kept is None or kept[0] != state:
        kept = _laid_out[linear] = (state, *_copies(weight, bias))
    return kept[1:]


def _copies(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    matrix = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), ROWS)
    return matrix, None if bias is None else bias.detach().bfloat16()


def _product(matrix: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), matrix, bias, "none", [], "")

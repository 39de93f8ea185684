"""The one function that attends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: [B, H, Lq, d] from keys and values [B, H, Lk, d].

    `mask` (True: may be looked at) broadcasts to [B, H, Lq, Lk]; `causal` hides later keys, the last query seeing all.
    """
    if query.shape[-2] == 1:  # the last one, which sees all
        causal = False
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # The fused kernel's backward in bf16 on CPU is several times slower than the products written out.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # [B, H, Lq, Lk]
        if causal:
            rows, columns = scores.shape[-2:]
            past = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril(columns - rows)
            mask = past if mask is None else mask & past
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(-1)
        return (F.dropout(weights, dropout) if dropout > 0 else weights) @ value
    if causal and query.shape[-2] != key.shape[-2]:  # some keys come from a cache
        rows, columns = query.shape[-2], key.shape[-2]
        past = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
        mask, causal = (past if mask is None else mask & past), False
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=causal)

"""The one function that attends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# On a CPU in bf16: memory larger than this the allocator gives back each time, and the kernel clears it anew at the next call.
SCORES_AT_ONCE = 2**23


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: [B, H, Lq, d] from keys and values [B, H, Lk, d].

    `mask` (True: may be looked at) broadcasts to [B, H, Lq, Lk]; `causal` hides later keys, the last query seeing all.
    """
    if query.shape[-2] == 1:  # the last one, which sees all
        causal = False
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        at_once = max(1, SCORES_AT_ONCE // (query[0, ..., 0].numel() * key.shape[-2]))
        if at_once < query.shape[0] and not torch.is_grad_enabled():
            whole = None if mask is None else mask.expand(*query.shape[:-1], key.shape[-2])
            parts = [x.split(at_once) for x in (query, key, value)]
            masks = [None] * len(parts[0]) if whole is None else whole.split(at_once)
            found = [attend(q, k, v, m, causal, dropout) for q, k, v, m in zip(*parts, masks, strict=True)]
            return torch.cat(found)
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

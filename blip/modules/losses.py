"""The three objectives of BLIP (paper section 3.2) as functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions widened: similarities, targets and losses are never computed in less than float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def match_targets(row_ids: Tensor, column_ids: Tensor, own: Tensor, positives: str, dtype: torch.dtype) -> Tensor:
    """What ITC takes for a match, rows of [B, K] summing to 1.

    `row_ids` [B] and `column_ids` [K] say which picture a row and a column show, `own` [B] which column is the row's own
    pair. `positives`: `pair` (pre-training as released: other captions of the same picture are negatives) or `image`
    (retrieval: every column that shows the row's picture, equally).
    """
    if positives == "pair":
        return F.one_hot(own, column_ids.shape[0]).to(dtype)
    same = (row_ids[:, None] == column_ids[None]).to(dtype)
    return same / same.sum(1, keepdim=True)


def soft_targets(targets: Tensor, momentum_similarity: Tensor, alpha: float) -> Tensor:
    """y = alpha softmax(momentum similarity) + (1 - alpha) targets, [B, K]; ALBEF's soft labels, no gradient."""
    return alpha * momentum_similarity.detach().softmax(1) + (1 - alpha) * targets


def itc_loss(image_similarity: Tensor, text_similarity: Tensor, image_targets: Tensor, text_targets: Tensor) -> Tensor:
    """Image-text contrastive loss: 1/2 [mean_i H(y_i2t, softmax s_i2t) + mean_i H(y_t2i, softmax s_t2i)].

    Similarities (already divided by the temperature) of features with the keys of the other side, targets alike, [B, K].
    """
    image_loss = -(image_targets * image_similarity.log_softmax(1)).sum(1).mean()
    text_loss = -(text_targets * text_similarity.log_softmax(1)).sum(1).mean()
    return (image_loss + text_loss) / 2


def negative_weights(similarity: Tensor, admissible: Tensor, floor: float) -> Tensor:
    """How likely each column is drawn as a hard negative of its row, [B, K], not normalised (ALBEF section 3.2).

    softmax of the similarities, plus `floor` (pre-training: 1e-4), zero where the pair is not admissible.
    """
    return (similarity.detach().softmax(1) + floor).masked_fill(~admissible, 0.0)


def draw(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One column a row by inverse transform: the first i with cumsum(w)_i > u * sum(w); no wait for the device.

    weights [B, K], uniform [B] in [0, 1). Returns the columns [B] and whether the row had anything to draw [B].
    """
    cumulative = weights.cumsum(1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    column = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    # Rounding may carry the threshold to the sum itself: take the last column that has any weight.
    last = weights.shape[1] - 1 - (weights.flip(1) > 0).to(torch.uint8).argmax(1)
    return torch.minimum(column, last), weights.sum(1) > 0


def itm_loss(logits: Tensor, matched: Tensor, valid: Tensor, count: Tensor | None = None) -> Tensor:
    """Image-text matching: cross-entropy of logits [M, 2] with matched [M], over the valid rows [M].

    `count`: what to divide by, the number of valid rows unless given (several ranks divide by their common mean).
    """
    losses = F.cross_entropy(logits, matched.long(), reduction="none")
    return (losses * valid).sum() / (valid.sum() if count is None else count).clamp(min=1)


def lm_loss(logits: Tensor, targets: Tensor, smoothing: float, count: Tensor | None = None) -> Tensor:
    """Language modelling: label-smoothed cross-entropy of logits [M, V] with the next tokens [M], mean over tokens.

    `count`: what to divide by, M unless given.
    """
    loss = F.cross_entropy(at_least_float32(logits), targets, reduction="sum", label_smoothing=smoothing)
    return loss / (max(targets.shape[0], 1) if count is None else count)


def text_losses(logits: Tensor, targets: Tensor, text: Tensor, texts: int, smoothing: float) -> Tensor:
    """Label-smoothed cross-entropy summed over the tokens of each text, [R]: -log P of the text where nothing is smoothed.

    logits [M, V] and next tokens [M] as in `lm_loss`, `text` [M] the text that each belongs to, of `texts`.
    """
    losses = F.cross_entropy(at_least_float32(logits), targets, reduction="none", label_smoothing=smoothing)
    return losses.new_zeros(texts).index_add(0, text, losses)

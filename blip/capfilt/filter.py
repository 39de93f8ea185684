"""The filters of CapFilt (paper section 3.3): how well each text of a picture fits it, the web's and the synthetic ones alike.

A scorer has `columns` (what it finds), `fingerprint`, `image_size` and `score(pixels, texts)`, which gives for every picture
[S, S, 3] uint8 (RGB) and each of its texts, however many, one number for each column. What is kept is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import numpy as np
import torch

from blip.api import TEXTS_AT_ONCE, load


class MatchScorer:
    """Probability by ITM and cosine by ITC, by the model of a checkpoint: ours, a released `.pth` or transformers'.

    tokenizer, device, precision: as `blip.load` has them. texts_at_once: how many texts go through the model together at most.
    Texts are cleaned and cut as the checkpoint's own run does. ValueError: it has no heads for ITM and ITC.
    """

    columns = ("itm", "itc")

    def __init__(
        self,
        checkpoint: str | PathLike[str],
        tokenizer: str | PathLike[str] | None = None,
        device: str | torch.device | None = None,
        precision: str = "float32",
        texts_at_once: int = TEXTS_AT_ONCE,
    ) -> None:
        self.model, self.texts_at_once = load(checkpoint, tokenizer, device, precision), texts_at_once
        self.model.needs("ITM head", "ITC projections")
        self.image_size, self.fingerprint = self.model.image_size, self.model.identity

    def score(self, pixels: Sequence[np.ndarray], texts: Sequence[Sequence[str]]) -> list[list[tuple[float, float]]]:
        """(itm, itc) of each text; a picture is encoded once, whatever the number of its texts."""
        found = self.model.score(pixels, texts, self.texts_at_once)
        return [[(each.probability, each.cosine) for each in row] for row in found]

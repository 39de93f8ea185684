"""The captioner of CapFilt (paper section 3.3): texts of its own for pictures of the web."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch

from blip.api import PAPER, load

WAY = {"strategy": "nucleus", "top_p": 0.9, "samples": 1}  # the paper's: section 6.2, table 2


@dataclass(frozen=True)
class Written:
    """A text without its prompt; the sum of its tokens' log-probabilities and their number, both with the end."""

    text: str
    log_prob: float
    tokens: int


class Captioner:
    """Writes `samples` texts of each picture with the model of a checkpoint: ours, a released `.pth` or transformers'.

    tokenizer, device, precision: as `blip.load` has them. prompt: by default the one that the model was trained with.
    decoding: nucleus sampling with p = 0.9 as in the paper, else as the checkpoint's own run writes (lengths, repetition), but
    for what is given. ValueError: the checkpoint has no decoder of pictures, or a name or value of decoding is none.
    """

    def __init__(
        self,
        checkpoint: str | PathLike[str],
        tokenizer: str | PathLike[str] | None = None,
        prompt: str | None = None,
        device: str | torch.device | None = None,
        precision: str = "float32",
        **decoding: Any,
    ) -> None:
        self.model = load(checkpoint, tokenizer, device, precision)
        self.model.needs("text decoder")
        self.prompt = self.model.prompt if prompt is None else prompt
        wanted = WAY | decoding
        if wanted["strategy"] == "beam" and self.model.decoding().strategy != "beam":
            wanted = {"beams": PAPER["beams"]} | wanted
        self.how = self.model.decoding(**wanted)
        self.decoding = {**asdict(self.how), "prompt": self.prompt}
        self.image_size, self.samples, self.fingerprint = self.model.image_size, self.how.samples, self.model.identity

    def write(self, pixels: Sequence[np.ndarray], seeds: Sequence[int]) -> list[list[Written]]:
        """The texts of pictures [S, S, 3] uint8 (RGB), S = image_size; each depends on picture and seed alone."""
        if not pixels:
            return []
        said = self.model.write(pixels, seeds, self.prompt, self.how)
        return [[Written(each.text, each.log_prob, len(each.token_log_probs)) for each in row] for row in said]

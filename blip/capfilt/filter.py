"""The filters of CapFilt (paper section 3.3): how well each text of a picture fits it, the web's and the synthetic ones alike.

A scorer has `columns` (what it finds), `fingerprint`, `image_size` and `score(pixels, texts)`, which gives for every picture
[S, S, 3] uint8 (RGB) and each of its texts, however many, one number for each column. What is kept is decided elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blip.api import TEXTS_AT_ONCE, load
from blip.loaded import device_of

READ = (".safetensors", ".json", ".txt", ".model", ".jinja")  # of a folder of transformers


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


class ClipScorer:
    """Cosine by a CLIP-like model of transformers (CLIP, SigLIP, AltCLIP ...) from a local folder: weights, tokenizer, processor.

    Nothing is fetched, no code of the folder is run, and weights are read as safetensors alone. device: by default the GPU where
    there is one. precision: `float32` or `bfloat16`, of the whole model. texts_at_once: how many are encoded together at most.
    Pictures come as squares, the whole of each; texts as they are, cut to the model's length. ValueError: no such folder.
    """

    columns = ("cosine",)

    def __init__(
        self,
        folder: str | PathLike[str],
        device: str | torch.device | None = None,
        precision: str = "float32",
        texts_at_once: int = TEXTS_AT_ONCE,
    ) -> None:
        import transformers

        self.folder, self.device, self.texts_at_once = Path(folder), device_of(device), texts_at_once
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be float32 or bfloat16, not {precision!r}")
        if not (self.folder / "config.json").is_file() or not [*self.folder.glob("*.safetensors")]:
            raise ValueError(
                f"{self.folder}: not a folder of transformers with config.json and weights as .safetensors; "
                "save_pretrained of model, tokenizer and image processor writes one"
            )
        local = {"local_files_only": True, "trust_remote_code": False}
        auto: Any = transformers
        try:
            network = auto.AutoModel.from_pretrained(
                self.folder, use_safetensors=True, dtype=getattr(torch, precision), **local
            )
            self.tokenizer = auto.AutoTokenizer.from_pretrained(self.folder, **local)
            self.processor = auto.AutoImageProcessor.from_pretrained(self.folder, **local)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ValueError(
                f"{self.folder}: transformers cannot read its model, tokenizer or image processor: {error}"
            ) from error
        if not (hasattr(network, "get_image_features") and hasattr(network, "get_text_features")):
            raise ValueError(f"{self.folder}: a {type(network).__name__} has no features that pictures and texts share")
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.image_size = int(network.config.vision_config.image_size)
        self.longest = int(network.config.text_config.max_position_embeddings)
        self.padding = (
            "max_length" if network.config.model_type.startswith("siglip") else "longest"
        )  # as it was trained
        self.fingerprint = _digest([*self.folder.iterdir()], precision)

    @torch.inference_mode()
    def score(self, pixels: Sequence[np.ndarray], texts: Sequence[Sequence[str]]) -> list[list[tuple[float]]]:
        """(cosine,) of each text."""
        row = [n for n, each in enumerate(texts) for _ in each]
        if not row:
            return [[] for _ in texts]
        seen = self.processor(images=list(pixels), return_tensors="pt", input_data_format="channels_last")
        image = _unit(
            self.network.get_image_features(seen["pixel_values"].to(self.device, self.network.dtype))
        )  # [B, E]
        told, features = [text for each in texts for text in each], []
        for start in range(0, len(told), self.texts_at_once):
            some = told[start : start + self.texts_at_once]
            ids = self.tokenizer(
                some, padding=self.padding, truncation=True, max_length=self.longest, return_tensors="pt"
            )
            features.append(_unit(self.network.get_text_features(**ids.to(self.device))))
        cosines = iter((image[torch.tensor(row, device=self.device)] * torch.cat(features)).sum(1).tolist())
        return [[(next(cosines),) for _ in each] for each in texts]


def _unit(found: Any) -> Tensor:
    """Features [R, E], or the output of transformers that holds them, to unit vectors, float32."""
    return F.normalize(getattr(found, "pooler_output", found).float(), dim=-1)


def _digest(files: Sequence[Path], precision: str) -> str:
    """A digest of the contents of those files that a model is read from."""
    digest = hashlib.blake2b(precision.encode(), digest_size=16)
    for path in sorted(path for path in files if path.suffix in READ and path.is_file()):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()

"""A checkpoint ready for use: its network, and pictures and words brought into the form that it takes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
import PIL.Image
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from blip.datamodules.files import Place
from blip.datamodules.images import ImageError, decode, resize_square
from blip.layout import TextLayout
from blip.modules.blip import BLIP
from blip.modules.checkpoint import Weights, load, sizes
from blip.modules.names import part
from blip.modules.vit import normalize
from blip.modules.vqa import VQA
from blip.text import Tokenizer, clean_caption

Picture = str | PathLike[str] | bytes | PIL.Image.Image | np.ndarray

MAX_WORDS, MAX_TOKENS = 30, 35  # of a text, where the checkpoint does not say


def device_of(device: str | torch.device | None) -> torch.device:
    """The device that is named, by default the GPU where there is one. ValueError where it cannot be had."""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=chosen).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {chosen!r} cannot be had here: {str(error).splitlines()[0]}") from error


class Loaded:
    """Weights in their network, on a device; `parts` are those of the checkpoint, in words.

    fingerprint: a digest of the weights, equal for equal models, whatever their file is called. precision: `float32`, or
    `bfloat16` for the network's products. ValueError: another vocabulary than the weights were trained with.
    """

    def __init__(self, weights: Weights, tokenizer: Tokenizer, device: torch.device, precision: str) -> None:
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be float32 or bfloat16, not {precision!r}")
        self.path, self.tokenizer, self.device, self.precision = weights.path, tokenizer, device, precision
        self.config = OmegaConf.create(weights.config)
        heads = self.said("model.vit.heads"), self.said("model.med.heads")
        config = sizes(weights.tensors, weights.heads or (None if None in heads else heads))
        if config.med.vocab_size != len(tokenizer):
            raise ValueError(
                f"{weights.path} has {config.med.vocab_size} pieces and the vocabulary {len(tokenizer)}: give the one that the "
                "model was trained with"
            )
        config = replace(config, dec_id=tokenizer.dec_id, enc_id=tokenizer.enc_id)
        self.parts = {part(name) for name in weights.tensors}
        answers = {"text encoder", "text decoder"} <= self.parts and "ITM head" not in self.parts
        self.network: Any = (
            VQA(config) if answers else BLIP(config, "ITM head" in self.parts, "text decoder" in self.parts)
        )
        self.report = load(self.network, weights)
        self.fingerprint = _digest(self.network)
        if precision == "bfloat16":
            _halve(self.network)
        self.network.to(device).eval().requires_grad_(False)
        self.image_size = config.vit.image_size

    @cached_property
    def identity(self) -> str:
        """A digest of all that decides what it says of a picture but decoding: weights, vocabulary, limits of texts, precision."""
        limits = [str(self.said(f"data.{name}")) for name in ("max_words", "max_tokens")]
        told = "\n".join([self.fingerprint, self.precision, *limits, self.tokenizer.to_json()])
        return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()

    def needs(self, *parts: str) -> None:
        """ValueError that names the parts which the checkpoint lacks; a text decoder is one that looks at pictures."""
        if lacking := [words for words in parts if words not in self.parts]:
            raise ValueError(f"{self.path} has no {', no '.join(lacking)}, which this needs")
        if "text decoder" in parts and isinstance(self.network, VQA):
            raise ValueError(f"{self.path} answers questions: its decoder looks at questions, not at pictures")

    def said(self, key: str) -> Any:
        """A value of the checkpoint's config, references followed; None where there is none."""
        value = OmegaConf.select(self.config, key)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value

    def quietly(self) -> AbstractContextManager[Any]:
        """Without gradients, in the model's precision."""
        stack = ExitStack()
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"))
        return stack

    def states(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """What texts look at: [B, N, D] of pictures [S, S, 3] uint8."""
        image = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)  # [B, 3, S, S] uint8
        return self.network.visual_encoder(normalize(image.to(self.device)))

    def pixels(self, picture: Picture | Place) -> np.ndarray:
        """A picture as the model sees it: the whole of it as a square, [S, S, 3] uint8. ValueError names what is none."""
        if isinstance(picture, str | PathLike):
            picture = Place(os.fspath(picture), os.fspath(picture))
        if isinstance(picture, Place):
            place = picture
            try:
                picture = decode(place.read())
            except ImageError as error:
                raise ValueError(f"{place.name}: {error}") from error
        elif isinstance(picture, bytes):
            picture = decode(picture)
        elif isinstance(picture, PIL.Image.Image):
            picture = np.array(picture.convert("RGB"))
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"an array must be [H, W, 3] uint8 (RGB), not {list(picture.shape)} {picture.dtype}")
        square = (self.image_size, self.image_size, 3)
        return picture if picture.shape == square else resize_square(np.ascontiguousarray(picture), self.image_size)

    def packed(
        self, texts: list[str], clean: Callable[[str, int], str] = clean_caption, max_words: int = MAX_WORDS
    ) -> tuple[Tensor, TextLayout]:
        """The ids of all texts one after another, [T] on the device, and where they sit."""
        ids = self.encode(texts, clean, max_words)
        packed = torch.tensor([i for text in ids for i in text], device=self.device)
        return packed, TextLayout.from_lengths([len(text) for text in ids]).to(self.device)

    def encode(
        self, texts: list[str], clean: Callable[[str, int], str] = clean_caption, max_words: int = MAX_WORDS
    ) -> list[list[int]]:
        """Ids of each text, `[CLS] ... [SEP]`, cleaned and cut as the checkpoint's own run does."""
        words, tokens = self.said("data.max_words") or max_words, self.said("data.max_tokens") or MAX_TOKENS
        return self.tokenizer.encode([clean(text, words) for text in texts], tokens)


def _digest(network: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _halve(network: nn.Module) -> None:
    """Holds what autocast multiplies with in bfloat16, so that it is not rounded anew at each call, and at each token."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.bfloat16(), requires_grad=False))

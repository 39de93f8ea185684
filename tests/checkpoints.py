"""Checkpoints of small random models over a real vocabulary, and pictures to show them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from blip.modules.blip import BLIP, BLIPConfig
from blip.modules.checkpoint import nodes
from blip.modules.vqa import VQA
from blip.text import Tokenizer
from tests.modules.small import small_config

VOCABULARY = Path(__file__).parent / "golden_cases" / "vocab.txt"


def config() -> BLIPConfig:
    """As files of others tell it: one head for 64."""
    words = Tokenizer.load(VOCABULARY)
    small = small_config(width=64, look_width=64)
    vit, med = replace(small.vit, heads=1), replace(small.med, heads=1, vocab_size=len(words))
    return replace(small, vit=vit, med=med, dec_id=words.dec_id, enc_id=words.enc_id)


def save(path: Path, encoder: bool = True, decoder: bool = True, questions: bool = False, **rest: object) -> Path:
    """Saves a random model, the same each time, as a checkpoint of ours with the parts that are asked for.

    rest: other nodes of its run's config than `model`.
    """
    torch.manual_seed(0)
    network = VQA(config()) if questions else BLIP(config(), encoder, decoder)
    state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    content = {"state_dict": state, "tokenizer": Tokenizer.load(VOCABULARY).to_json()}
    torch.save({**content, "config": json.dumps({"model": nodes(config()), **rest})}, path)
    return path


def picture(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)

"""A pre-training task that steps without a trainer, on a small random model, in float64; for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch
from torch import Tensor

from blip.layout import TextLayout
from blip.tasks.pretrain import PretrainTask

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", "[ENC]", *"abcdefghijklmnopqrstuvwxyz"]
VIT = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "drop_path": 0.0}
MED = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 32, "positions": 16, "share": "all_but_sa"}
OBJECTIVES: dict[str, Any] = {
    "keys": "all",
    "negatives": "all",
    "positives": "pair",
    "itc_weight": 1.0,
    "itm_weight": 1.0,
    "lm_weight": 1.0,
    "itm_start": 0.0,
    "queue_size": 12,
    "queue_start": 0.0,
    "alpha": 0.4,
    "alpha_start": 0.0,
    "alpha_end": 0.0,
    "momentum": 0.9,
    "momentum_ramp": False,
    "momentum_dropout": False,
    "negative_floor": 1e-4,
    "label_smoothing": 0.1,
}
MAX_TOKENS = 12


@dataclass
class Pairs:
    """What the step reads of a batch."""

    image: Tensor
    input_ids: Tensor
    layout: TextLayout
    image_ids: Tensor


class Stepper(PretrainTask):
    """The task with a step counter of its own in place of the trainer's."""

    step, steps, logged = 0, 10, {}

    @property
    def global_step(self) -> int:  # type: ignore[override]
        return self.step

    @property
    def total_steps(self) -> int:
        return self.steps

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_dict(self, values: dict[str, Tensor], **kwargs: Any) -> None:  # type: ignore[override]
        self.logged = {name.removeprefix("train/"): value.detach() for name, value in values.items()}


def stepper(
    seed: int = 0,
    dropout: float = 0.0,
    vit: dict[str, Any] | None = None,
    med: dict[str, Any] | None = None,
    vocabulary: Sequence[str] = WORDS,
    cadence: dict[str, int] | None = None,
    **objectives: Any,
) -> Stepper:
    torch.manual_seed(seed)
    words = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    model = {
        "vit": VIT | (vit or {}),
        "med": {**MED, "dropout": dropout, "attention_dropout": dropout, "init_std": 0.3, **(med or {})},
        "embed_width": 8,
        "temperature": 0.2,
    }
    task = Stepper(
        objectives=OBJECTIVES | objectives,
        max_tokens=MAX_TOKENS,
        model=model,
        tokenizer=json.dumps(json.loads(tokenizer.to_str())),
        optimizer=None,
        schedule=None,
        evaluators={},
        cadence=cadence,
    )
    return task.double().train()


def pairs(count: int, seed: int, image_ids: list[int] | None = None) -> list[tuple[Tensor, list[int], int]]:
    """Pictures with texts of 3 to MAX_TOKENS tokens and the id of the picture."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        length = int(torch.randint(1, MAX_TOKENS - 1, (), generator=generator))
        words = torch.randint(6, len(WORDS), (length,), generator=generator).tolist()
        image = torch.randn(3, 16, 16, generator=generator, dtype=torch.float64)
        made.append((image, [2, *words, 3], i if image_ids is None else image_ids[i]))
    return made


def batch(rows: list[tuple[Tensor, list[int], int]]) -> Pairs:
    return Pairs(
        image=torch.stack([image for image, _, _ in rows]),
        input_ids=torch.tensor([token for _, text, _ in rows for token in text]),
        layout=TextLayout.from_lengths([len(text) for _, text, _ in rows]),
        image_ids=torch.tensor([number for _, _, number in rows]),
    )

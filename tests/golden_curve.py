"""The golden curve: losses of the first 50 steps of one small seeded run, whole path: shards, loader, model, task, trainer.

    python -m tests.golden_curve          trains and shows where the losses leave the kept curve
    python -m tests.golden_curve --keep   trains and keeps them as tests/golden_cases/curve.json; say in the commit why they moved

All settings stand here and none in conf/, so that a recipe may change without it. Without dropout, whose random numbers come from
libraries that differ between processors; draws of negatives come from torch's own generator.
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import blip._torchvision  # noqa: F401

# isort: split
import lightning as L
import torch

from blip.datamodules.shapes import ShapesDataModule
from blip.tasks.pretrain import PretrainTask
from blip.tasks.schedules import cosine

KEPT = Path(__file__).parent / "golden_cases" / "curve.json"
LOSSES = ("itc", "itm", "lm")
STEPS = 50
SEED = 7

DATA: dict[str, Any] = {
    "world_seed": 5,
    "sizes": {"train": 210, "web": 0, "val": 0, "test": 0, "reserved": 0},
    "image_size": 32,
    "batch_size": 8,
    "eval_batch_size": 8,
    "captions": "one",
    "augment": {"scale": [0.5, 1.0], "flip": True, "randaugment": True},
    "max_words": 60,
    "max_tokens": 48,
    "window": 128,
    "seed": SEED,
}
MODEL: dict[str, Any] = {
    "vit": {"image_size": 32, "patch_size": 8, "width": 48, "depth": 2, "heads": 2, "drop_path": 0.0, "stem": "patch"},
    "med": {
        "width": 32,
        "depth": 2,
        "heads": 2,
        "mlp_width": 64,
        "positions": 48,
        "share": "all_but_sa",
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "init_std": 0.05,
    },
    "embed_width": 16,
    "temperature": 0.07,
}
OBJECTIVES: dict[str, Any] = {
    "keys": "all",
    "negatives": "all",
    "positives": "pair",
    "itc_weight": 1.0,
    "itm_weight": 1.0,
    "lm_weight": 1.0,
    "itm_start": 0.1,
    "queue_size": 40,
    "queue_start": 0.2,
    "alpha": 0.4,
    "alpha_start": 0.0,
    "alpha_end": 0.8,
    "momentum": 0.95,
    "momentum_ramp": True,
    "momentum_dropout": False,
    "negative_floor": 1e-4,
    "label_smoothing": 0.1,
}


class Losses(L.Callback):
    """The losses of each step, as the task logs them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        seen = trainer.callback_metrics
        self.rows.append({name: float(seen[f"train/{name}"]) for name in LOSSES if f"train/{name}" in seen})


def curve(folder: Path) -> list[dict[str, float]]:
    """Trains in `folder` and returns the losses by name, one dict a step."""
    world = folder / "world"
    source = {"name": "human", "shards": str(world / "human" / "*.tar")}
    data = ShapesDataModule(folder=world, sources=[source], tokenizer=world / "tokenizer.json", **DATA)
    data.prepare_data()
    L.seed_everything(SEED, verbose=False)
    task = PretrainTask(
        model=MODEL,
        tokenizer=data.tokenizer.to_json(),
        optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05),
        schedule=partial(cosine, warmup_share=0.1, start=0.0, floor=0.0),
        objectives=OBJECTIVES,
        evaluators={},
        max_tokens=DATA["max_tokens"],
        seed=SEED,
    )
    losses = Losses()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        precision="32-true",
        max_steps=STEPS,
        gradient_clip_val=1.0,
        callbacks=[losses],
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(task, datamodule=data)
    return losses.rows


def kept() -> list[dict[str, float]]:
    return json.loads(KEPT.read_text())["steps"]


def deviation(rows: list[dict[str, float]], truth: list[dict[str, float]]) -> list[float]:
    """Of each step, the largest difference of a loss from the kept one; infinite where one lacks what the other has."""
    same = [row.keys() == true.keys() for row, true in zip(rows, truth, strict=True)]
    return [
        max(abs(row[name] - true[name]) for name in true) if both else float("inf")
        for row, true, both in zip(rows, truth, same, strict=True)
    ]


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = curve(Path(folder))
    if KEPT.exists():
        apart = deviation(rows, kept())
        print(f"largest difference from the kept curve: {max(apart):.2e} at step {apart.index(max(apart))} of {STEPS}")
    if "--keep" in arguments:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        KEPT.write_text(f'{{"torch": "{torch.__version__}", "steps": [\n{lines}\n]}}\n')
        print(f"kept in {KEPT}")


if __name__ == "__main__":
    main(sys.argv[1:])

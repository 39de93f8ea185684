"""A task and data of a few numbers, with the contracts of the real ones: what runs around a model is tested with these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blip._torchvision  # noqa: F401

# isort: split
import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


@dataclass
class Batch:
    image: Tensor  # [B, 4]
    epoch: int
    position: int


class Numbers(Dataset):
    """What a position of an epoch holds is a function of the two; `spoil` puts a NaN into each batch."""

    def __init__(self, spoil: bool = False) -> None:
        self.spoil = spoil

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any]:
        rows = [torch.randn(4, generator=torch.Generator().manual_seed(1000 * e + p)) for e, p in keys]
        if self.spoil:
            rows[0][0] = float("nan")
        epoch, last = keys[-1]
        return [*rows, (epoch, last + 1)]


def collate(items: list[Any]) -> Batch:
    return Batch(torch.stack(items[:-1]), *items[-1])


class Order:
    """The rank's positions, from where the stream is; its length is that of the whole epoch."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def start(self) -> tuple[int, int]:
        step = self.data.batch_size * self.data.ranks
        left = self.data.pairs - self.data.cursor["pairs"]
        return (self.data.cursor["epoch"] + 1, 0) if left < step else tuple(self.data.cursor.values())  # type: ignore

    def __len__(self) -> int:
        step, (_, p) = self.data.batch_size * self.data.ranks, self.start()
        return p // step + (self.data.pairs - p) // step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size, (epoch, p) = self.data.batch_size, self.start()
        while self.data.pairs - p >= size * self.data.ranks:
            own = p + self.data.rank * size
            yield [(epoch, own + i) for i in range(size)]
            p += size * self.data.ranks


class Held:
    """Four rows for evaluation, one a batch; rank r has every ranks-th from r on."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return 4 // self.ranks

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        yield from ([(9, i)] for i in range(self.rank, 4, self.ranks))


class Data(L.LightningDataModule):
    """`pairs` rows an epoch, streamed from a cursor; one set of evaluation, or no validation."""

    class Words:
        def to_json(self) -> str:
            return "{}"

    def __init__(self, pairs: int = 20, batch_size: int = 2, spoil: bool = False, validated: bool = True) -> None:
        super().__init__()
        self.pairs, self.batch_size, self.spoil = pairs, batch_size, spoil
        self.cursor = {"epoch": 0, "pairs": 0}
        self.tokenizer = self.Words()
        self.test_names = ["main"]
        self.val_names = ["main"] if validated else []

    @property
    def ranks(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Numbers(self.spoil), batch_sampler=Order(self), collate_fn=collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> list[DataLoader]:
        return [self.test_dataloader()] if self.val_names else []

    def test_dataloader(self) -> DataLoader:
        sampler = Held(self.rank, self.ranks)
        return DataLoader(Numbers(), batch_sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]

    predict_dataloader = test_dataloader

    def advance(self, batch: Batch) -> None:
        # the rows of all ranks
        step = self.batch_size * self.ranks
        self.cursor = {"epoch": batch.epoch, "pairs": -(-batch.position // step) * step}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.cursor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.cursor = dict(state_dict)


class Task(L.LightningModule):
    """A linear layer with dropout, trained to zero; `seen` adds up where in the stream its batches came from."""

    stop_at = -1  # the batch before which the run is cut off, in this process

    def __init__(self, tokenizer: str = "{}", lr: float = 0.1, width: int = 4) -> None:
        super().__init__()
        self.tokenizer_json, self.lr, self.config_yaml = tokenizer, lr, ""
        self.layer = nn.Linear(4, width)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(1000 * self.global_step + batch_idx)
        self.batch = batch
        if self.trainer.fit_loop.total_batch_idx == Task.stop_at:
            raise InterruptedError("cut off")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = nn.functional.dropout(self.layer(batch.image), 0.5).square().mean()
        self.log_dict({"train/loss": loss, "train/itc": loss}, prog_bar=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.seen = (self.seen * 31 + 100 * self.batch.epoch + self.batch.position) % 1_000_003
        self.trainer.datamodule.advance(self.batch)  # type: ignore[attr-defined]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/zero/distance", self.layer(batch.image).square().mean(), sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("test/zero/distance", self.layer(batch.image).square().mean(), sync_dist=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        return [{"position": batch.position, "value": float(self.layer(batch.image).sum())}]

    def flops_per_pair(self, batch: Batch) -> float:
        return 96.0

    def gallery(self, batch: Batch) -> list[dict[str, Any]]:
        picture = (batch.image[0].view(2, 2, 1).expand(2, 2, 3) * 255).byte().numpy()
        return [{"image": picture, "true": "a $1 cat", "generated": "a cat", "best": "cat", "worst": "dog"}]

    def load_weights(self, path: Path) -> list[str]:
        self.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        return [f"all of {path.name}"]

    def start_from(self, text: str | None, image: str | None, lm_head: bool) -> list[str]:
        nn.init.ones_(self.layer.weight)
        return [f"words of {text}, pictures of {image}, {'with' if lm_head else 'without'} head"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"], checkpoint["tokenizer"] = self.config_yaml, self.tokenizer_json

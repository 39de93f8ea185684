"""What every task shares: the backbone, the optimizer by rules, seeds by step, and handing batches to evaluators."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from blip.modules.blip import BLIP, BLIPConfig
from blip.modules.checkpoint import Report, Weights, blip_config, load, read
from blip.modules.initialise import from_bert, from_vit
from blip.modules.vit import denormalize, normalize
from blip.tasks.distributed import rank
from blip.text import Tokenizer


def step_seed(*key: int | str) -> int:
    """A 63-bit seed that is a function of the key alone, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], rules: Sequence[dict[str, Any]], lr: float
) -> list[dict]:
    """Groups for the optimizer: each parameter takes the first rule whose `match` (a regex) is found in its name.

    A rule may hold `lr`, a factor of the common rate, and any other option of the optimizer (`weight_decay`).
    Raises ValueError for a rule that no parameter meets.
    """
    groups: list[dict[str, Any]] = [{"params": [], "lr": lr}]
    for rule in rules:
        options = {k: v for k, v in rule.items() if k not in ("match", "lr")}
        groups.append({"params": [], "lr": lr * rule.get("lr", 1.0), **options})
    for name, parameter in named:
        hit = next((i for i, rule in enumerate(rules, 1) if re.search(rule["match"], name)), 0)
        if groups[hit].get("muon") and parameter.dim() != 2:
            raise ValueError(
                f"optimizer rule {rules[hit - 1]['match']!r} gives {name} of shape {list(parameter.shape)} to Muon, which takes "
                "matrices alone: put a rule without `muon` for it before"
            )
        groups[hit]["params"].append(parameter)
    for group, rule in zip(groups[1:], rules, strict=True):
        if not group["params"]:
            raise ValueError(f"optimizer rule {rule['match']!r} matches no parameter")
    return [group for group in groups if group["params"]]


class Task(L.LightningModule):
    """A LightningModule around the one backbone.

    model: the nodes `vit` and `med` and the sizes of `BLIPConfig`; tokenizer: its JSON text. optimizer: a partial that takes
    parameter groups; rules: see `parameter_groups`; schedule: a partial (step, total_steps, steps_per_epoch) -> factor of
    the rate. evaluators: {task name: partial that takes the tokenizer, or None}, run on every evaluation set; cadence: {name: n},
    those that in training run at every n-th validation only. compile: a partial of `torch.compile`, or None.
    """

    encoder = decoder = True

    def __init__(
        self,
        model: dict[str, Any],
        tokenizer: str,
        optimizer: partial[torch.optim.Optimizer],
        schedule: Callable[..., float],
        evaluators: dict[str, Callable[[Tokenizer], Any] | None],
        rules: Sequence[dict[str, Any]] = (),
        cadence: Mapping[str, int] | None = None,
        compile: Callable[[Callable], Callable] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer_json = tokenizer
        self.tokenizer = Tokenizer.from_json(tokenizer)
        self.model: Any = self.make_model(
            blip_config(model, len(self.tokenizer), self.tokenizer.dec_id, self.tokenizer.enc_id)
        )
        self.optimizer, self.schedule, self.rules = optimizer, schedule, rules
        self.evaluators = {name: make(self.tokenizer) for name, make in evaluators.items() if make is not None}
        self.cadence = dict(cadence or {})
        for name, every in self.cadence.items():
            if name not in self.evaluators or every < 1:
                raise ValueError(
                    f"task.cadence.{name}={every}: a number from 1 for one of {', '.join(self.evaluators) or 'no evaluator'}"
                )
        self.validations = 0  # in training, this one included
        self.compile_with = compile
        self.seed = seed
        self.config_yaml = ""
        self.results: dict[str, float] = {}
        self.trained_on: set[str] = set()  # digests of shards, those of earlier runs too
        self.micro_batch = 0  # micro-batches since the last optimizer step

    def make_model(self, config: BLIPConfig) -> nn.Module:
        """The network that the task trains; with another one than `BLIP`, `take` says what starts it."""
        return BLIP(config, self.encoder, self.decoder)

    # the device side of a batch -----------------------------------------------------------------------------------

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch.image = normalize(batch.image)
        return batch

    # training -----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if self.compile_with is not None and stage == "fit":
            self.model.compile(self.compile_with)

    def configure_optimizers(self) -> Any:
        trained = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        optimizer = self.optimizer(parameter_groups(trained, self.rules, self.optimizer.keywords["lr"]))
        total = self.total_steps
        if self.trainer.train_dataloader is None:  # the length of an epoch is not known before
            self.trainer.fit_loop.setup_data()
        # The last step of an epoch may have fewer micro-batches than the others.
        per_epoch = max(1, math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches))
        factor = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule(step, total, per_epoch))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step"}}

    @property
    def total_steps(self) -> int:
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("the run has no end: give trainer.max_steps or trainer.max_epochs")
        return int(steps)

    @property
    def progress(self) -> float:
        """Share of the run that is done, by optimizer steps."""
        return self.global_step / self.total_steps

    def on_fit_start(self) -> None:
        self.trained_on |= self.trainer.datamodule.training_shards()  # type: ignore[attr-defined]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout is a function of seed, step and rank: a restart draws what the uninterrupted run drew.
        torch.manual_seed(step_seed(self.seed, "dropout", self.global_step, self.micro_batch, rank()))
        self.batch = batch

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Here and not in on_train_batch_end: callbacks, which may save a checkpoint, have that hook before the module.
        self.after_step()
        self.trainer.datamodule.advance(self.batch)  # type: ignore[attr-defined]
        self.micro_batch = -1

    def after_step(self) -> None:
        """What a task does once the optimizer has stepped."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.micro_batch += 1

    # evaluation ---------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, dataloader_idx)

    def on_validation_epoch_start(self) -> None:
        self.validations += self.trainer.state.fn == "fit"
        self._open()

    def on_test_epoch_start(self) -> None:
        self._open()

    def on_validation_epoch_end(self) -> None:
        self._close()

    def on_test_epoch_end(self) -> None:
        self._close()

    def _open(self) -> None:
        self._set = 0
        training = self.trainer.state.fn == "fit"
        self._due = {
            name: evaluator
            for name, evaluator in self.evaluators.items()
            if not training or self.validations % self.cadence.get(name, 1) == 0
        }
        for evaluator in self._due.values():
            evaluator.reset()

    def _evaluate(self, batch: Any, number: int) -> None:
        while self._set < number:  # the loaders follow each other, so the sets before are complete
            self._score()
        for evaluator in self._due.values():
            evaluator.update(self.model, batch)

    def _score(self) -> None:
        """Logs `stage/task/metric`, with the set's name behind the task's unless it is the main set."""
        stage = "test" if self.trainer.testing else "val"
        name = getattr(self.trainer.datamodule, f"{stage}_names")[self._set]  # type: ignore[attr-defined]
        for task, evaluator in self._due.items():
            label = task if name == "main" else f"{task}_{name}"
            self.results.update({f"{stage}/{label}/{k}": v for k, v in evaluator.compute(self.model).items()})
            self.scored(stage, label, evaluator)
            evaluator.reset()
            if share := self._share_trained_on(stage, name):
                self.results[f"{stage}/{label}/trained_on_it"] = 100 * share
        self._set += 1

    def _share_trained_on(self, stage: str, name: str) -> float:
        """How many of a set's shards the model was trained on; said in the log, for such a score is none of unseen data."""
        shards = self.trainer.datamodule.evaluation_shards(stage, name)  # type: ignore[attr-defined]
        share = len(shards & self.trained_on) / len(shards) if shards else 0.0
        if share:
            rank_zero_warn(
                f"{stage} set {name}: the model was trained on {share:.0%} of its shards, so these are no scores of unseen data"
            )
        return share

    def scored(self, stage: str, label: str, evaluator: Any) -> None:
        """What a task does with an evaluator that has all of a set and has computed its numbers."""

    def _close(self) -> None:
        stage = "test" if self.trainer.testing else "val"
        # All of them, for this rank may have had no picture of the last ones, and the others wait for it.
        while self._set < len(getattr(self.trainer.datamodule, f"{stage}_names")):  # type: ignore[attr-defined]
            self._score()
        self.log_dict(self.results, add_dataloader_idx=False)
        self.results = {}

    # what the model says -------------------------------------------------------------------------------------------

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """A row for each picture: its key, what is written for it with log-probabilities, its true texts.

        Where several captions are written, the others stand in a list `more`.
        """
        rows = []
        for key, captions, references in zip(batch.keys, self._captions(batch), batch.references, strict=True):
            first, *more = (caption.row() for caption in captions)
            rows.append({"key": key, **first, **({"more": more} if more else {}), "references": references})
        return rows

    @torch.no_grad()
    def gallery(self, batch: Any) -> list[dict[str, Any]]:
        """A card for each picture, or for the first frame of each clip: image uint8 [H, W, 3], true caption, best and worst match.

        Matches are those in the batch. Where captions are written, the generated one, too.
        """
        image = self.model.image_features(self.model.image_states(batch.image))
        similarity = image @ self.model.text_features(batch.input_ids, batch.layout).T  # [B, R]
        best, worst = similarity.argmax(1).tolist(), similarity.argmin(1).tolist()
        shown = batch.image if batch.image.dim() == 4 else batch.image[:, 0]
        pictures = denormalize(shown).permute(0, 2, 3, 1).cpu().numpy()
        cards: list[dict[str, Any]] = [
            {"image": picture, "true": true[0], "best": batch.texts[b], "worst": batch.texts[w]}
            for picture, true, b, w in zip(pictures, batch.references, best, worst, strict=True)
        ]
        if "caption" in self.evaluators:
            for card, said in zip(cards, self._captions(batch), strict=True):
                card["generated"] = said[0].text
        return cards

    def _captions(self, batch: Any) -> list[Any]:
        if "caption" not in self.evaluators:
            raise ValueError("captions are written as task.evaluators.caption says, and there is no such evaluator")
        return self.evaluators["caption"].write(self.model, batch)

    # weights ------------------------------------------------------------------------------------------------------

    def load_weights(self, path: Path) -> list[Report]:
        """Takes the model from a checkpoint of any layout, position embeddings resized; says what came from where.

        ValueError: the file lacks a part that the task needs, does not fit, or was trained with another vocabulary.
        """
        weights = read(path)
        if weights.tokenizer and (theirs := Tokenizer.from_json(weights.tokenizer).pieces()) != self.tokenizer.pieces():
            raise ValueError(
                f"{path} was trained with another vocabulary ({len(theirs)} pieces) than the data's "
                f"({len(self.tokenizer)} pieces). To measure what a run learnt: `resume=RUN_FOLDER mode=test`, or its overrides "
                "again; to train on with other data: set data.tokenizer to the checkpoint's own"
            )
        self.trained_on |= set(weights.trained_on)
        return self.take(weights)

    def take(self, weights: Weights) -> list[Report]:
        return [load(self.model, weights)]

    def start_from(self, text: str | None, image: str | None, lm_head: bool) -> list[Report]:
        """Takes the text transformer from BERT and the image encoder from an ImageNet ViT (paper section 4.1)."""
        reports = [from_bert(self.model, text, lm_head)] if text is not None else []
        return reports + ([from_vit(self.model, image)] if image is not None else [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config_yaml
        checkpoint["tokenizer"] = self.tokenizer_json
        checkpoint["trained_on"] = sorted(self.trained_on)
        checkpoint["validations"] = self.validations

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.trained_on |= set(checkpoint.get("trained_on", ()))
        self.validations = checkpoint.get("validations", 0)

"""What a task begins with: checkpoints of each layout, BERT and ImageNet weights, for model and momentum encoder alike."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from blip.modules.checkpoint import convert
from blip.modules.momentum import MomentumEncoder
from blip.modules.vit import VisionTransformer
from blip.tasks.base import Task
from blip.tasks.pretrain import PretrainTask
from tests.tasks.steps import WORDS, batch, pairs, stepper

CLASSES = ("BlipForConditionalGeneration", "BlipForImageTextRetrieval")


def trained() -> PretrainTask:
    """A task whose momentum encoder has gone other ways than its model."""
    task = stepper(seed=1)
    with torch.no_grad():
        for parameter in task.momentum.parameters():
            parameter.add_(0.01)
    return task


def ours(folder: Path, task: PretrainTask) -> Path:
    content = {"state_dict": task.state_dict(), "config": "", "tokenizer": task.tokenizer_json}
    torch.save(content, folder / "last.ckpt")
    return folder / "last.ckpt"


def released(folder: Path, task: PretrainTask) -> Path:
    convert(ours(folder, task), folder / "released.pth", "released", "pretrain", heads=(2, 2))
    return folder / "released.pth"


def transformers(folder: Path, task: PretrainTask) -> Path:
    """A folder in transformers' layout with the tensors of two of its classes: together all that pre-training needs."""
    parts = [folder / name for name in CLASSES]
    for part in parts:
        convert(ours(folder, task), part, "transformers", part.name, heads=(2, 2))
    tensors = {n: t for part in parts for n, t in load_file(part / "model.safetensors").items()}
    save_file(tensors, parts[0] / "model.safetensors")
    return parts[0]


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def same_as_its_model(task: PretrainTask) -> bool:
    return same(task.momentum, MomentumEncoder(task.model, dropout=False))


@pytest.mark.parametrize("write", [ours, released])
def test_a_checkpoint_with_a_momentum_encoder_fills_it_and_the_model(tmp_path: Path, write):
    source, task = trained(), stepper(seed=2)
    queue = task.queue.image.clone()
    text = "\n".join(map(str, task.load_weights(write(tmp_path, source))))
    assert same(task.model, source.model)
    assert same(task.momentum, source.momentum)
    assert not same_as_its_model(task)
    assert torch.equal(task.queue.image, queue)
    for told in ("loaded   image encoder", "loaded   momentum encoder", "the queue starts anew"):
        assert told in text
    assert "this model has no" not in text


def test_without_one_in_the_file_the_momentum_encoder_is_a_copy_of_the_model(tmp_path: Path):
    source, task = trained(), stepper(seed=2)
    (report,) = task.load_weights(transformers(tmp_path, source))
    loaded = task.model.state_dict()
    # transformers' layout has no place for the temperature
    expected = source.model.state_dict() | {"temperature": stepper(seed=2).model.temperature.detach()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert same_as_its_model(task)
    assert "the temperature keeps its start values" in str(report)


@pytest.mark.parametrize(("name", "lacks"), zip(CLASSES, ("text encoder", "text decoder"), strict=True))
def test_a_file_that_lacks_what_the_task_needs_is_refused(tmp_path: Path, name: str, lacks: str):
    folder = tmp_path / name
    convert(ours(tmp_path, trained()), folder, "transformers", name, heads=(2, 2))
    with pytest.raises(ValueError, match=rf"{name} has no .*{lacks}.*, which this task needs"):
        stepper().load_weights(folder)


def test_pictures_of_another_size_resize_the_positions_of_both_encoders(tmp_path: Path):
    task = stepper(seed=2, vit={"image_size": 32})
    reports = task.load_weights(ours(tmp_path, trained()))
    assert [list(report.resized.values()) for report in reports] == [["4 -> 16 patches"]] * 2


@pytest.mark.parametrize("write", [ours, transformers])
def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path: Path, write):
    path = write(tmp_path, stepper(vocabulary=[*WORDS[:6], *reversed(WORDS[6:])]))
    with pytest.raises(
        ValueError, match=r"another vocabulary \(32 pieces\) than the data's \(32 pieces\).*set data.tok"
    ):
        stepper().load_weights(path)


def test_a_file_that_names_no_vocabulary_is_refused_by_the_size_of_its_own(tmp_path: Path):
    path = released(tmp_path, stepper(vocabulary=[*WORDS, "##a"]))
    with pytest.raises(ValueError, match=r"embeddings\.word\.weight has shape \[33, 16\], the model \[32, 16\]"):
        stepper().load_weights(path)


def test_the_same_pieces_under_other_settings_are_the_same_vocabulary(tmp_path: Path):
    """As in the folders of transformers, whose tokenizers pad and add [CLS] and [SEP] themselves."""
    folder, task = transformers(tmp_path, trained()), stepper()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    assert task.load_weights(folder)


def sources(folder: Path) -> tuple[str, str]:
    """A BERT without the rows of [DEC] and [ENC], and an ImageNet ViT for larger pictures, of the sizes of the small model."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(WORDS) - 2, max_position_embeddings=16, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(folder / "bert")
    vit = VisionTransformer(replace(stepper().model.config.vit, image_size=32))
    torch.save(vit.state_dict(), folder / "vit.pth")
    return str(folder / "bert"), str(folder / "vit.pth")


def test_bert_and_an_imagenet_vit_fill_model_and_momentum_encoder(tmp_path: Path):
    text, image = sources(tmp_path)
    task = stepper(seed=2)
    reports = task.start_from(text, image, lm_head=True)
    bert, vit = load_file(tmp_path / "bert" / "model.safetensors"), torch.load(tmp_path / "vit.pth")
    words = task.model.med.embeddings.word.weight
    assert torch.equal(words[:-2], bert["bert.embeddings.word_embeddings.weight"].double())
    assert torch.equal(task.model.visual_encoder.norm.weight, vit["norm.weight"].double())
    assert torch.equal(task.model.visual_encoder.blocks[1].attn.qkv.weight, vit["blocks.1.attn.qkv.weight"].double())
    assert same_as_its_model(task)
    assert [report.title for report in reports] == [f"text transformer from {text}", f"image encoder from {image}"]


def test_one_source_leaves_the_other_side_as_it_was(tmp_path: Path):
    text, image = sources(tmp_path)
    for names, untouched in (((text, None), "visual_encoder"), ((None, image), "med")):
        task, before = stepper(seed=2), stepper(seed=2)
        (report,) = task.start_from(*names, lm_head=True)
        assert str(names[0] or names[1]) in str(report)
        assert same(getattr(task.model, untouched), getattr(before.model, untouched))
        assert not same(task.model, before.model)
        assert same_as_its_model(task)


class Counted:
    """An evaluator that tells how many pictures it saw."""

    def reset(self) -> None:
        self.count = 0

    def update(self, model: Any, batch: Any) -> None:
        self.count += len(batch.image)

    def compute(self, model: Any) -> dict[str, float]:
        return {"count": float(self.count)}


class Sets:
    """Evaluation sets, each of some shards; training is on others."""

    def __init__(self, shards: dict[str, set[str]]) -> None:
        self.shards = shards
        self.val_names = self.test_names = list(shards)

    def training_shards(self) -> set[str]:
        return {"t"}

    def evaluation_shards(self, stage: str, name: str) -> set[str]:
        return self.shards[name]


def scored(task: PretrainTask, shards: dict[str, set[str]]) -> dict[str, float]:
    logged: dict[str, float] = {}
    task.log_dict = lambda values, **_: logged.update(values)
    task.evaluators = {"it": Counted()}
    task._trainer = SimpleNamespace(testing=True, state=SimpleNamespace(fn="test"), datamodule=Sets(shards))
    task.on_test_epoch_start()
    task.on_test_epoch_end()
    return logged


def test_a_score_of_shards_that_the_model_was_trained_on_says_so(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    task = stepper()
    task._trainer = SimpleNamespace(datamodule=Sets({}))
    task.on_fit_start()
    numbers = scored(task, {"main": {"a", "b"}, "half": {"a", "t"}})
    assert numbers == {"test/it/count": 0.0, "test/it_half/count": 0.0, "test/it_half/trained_on_it": 50.0}
    assert "test set half: the model was trained on 50% of its shards" in str(recwarn.pop(UserWarning).message)
    # who starts from its checkpoint, or converts it, knows it too
    content = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(content)
    torch.save(content, tmp_path / "last.ckpt")
    convert(tmp_path / "last.ckpt", tmp_path / "again.ckpt", "blip", heads=(2, 2))
    for name in ("last.ckpt", "again.ckpt"):
        other = stepper(seed=2)
        other.load_weights(tmp_path / name)
        assert scored(other, {"half": {"a", "t"}})["test/it_half/trained_on_it"] == 50.0


def test_a_rank_without_pictures_of_a_set_scores_it_too_for_the_others_wait():
    task, logged = stepper(), {}
    task.log_dict = lambda values, **_: logged.update(values)
    task.evaluators = {"it": Counted()}
    task._trainer = SimpleNamespace(
        testing=True, state=SimpleNamespace(fn="test"), datamodule=Sets({"main": {"a"}, "other": {"b"}, "last": {"c"}})
    )
    task.on_test_epoch_start()
    task.test_step(batch(pairs(3, seed=0)), 0, 0)
    task.on_test_epoch_end()
    assert logged == {"test/it/count": 3.0, "test/it_other/count": 0.0, "test/it_last/count": 0.0}


def test_an_evaluator_keeps_its_cadence_in_training_also_across_a_restart_and_runs_in_every_test():
    def validated(task: Task, fn: str) -> list[str]:
        logged: dict[str, float] = {}
        task.log_dict = lambda values, **_: logged.update(values)
        task.evaluators = {"often": Counted(), "seldom": Counted()}
        task.cadence = {"seldom": 2}
        state = SimpleNamespace(fn=fn)
        task._trainer = SimpleNamespace(testing=fn == "test", state=state, datamodule=Sets({"main": {"a"}}))
        start, end = (task.on_test_epoch_start, task.on_test_epoch_end) if fn == "test" else (None, None)
        (start or task.on_validation_epoch_start)()
        task._evaluate(batch(pairs(3, seed=0)), 0)
        (end or task.on_validation_epoch_end)()
        return sorted(name.split("/")[1] for name in logged)

    task = stepper()
    assert [validated(task, "fit") for _ in range(3)] == [["often"], ["often", "seldom"], ["often"]]
    saved: dict[str, Any] = {}
    task.on_save_checkpoint(saved)
    again = stepper()
    again.on_load_checkpoint(saved)
    assert validated(again, "fit") == ["often", "seldom"]
    assert validated(again, "test") == validated(again, "validate") == ["often", "seldom"]


def test_a_cadence_of_an_evaluator_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"task\.cadence\.captoin=2"):
        stepper(cadence={"captoin": 2})


def test_an_epoch_whose_last_step_has_fewer_micro_batches_counts_that_step():
    task = stepper()
    task.optimizer = partial(torch.optim.SGD, lr=1.0)
    task.schedule = lambda step, total, per_epoch: per_epoch
    task._trainer = SimpleNamespace(train_dataloader=[], num_training_batches=25, accumulate_grad_batches=2)
    assert task.configure_optimizers()["lr_scheduler"]["scheduler"].get_last_lr() == [13.0]


def test_a_run_without_an_end_is_refused():
    task = stepper()
    task._trainer = SimpleNamespace(estimated_stepping_batches=float("inf"))
    with pytest.raises(ValueError, match=r"trainer\.max_steps or trainer\.max_epochs"):
        _ = Task.total_steps.fget(task)


def test_texts_longer_than_the_model_has_positions_are_refused():
    with pytest.raises(ValueError, match=r"max_tokens=12 is more than the 8 of model\.med\.positions"):
        stepper(med={"positions": 8})


def test_a_clip_has_a_card_of_its_first_frame_and_the_matches_of_all():
    task, rows = stepper(seed=1), pairs(4, seed=0)
    one, told = batch(rows[:2]), {"texts": ["a", "b"], "references": [["a"], ["b"]]}
    moving = torch.stack([one.image, batch(rows[2:]).image], dim=1)  # [B, F, 3, S, S]
    still = torch.stack([one.image, one.image], dim=1)
    of_pictures, of_moving, of_still = (
        task.gallery(SimpleNamespace(**vars(one) | {"image": image} | told)) for image in (one.image, moving, still)
    )
    assert [card["image"].tolist() for card in of_moving] == [card["image"].tolist() for card in of_pictures]
    assert [(card["best"], card["worst"]) for card in of_still] == [
        (card["best"], card["worst"]) for card in of_pictures
    ]

"""Fine-tuning for questions about pictures (paper section 5.3): the language model of each answer, given question and picture."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip.metrics.vqa import write_submission
from blip.modules.blip import BLIPConfig
from blip.modules.checkpoint import Report, Weights, load
from blip.modules.flops import Part, blocks_flops, look_flops, stem_flops, text_flops, trained
from blip.modules.vit import denormalize
from blip.modules.vqa import VQA
from blip.tasks.base import Task


class VQATask(Task):
    """Trains on `QuestionBatch`es, one question a picture; starts from a pre-trained model or from one of questions.

    label_smoothing: of the answers' cross-entropy (released: 0.1); max_tokens: of a question. The other arguments are `Task`'s.
    """

    def __init__(self, label_smoothing: float, max_tokens: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if max_tokens > (positions := self.model.config.med.positions):
            raise ValueError(f"data.max_tokens={max_tokens} is more than the {positions} of model.med.positions")
        self.label_smoothing = label_smoothing

    def make_model(self, config: BLIPConfig) -> VQA:
        return VQA(config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        model = self.model
        pictures = model.med.look(model.image_states(batch.image))
        questions = model.ask(batch.input_ids, batch.layout, pictures)
        # A question is a few tokens, and has as many answers as people gave: rows are gathered, not folded.
        asked = [kv.select(batch.answer_row) for kv in questions]
        losses = model.answer_losses(batch.answer_ids, batch.answer_layout, asked, self.label_smoothing)  # [A]
        loss = (batch.weights * losses).sum() / batch.image.shape[0]
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=batch.image.shape[0])
        return loss

    def take(self, weights: Weights) -> list[Report]:
        """Encoder and decoder from the file's, also where they are one there.

        The decoder looks at questions: where it looked at pictures of another width (ViT-L), those keys and values start anew.
        """
        width, own = self.model.config.med.width, self.model.state_dict()
        anew = {
            name: own[name.removeprefix("model.")]
            for name, tensor in weights.tensors.items()
            if re.fullmatch(r"model\.med\.decoder\.\d+\.cross_attention\.key_value\.weight", name)
            and tensor.dim() == 2
            and tensor.shape[1] != width
            and name.removeprefix("model.") in own
        }
        report = load(self.model, replace(weights, tensors=weights.tensors | anew))
        report.loaded = [name for name in report.loaded if name not in anew]
        why = f"the decoder looked at states of another width than the questions' {width}; it keeps its start values"
        report.missing |= dict.fromkeys(anew, why)
        return [report]

    def scored(self, stage: str, label: str, evaluator: Any) -> None:
        """Writes what the test server takes, where a set's own answers are not known."""
        rows = getattr(evaluator, "rows", [])
        if stage == "test" and self.trainer.is_global_zero and rows and not any(row["answers"] for row in rows):
            path = Path(self.trainer.default_root_dir) / f"{label}_answers.json"
            write_submission(path, {row["id"]: row["said"] for row in rows})

    @torch.no_grad()
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """A row for each question: the key of its picture, its id and text, what is answered, what humans said."""
        rows = zip(batch.text_row.tolist(), batch.questions, self.answers(batch), strict=True)
        return [
            {
                "key": batch.keys[row],
                "question_id": entry["id"],
                "question": entry["question"],
                "answer": said,
                "references": entry["answers"],
            }
            for row, entry, said in rows
        ]

    @torch.no_grad()
    def gallery(self, batch: Any) -> list[dict[str, Any]]:
        """A card for each question: its picture uint8 [H, W, 3], itself with its first answer, and the model's."""
        images = batch.image if batch.image.dim() == 4 else batch.image[:, 0]
        pictures = denormalize(images).permute(0, 2, 3, 1).cpu().numpy()
        return [
            {
                "image": pictures[row],
                "true": " ".join([entry["question"], *entry["answers"][:1]]),
                "generated": said,
            }
            for row, entry, said in zip(batch.text_row.tolist(), batch.questions, self.answers(batch), strict=True)
        ]

    def answers(self, batch: Any) -> list[str]:
        ways = [evaluator for evaluator in self.evaluators.values() if hasattr(evaluator, "answer")]
        if not ways:
            raise ValueError("questions are answered as task.evaluators.vqa says, and there is no such evaluator")
        return ways[0].answer(self.model, batch)

    def flops_per_pair(self, batch: Any) -> float:
        """Forward and backward of a step over this batch on this rank, by its pictures; from shapes alone, so nothing waits."""
        vit, med, size = self.model.config.vit, self.model.config.med, batch.image.shape[0]
        questions, answers = batch.layout, batch.answer_layout
        asked, told = questions.index.shape[0], answers.index.shape[0]
        pixels, rest = stem_flops(vit)
        image = rest + blocks_flops(vit)
        parts = [
            Part(size * (pixels + image), size * (pixels + 2 * image)),
            trained(look_flops(med, size * vit.tokens)),
            trained(text_flops(med, asked, size, questions.longest, vit.tokens)),
            trained(look_flops(replace(med, look_width=med.width), size * questions.longest)),
            trained(text_flops(med, told, answers.rows, answers.longest, questions.longest)),
            trained((told - answers.rows) * 2 * med.width * (med.width + med.vocab_size)),
        ]
        return sum(part.total for part in parts) / size

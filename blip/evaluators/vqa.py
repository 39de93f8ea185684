"""What a model's answers to questions about pictures or clips are worth (paper sections 5.3 and 5.6).

An answer is chosen from a list (`rank`: the most likely of the candidates, as the paper's numbers are made) or written freely
(`generate`). Either way the question's padding is not looked at, so that an answer does not depend on what else is in the batch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from blip.evaluators.collect import from_all_ranks
from blip.layout import TextLayout
from blip.metrics.vqa import vqa_accuracy
from blip.modules.generation import Decoding, generate
from blip.modules.med import CrossKV
from blip.modules.vqa import VQA, Candidates, rank
from blip.text import Tokenizer

INFERENCES = ("rank", "generate")
ACCURACIES = ("vqa", "exact")


class VQAEvaluator:
    """`accuracy` in percent, also of each kind of question, and `chance`: what the most frequent answer alone would reach.

    inference: `rank` or `generate`, the latter as `decoding` says. answers: to rank, a list or a JSON file of one; top_k: how
    many of them are compared in full; label_smoothing: of their likelihood, as in training.
    accuracy: `vqa` (the official one, of ten humans) or `exact` (the answer is the first human's, as the tokenizer writes it).
    by: names in the entries of questions (`answer_type`), whose values become metrics of their own.
    questions_at_once, answers_at_once: how many go through the encoder and through the decoder together at most.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        inference: str,
        answers: str | Sequence[str] | None,
        top_k: int,
        label_smoothing: float,
        decoding: Decoding,
        accuracy: str,
        by: Sequence[str],
        questions_at_once: int,
        answers_at_once: int,
    ) -> None:
        for name, value, allowed in (("inference", inference, INFERENCES), ("accuracy", accuracy, ACCURACIES)):
            if value not in allowed:
                raise ValueError(f"evaluators.vqa.{name} must be one of {', '.join(allowed)}, not {value!r}")
        self.tokenizer, self.inference, self.answers = tokenizer, inference, answers
        self.top_k, self.label_smoothing, self.decoding = top_k, label_smoothing, decoding
        self.accuracy, self.by = accuracy, tuple(by)
        self.questions_at_once, self.answers_at_once = questions_at_once, answers_at_once
        self.candidates: tuple[list[str], Candidates] | None = None  # read when they are first wanted
        self.reset()

    def reset(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @torch.no_grad()
    def update(self, model: VQA, batch: Any) -> None:
        for entry, said in zip(batch.questions, self.answer(model, batch), strict=True):
            kept = {name: entry.get(name) for name in ("id", "answers", *self.by)}
            self.rows.append(kept | {"said": said})

    @torch.no_grad()
    def answer(self, model: VQA, batch: Any) -> list[str]:
        """The answer to each question of a batch of normalised pictures [B, 3, S, S] or clips [B, F, 3, S, S]."""
        states = model.image_states(batch.image)
        lengths = batch.layout.mask.sum(1).tolist()
        tokens = batch.input_ids.split(lengths)
        counts = torch.bincount(batch.text_row, minlength=states.shape[0]).tolist()
        said: list[str] = []
        for pictures, texts in portions(counts, self.questions_at_once):
            layout = TextLayout.from_lengths(lengths[texts]).to(states.device)
            cross = model.med.look(states[pictures])
            questions = model.ask(torch.cat(tokens[texts]), layout, cross, batch.text_row[texts] - pictures.start)
            said += self.choose(model, questions) if self.inference == "rank" else self.write(model, questions)
        return said

    def choose(self, model: VQA, questions: list[CrossKV]) -> list[str]:
        """The likeliest of the answers for each question."""
        if self.candidates is None:
            answers = read_answers(self.answers)
            ids = self.tokenizer.encode(answers, model.config.med.positions)
            self.candidates = answers, Candidates.of(ids, questions[0].key.device)
        answers, candidates = self.candidates
        best = rank(model, questions, candidates, self.top_k, self.answers_at_once, self.label_smoothing).best
        return [answers[number] for number in best.tolist()]

    def write(self, model: VQA, questions: list[CrossKV]) -> list[str]:
        """What the decoder writes for each question, the best of its beams."""
        tokenizer = self.tokenizer
        texts = generate(model.med, questions, [model.config.dec_id], self.decoding, tokenizer.sep_id, tokenizer.pad_id)
        return [tokenizer.decode(ids) for ids in texts.ids[:: self.decoding.samples].tolist()]

    def compute(self, model: VQA) -> dict[str, float]:
        """Empty where no question has answers, as in a test set that is judged elsewhere."""
        self.rows = from_all_ranks(self.rows)
        told = [row for row in self.rows if row["answers"]]
        if not told:
            return {}
        frequent = Counter(answer for row in told for answer in row["answers"]).most_common(1)[0][0]
        right = [self.worth(row["answers"], row["said"]) for row in told]
        guessed = [self.worth(row["answers"], frequent) for row in told]
        results = {"accuracy": 100 * mean(right), "chance": 100 * mean(guessed)}
        for name in self.by:
            for kind in sorted({str(row[name]) for row in told if row[name] is not None}):
                of_kind = [value for row, value in zip(told, right, strict=True) if str(row[name]) == kind]
                results[f"accuracy_{kind.replace('/', '_').replace(' ', '_')}"] = 100 * mean(of_kind)
        return results

    def worth(self, answers: Sequence[str], said: str) -> float:
        """Of an answer, 0 to 1."""
        if self.accuracy == "vqa":
            return vqa_accuracy(answers, said)
        true, given = (self.tokenizer.decode(ids) for ids in self.tokenizer.encode([answers[0], said], 1000))
        return float(true == given)


def portions(counts: Sequence[int], most: int) -> Iterator[tuple[slice, slice]]:
    """Pictures in a row and texts in a row that go through the model together, all of them once.

    counts: texts of each picture. The grid of a portion, pictures by the fullest one's texts, has at most `most` places; where
    one picture has more texts, they come in several portions.
    """
    picture = text = 0
    while picture < len(counts):
        end, fullest = picture + 1, max(1, counts[picture])
        while end < len(counts) and (end - picture + 1) * max(fullest, counts[end]) <= most:
            fullest = max(fullest, counts[end])
            end += 1
        behind = text + sum(counts[picture:end])
        for start in range(text, behind, most if fullest > most else max(1, behind - text)):
            yield slice(picture, end), slice(start, min(behind, start + most) if fullest > most else behind)
        picture, text = end, behind


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def read_answers(answers: str | Sequence[str] | None) -> list[str]:
    """The answers to choose from: a list as it is, or the JSON file of one. ValueError says how to get one."""
    if answers is None:
        raise ValueError("evaluators.vqa.answers: inference=rank needs a list of answers; or set inference=generate")
    if not isinstance(answers, str):
        return list(answers)
    path = Path(answers)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no list of answers to rank; `blip data answers` makes one of the training questions' answers, or set "
            "evaluators.vqa.inference=generate"
        )
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, list) or not all(isinstance(answer, str) for answer in found):
        raise ValueError(f"{path}: expected a JSON list of answers")
    return found

"""A trained model in a few lines of Python: caption, answer, match and embed pictures.

    import blip
    model = blip.load("runs/.../checkpoints/last.ckpt")         # ours, a released .pth, or a folder of transformers
    model.caption("photo.jpg").text
    model.answer("photo.jpg", "what is on the table?").text      # of a model fine-tuned for questions
    model.match(["a.jpg", "b.jpg"], ["a dog", "a cat"])          # [2][2] of probability (ITM) and cosine (ITC)
    model.embed(pictures) @ model.embed_text(texts).T

A picture is a path, the bytes of a file, a PIL image, or an array [H, W, 3] uint8 (RGB). One picture gives one result, a list
gives a list. What a result is does not depend on what else is in the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from blip.loaded import Loaded, Picture, device_of
from blip.modules.checkpoint import read
from blip.modules.generation import Decoding, generate, noise
from blip.modules.matching import match
from blip.modules.vqa import VQA, Candidates, rank
from blip.text import Tokenizer, clean_question

PAPER = {  # section 5.2, as released (conf/decoding/beam.yaml): beam search over 3, at most 20 ids with [DEC] and the prompt
    "strategy": "beam", "max_length": 20, "min_length": 5, "beams": 3, "top_p": 0.9, "top_k": 0, "temperature": 1.0,
    "repetition_penalty": 1.0, "no_repeat_ngram": 0, "length_penalty": 1.0, "length_counts": "all", "samples": 1,
}  # fmt: skip
ANSWERS = PAPER | {"max_length": 10, "min_length": 1}  # the same of answers, section 5.3 (conf/task/vqa.yaml)
FIRST = 128  # of the answers to choose from so many are compared in full, by their first token, as released
SMOOTHING = 0.1  # of their likelihood, that of the training, as released
RELEASED_PROMPT = "a picture of"
TEXTS_AT_ONCE = 512  # that go through ITM together
MAX_QUESTION_WORDS = 50  # where the checkpoint does not say


@dataclass(frozen=True)
class Caption:
    """A caption without its prompt; log-probabilities are natural logarithms under the model's own distribution.

    log_prob is their sum over the written tokens, the end included; token_log_probs has one for each.
    """

    text: str
    log_prob: float
    mean_log_prob: float
    token_log_probs: tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """An answer and its log-probability: of all its tokens, the end included; in ranking with the training's label smoothing."""

    text: str
    log_prob: float


@dataclass(frozen=True)
class Match:
    """Whether a text fits a picture: probability by ITM, cosine of the ITC features."""

    probability: float
    cosine: float


def load(
    path: str | PathLike[str],
    tokenizer: str | PathLike[str] | None = None,
    device: str | torch.device | None = None,
    precision: str = "float32",
) -> Model:
    """The model of a checkpoint: ours (or the folder of its run), a released `.pth`, or a folder of transformers.

    tokenizer: a vocab.txt, a tokenizer.json or a folder with either, for files that hold none (released ones: BERT's). device:
    by default the GPU where there is one. precision: `float32`, or `bfloat16` for the model's products.
    ValueError: not a checkpoint, no vocabulary, or one of another size.
    """
    weights = read(Path(path))
    words = Tokenizer.load(Path(tokenizer)) if tokenizer is not None else None
    if words is None and not weights.tokenizer:
        raise ValueError(f"{path} holds no vocabulary: give the one it was trained with (tokenizer=vocab.txt)")
    words = words or Tokenizer.from_json(weights.tokenizer)
    return Model(weights, words, device_of(device), precision)


class Model(Loaded):
    """What `load` returns; a method that needs a part which the checkpoint lacks says so."""

    # what it says of pictures -----------------------------------------------------------------------------------------

    def caption(
        self, pictures: Picture | Sequence[Picture], prompt: str | None = None, seed: int = 0, **decoding: Any
    ) -> Any:
        """A `Caption` of each picture; with samples=n a list of n.

        prompt: words that each caption begins with, not part of it; by default those the model was trained with. decoding:
        what to change of the run's own decoding (else the paper's, `PAPER`): strategy (greedy, beam, nucleus), beams, top_p,
        samples, max_length, min_length ... as in `blip.modules.generation.Decoding`. Sampling draws from seed and picture.
        """
        how, begun = self.decoding(**decoding), self.prompt if prompt is None else prompt

        def say(pixels: list[np.ndarray]) -> list[Any]:
            said = self.write(pixels, [_seed(seed, each) for each in pixels], begun, how)
            return said if how.samples > 1 else [first for (first,) in said]

        return self._each(pictures, say)

    def write(
        self, pixels: Sequence[np.ndarray], seeds: Sequence[int], prompt: str, how: Decoding
    ) -> list[list[Caption]]:
        """`how.samples` captions of each picture, which are [S, S, 3] uint8 as `pixels` gives them; sampling draws from its seed."""
        self.needs("text decoder")
        tokenizer = self.tokenizer
        ids = [tokenizer.dec_id, *(tokenizer.encode([prompt], how.max_length)[0][1:-1] if prompt else [])]
        with self.quietly():
            cross = self.network.med.look(self.states(pixels), decoder=True)
            uniform = None
            if how.strategy == "nucleus":
                uniform = noise(seeds, how.samples, how.max_length - len(ids)).to(self.device)
            texts = generate(self.network.med, cross, ids, how, tokenizer.sep_id, tokenizer.pad_id, uniform)
        rows = zip(texts.ids.tolist(), texts.log_probs.tolist(), texts.written.tolist(), strict=True)
        said = [self._caption(row[len(ids) :], log_probs[:count]) for row, log_probs, count in rows]
        return [said[i : i + how.samples] for i in range(0, len(said), how.samples)]

    def answer(
        self,
        pictures: Picture | Sequence[Picture],
        questions: str | Sequence[str] | Sequence[Sequence[str]],
        choices: Sequence[str] | None = None,
        **decoding: Any,
    ) -> Any:
        """An `Answer` of each picture to each question: to one question one, to a list of questions a list.

        questions: the same of every picture, or a list of lists, which holds each picture's own.
        choices: answers to choose from, ranked in two stages as released; else the likeliest is written, by the run's own
        decoding (else the paper's, `ANSWERS`) but for what `decoding` changes. For models that were fine-tuned for questions.
        """
        if not isinstance(self.network, VQA):
            raise ValueError(f"{self.path} was not fine-tuned for questions: it has no decoder that looks at questions")
        network, tokenizer = self.network, self.tokenizer
        wanted = [questions] if isinstance(questions, str) else list(questions)
        own = bool(wanted) and not isinstance(wanted[0], str)
        lists: list[list[str]] = [list(each) for each in wanted] if own else [wanted]  # type: ignore[list-item]
        if not all(lists):
            raise ValueError("answer: no question is given")
        how = _decoding(self.said("task.evaluators.vqa.decoding") or ANSWERS, decoding)
        if how.strategy == "nucleus" or how.samples > 1:
            raise ValueError("an answer is the likeliest one: greedy or beam search, and samples=1")
        candidates = None
        if choices is not None:
            candidates = Candidates.of(tokenizer.encode(list(choices), network.config.med.positions), self.device)

        def say(pixels: list[np.ndarray]) -> list[Any]:
            asked = lists if own else lists * len(pixels)
            if len(asked) != len(pixels):
                raise ValueError(f"{len(asked)} lists of questions for {len(pixels)} pictures: one for each")
            texts = [text for each in asked for text in each]
            ids, layout = self.packed(texts, clean_question, MAX_QUESTION_WORDS)
            row = torch.tensor([n for n, each in enumerate(asked) for _ in each], device=self.device)
            looked = network.ask(ids, layout, network.med.look(self.states(pixels)), row)
            if candidates is None:
                told = generate(network.med, looked, [tokenizer.dec_id], how, tokenizer.sep_id, tokenizer.pad_id)
                rows = zip(told.ids.tolist(), told.log_probs.sum(1).tolist(), strict=True)
                said = [Answer(tokenizer.decode(row[1:]), log_prob) for row, log_prob in rows]
            else:
                ranking = rank(network, looked, candidates, FIRST, TEXTS_AT_ONCE, SMOOTHING)
                best = zip(ranking.best.tolist(), ranking.scores.amax(1).tolist(), strict=True)
                said = [Answer(choices[number], score) for number, score in best]  # type: ignore[index]
            each_in_turn = iter(said)
            return said if isinstance(questions, str) else [[next(each_in_turn) for _ in each] for each in asked]

        return self._each(pictures, say)

    def match(self, pictures: Picture | Sequence[Picture], texts: str | Sequence[str]) -> Any:
        """A `Match` of each picture with each text: for one text one, for a list of texts a list."""
        wanted = [texts] if isinstance(texts, str) else list(texts)
        if not wanted:
            raise ValueError("match: no text is given")

        def say(pixels: list[np.ndarray]) -> list[Any]:
            found = self.score(pixels, [wanted] * len(pixels))
            return [row[0] for row in found] if isinstance(texts, str) else found

        return self._each(pictures, say)

    def score(
        self, pixels: Sequence[np.ndarray], texts: Sequence[Sequence[str]], at_once: int = TEXTS_AT_ONCE
    ) -> list[list[Match]]:
        """A `Match` of each picture, [S, S, 3] uint8 as `pixels` gives them, with each of its own texts, which may be none.

        at_once: how many texts go through the model together at most.
        """
        self.needs("ITM head", "ITC projections")
        if len(texts) != len(pixels):
            raise ValueError(f"{len(texts)} lists of texts for {len(pixels)} pictures: one for each")
        row = [n for n, each in enumerate(texts) for _ in each]
        if not row:
            return [[] for _ in texts]
        ids = self.encode([text for each in texts for text in each])
        with self.quietly():
            found = match(self.network, self.states(pixels), ids, row, at_once)
        told = (Match(*each) for each in zip(*(x.tolist() for x in found), strict=True))
        return [[next(told) for _ in each] for each in texts]

    def embed(self, pictures: Picture | Sequence[Picture]) -> np.ndarray:
        """Unit vectors in the common space, [E] of a picture, [B, E] of a list, float32; their products are ITC's cosines."""
        self.needs("ITC projections")

        def features(pixels: list[np.ndarray]) -> list[np.ndarray]:
            return list(self.network.image_features(self.states(pixels)).cpu().numpy())

        found = self._each(pictures, features)
        return np.stack(found) if isinstance(found, list) else found

    def embed_text(self, texts: str | Sequence[str]) -> np.ndarray:
        """The same of texts: [E] of one, [R, E] of a list."""
        self.needs("ITC projections")
        ids, layout = self.packed([texts] if isinstance(texts, str) else list(texts))
        with self.quietly():
            found = self.network.text_features(ids, layout).cpu().numpy()
        return found[0] if isinstance(texts, str) else found

    # how it says it ---------------------------------------------------------------------------------------------------

    @cached_property
    def prompt(self) -> str:
        """What captions begin with: as the checkpoint's own run has it, in other layouts the released prompt."""
        if not self.config:
            return RELEASED_PROMPT
        return self.said("task.evaluators.caption.prompt") or ""

    def decoding(self, **changed: Any) -> Decoding:
        """The run's own decoding, else the paper's, with what is given changed. ValueError for a name or value that is none."""
        return _decoding(self.said("task.evaluators.caption.decoding") or PAPER, changed)

    # inside -----------------------------------------------------------------------------------------------------------

    def _each(self, pictures: Picture | Sequence[Picture], say: Callable[[list[np.ndarray]], list[Any]]) -> Any:
        """Runs `say` over the pixels of all pictures and gives one picture's result alone."""
        several = not isinstance(pictures, (str, bytes, PathLike, PIL.Image.Image, np.ndarray))
        pixels = [self.pixels(picture) for picture in (pictures if several else [pictures])]  # type: ignore
        if not pixels:
            return []
        with self.quietly():
            found = say(pixels)
        return found if several else found[0]

    def _caption(self, ids: list[int], log_probs: list[float]) -> Caption:
        total = sum(log_probs)
        return Caption(self.tokenizer.decode(ids), total, total / len(log_probs), tuple(log_probs))


def _decoding(node: Mapping[str, Any], changed: Mapping[str, Any]) -> Decoding:
    """What a node of a config says, with what is given changed. ValueError for a name or value that is none."""
    known = {field.name for field in fields(Decoding)}
    if unknown := set(changed) - known:
        raise ValueError(f"decoding has no {', '.join(sorted(unknown))}; choose from {', '.join(sorted(known))}")
    return Decoding(**{name: value for name, value in {**node, **changed}.items() if name in known})


def _seed(seed: int, pixels: np.ndarray) -> int:
    """A seed that depends on the picture and on `seed` alone."""
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "little") >> 1

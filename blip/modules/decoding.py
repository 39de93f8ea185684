"""How the next token is chosen from the model's distribution: settings, controls of length and repetition, the nucleus, a draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRATEGIES = ("greedy", "beam", "nucleus")
LENGTHS = ("all", "new")


@dataclass(frozen=True)
class Decoding:
    """How texts are written.

    max_length, min_length: ids with [DEC] and the prompt; [SEP] is banned while a text is shorter than min_length.
    beams: of beam search. top_p, top_k (0: off), temperature: of nucleus sampling. repetition_penalty and no_repeat_ngram (0:
    off) look back at the prompt, too. samples: texts of each picture (of beam search the best ones).
    length_penalty: beam search ranks by the sum of log-probabilities over the length to this power. length_counts: `all`,
    the whole length but [SEP], with the end of the search that goes with it (transformers 4.15, released), or `new`, what was
    written with [SEP], likewise (transformers today). early_stopping: the search of a picture ends with its first `beams` texts.
    """

    strategy: str
    max_length: int
    min_length: int
    beams: int
    top_p: float
    top_k: int
    temperature: float
    repetition_penalty: float
    no_repeat_ngram: int
    length_penalty: float
    length_counts: str
    samples: int
    early_stopping: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("strategy", STRATEGIES), ("length_counts", LENGTHS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"decoding.{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        sound = {
            "max_length": self.max_length >= 2,
            "min_length": self.min_length <= self.max_length,
            "beams": self.beams >= 1,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "temperature": self.temperature > 0,
            "repetition_penalty": self.repetition_penalty > 0,
            "no_repeat_ngram": self.no_repeat_ngram >= 0,
            "samples": self.samples >= 1,
        }
        if wrong := [f"{name}={getattr(self, name)}" for name, good in sound.items() if not good]:
            raise ValueError(f"decoding: {', '.join(wrong)} out of range")
        most = {"greedy": 1, "beam": self.beams, "nucleus": self.samples}[self.strategy]
        if self.samples > most:
            raise ValueError(
                f"decoding.samples={self.samples}: {self.strategy} writes at most {most} texts of a picture"
            )


def controlled(scores: Tensor, ids: Tensor, decoding: Decoding, end: int) -> Tensor:
    """Scores [..., V] of what follows ids [..., L], in place: repetition penalised, repeated n-grams and an early end banned."""
    if (penalty := decoding.repetition_penalty) != 1:
        met = scores.gather(-1, ids)
        scores.scatter_(-1, ids, torch.where(met < 0, met * penalty, met / penalty))
    size, length = decoding.no_repeat_ngram, ids.shape[-1]
    if 0 < size <= length:
        grams = ids.unfold(-1, size, 1)  # [..., W, n]
        begun = ids[..., None, length - size + 1 :]
        repeats = (grams[..., :-1] == begun).all(-1)
        banned = torch.where(
            repeats, grams[..., -1], scores.shape[-1]
        )  # what is not banned points behind the vocabulary
        mask = torch.zeros(*scores.shape[:-1], scores.shape[-1] + 1, dtype=torch.bool, device=scores.device)
        scores.masked_fill_(mask.scatter_(-1, banned, True)[..., :-1], float("-inf"))
    if length < decoding.min_length:
        scores[..., end] = float("-inf")
    return scores


def nucleus(scores: Tensor, decoding: Decoding) -> Tensor:
    """Weights [..., V] to draw by: temperature, the top k, then the fewest tokens that hold top_p; ties at an edge stay."""
    if decoding.temperature != 1:
        scores = scores / decoding.temperature
    if 0 < decoding.top_k < scores.shape[-1]:
        edge = scores.topk(decoding.top_k).values[..., -1:]
        scores = scores.masked_fill(scores < edge, float("-inf"))
    weights = scores.softmax(-1)
    return weights if decoding.top_p == 1 else weights.masked_fill(~heaviest(weights, decoding.top_p), 0.0)


def heaviest(weights: Tensor, share: float) -> Tensor:
    """True for the fewest weights [..., V] (which sum to 1) that hold `share`, those as float32 equal to the last as well.

    Without sorting, which for a whole vocabulary costs a CPU more than the output layer: the bits of a positive float32 are
    in its order, so the last one is found in three histograms: of the highest bits, then of lower ones among those.
    """
    bits = weights.float().view(torch.int32)  # below 2 ** 30, for no weight is above 1
    last, above, counted = bits.new_zeros(()).long(), weights.new_zeros(()), weights
    for shift in (20, 10, 0):
        key = (bits >> shift) & 1023
        held = weights.new_zeros(*weights.shape[:-1], 1024).scatter_add_(-1, key.long(), counted)
        higher = above + held.flip(-1).cumsum(-1).flip(-1) - held
        place = ((higher <= share) & (held > 0)).byte().argmax(-1, keepdim=True)
        counted, above = counted.masked_fill(key != place, 0.0), higher.gather(-1, place)
        last = (last << 10) + place
    return bits >= last


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [P, k]: the first whose running sum of weights [P, r, V] exceeds uniform [P, k] of the whole; r is k or 1."""
    sums = weights.cumsum(-1)
    whole = sums[..., -1:]
    level = uniform.to(sums.dtype).view(*whole.shape[:2], -1) * whole
    # Below the whole even where rounding has it otherwise, so that no token without weight is drawn.
    level = torch.minimum(level, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(sums, level, right=True).view(uniform.shape)


def noise(seeds: Sequence[int], samples: int, tokens: int) -> Tensor:
    """What sampling draws with, [B, samples, tokens] in [0, 1), each picture's from its own seed; made on the CPU."""
    return torch.stack([torch.rand(samples, tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

"""Writing texts with the decoder: greedy, beam search and nucleus sampling in one loop over a preallocated cache.

- `generate` writes from anything that has keys and values: a picture, the states of a question, frames
- keys and values of a picture exist once: its beams or samples are one row of queries (see `CrossAttention`), and the prompt
  is read once for all of them
- what a beam leaves behind is reordered in the cache of the self-attention alone
- texts that have ended leave the batch: every few tokens there is one look at the device, then complete pictures go, and as
  many samples of each as have ended in all
- nothing depends on the rest of the batch; the noise of sampling is drawn for each picture from its own seed (`noise`)
- how a token is chosen stands in `decoding.py`
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blip.layout import TextLayout
from blip.modules.decoding import Decoding, controlled, draw, noise, nucleus
from blip.modules.losses import at_least_float32
from blip.modules.med import MED, Cache, CrossKV
from blip.modules.packing import packed

__all__ = ["Decoding", "Texts", "generate", "noise"]

NEVER = float("-inf")
SHARE_LEFT = 0.75  # pictures leave when no more than this are left: keys and values of those that stay are copied


@dataclass(frozen=True)
class Texts:
    """What was written, the n texts of a picture one after the other; in beam search the best first.

    ids [B*n, L]: [DEC], prompt, text, [SEP] unless cut, then padding; lengths [B*n]: without the padding.
    log_probs [B*n, L - prompt]: of every written token, [SEP] too, under the model's own distribution (before penalties,
    temperature, top-k and top-p), 0 behind the end. score [B*n]: what beam search ranked by, else the sum of log_probs.
    """

    ids: Tensor
    log_probs: Tensor
    lengths: Tensor
    score: Tensor

    @property
    def written(self) -> Tensor:
        """[B*n]: how many tokens were written, [SEP] included."""
        return self.lengths - (self.ids.shape[1] - self.log_probs.shape[1])

    @property
    def mean_log_prob(self) -> Tensor:
        """[B*n]: the mean of a text's log_probs."""
        return self.log_probs.sum(1) / self.written


@torch.no_grad()
def generate(
    med: MED,
    cross: list[CrossKV],
    prompt: Sequence[int],
    decoding: Decoding,
    end: int,
    pad: int,
    uniform: Tensor | None = None,
) -> Texts:
    """`decoding.samples` texts for each of the B rows of `cross`, which is what `med.look(..., decoder=True)` gives.

    prompt: [DEC] and the ids that every text begins with. uniform: numbers in [0, 1) that nucleus sampling draws with, [B,
    samples, max_length - prompt] (`noise`). ValueError: no room for a token, or more beams or positions than there are.
    """
    positions, pieces = med.config.positions, med.config.vocab_size
    if not 0 < len(prompt) < decoding.max_length <= positions + 1:
        raise ValueError(
            f"decoding.max_length={decoding.max_length} must be more than the prompt's {len(prompt)} ids, [DEC] among "
            f"them, and at most {positions + 1}: model.med.positions and one"
        )
    if decoding.strategy == "beam" and 2 * decoding.beams > pieces:
        raise ValueError(f"decoding.beams={decoding.beams} is more than half of the {pieces} pieces")
    pictures, like = cross[0].key.shape[0], cross[0].key
    step = torch.tensor(prompt, device=like.device).expand(pictures, -1)
    dtype = torch.promote_types(like.dtype, torch.float32)
    search: Beams | Samples
    if decoding.strategy == "beam":
        search = Beams(step, decoding, end, pad, dtype)
    else:
        search = Samples(step, decoding, end, pad, dtype, uniform)
    if like.device.type == "cpu":  # where products would copy what is not contiguous, at every token
        cross = [CrossKV(kv.key.contiguous(), kv.value.contiguous(), kv.mask) for kv in cross]
    with packed(token_layers(med)) if like.device.type == "cpu" and like.dtype == torch.bfloat16 else nullcontext():
        write(med, cross, step, search)
    return search.texts()


def write(med: MED, cross: list[CrossKV], step: Tensor, search: Beams | Samples) -> None:
    """The loop: from the prompts [P, t] on until all texts are complete."""
    pictures, most = step.shape[0], search.decoding.max_length
    caches = med.caches(pictures, most - 1, cross[0].key)
    while True:
        logits = at_least_float32(next_logits(med, step, cross, caches))
        tokens, rows = search.step(logits.unflatten(0, (pictures, -1)))
        if search.length == most:
            return search.flush()
        if search.length % look_every(step.device) == 0 and (left := search.compact()) is not None:
            kept, still = left
            if not len(kept):
                return
            tokens, rows = tokens[still], still if rows is None else rows[still]
            if len(kept) < pictures:
                cross, pictures = [kv.select(kept) for kv in cross], len(kept)
        if rows is not None:
            caches = [cache.select(rows) for cache in caches]
        step = tokens[:, None]


def look_every(device: torch.device) -> int:
    """How many tokens to write between two looks at which texts have ended; elsewhere than on a CPU a look is a wait."""
    return 1 if device.type == "cpu" else 4


def token_layers(med: MED) -> list[nn.Linear]:
    """The linear layers that every token passes: the decoder's but for keys and values, and the output's."""
    named = [*med.decoder.named_modules(), *med.lm_head.named_modules()]
    return [layer for name, layer in named if isinstance(layer, nn.Linear) and not name.endswith("key_value")]


def next_logits(med: MED, step: Tensor, cross: list[CrossKV], caches: list[Cache]) -> Tensor:
    """Logits [R, V] of what follows ids [R, t], which follow what is cached."""
    layout = TextLayout.from_mask(torch.ones_like(step, dtype=torch.bool))
    # The class's own method, not one that was compiled for training: these caches grow with each token.
    states = type(med).decode(med, step.flatten(), layout, cross, caches)
    return med.lm_head(states.unflatten(0, step.shape)[:, -1])


class Search:
    """P pictures whose texts are being written, k of each side by side; what is complete lies in the order of all B."""

    def __init__(self, prompt: Tensor, decoding: Decoding, end: int, pad: int, dtype: torch.dtype, rows: int) -> None:
        self.decoding, self.end, self.pad = decoding, end, pad
        pictures, self.length = prompt.shape
        self.prompt, self.room = self.length, decoding.max_length - self.length
        count, device = decoding.samples, prompt.device
        self.ids = torch.full((pictures, rows, decoding.max_length), pad, device=device)  # [P, k, max_length]
        self.ids[..., : self.length] = prompt[:, None]
        self.log_probs = torch.zeros(pictures, rows, self.room, dtype=dtype, device=device)  # [P, k, new]
        self.place = torch.arange(pictures * count, device=device).view(pictures, count)  # where a text belongs
        self.complete_ids = torch.full((pictures * count, decoding.max_length), pad, device=device)
        self.complete_log_probs = torch.zeros(pictures * count, self.room, dtype=dtype, device=device)
        self.score = torch.zeros(pictures * count, dtype=dtype, device=device)

    def put(self, ids: Tensor, log_probs: Tensor, score: Tensor) -> None:
        """Keeps texts [P, n, ...] as they are now."""
        place = self.place.flatten()
        self.complete_ids[place] = ids.flatten(0, 1)
        self.complete_log_probs[place] = log_probs.flatten(0, 1)
        self.score[place] = score.flatten()

    def texts(self) -> Texts:
        """All that is complete, as wide as the longest."""
        ended = self.complete_ids[:, self.prompt :] == self.end
        new = torch.where(ended.any(1), ended.byte().argmax(1) + 1, self.room)
        most = int(new.max())
        ids, log_probs = self.complete_ids[:, : self.prompt + most], self.complete_log_probs[:, :most]
        return Texts(ids, log_probs, self.prompt + new, self.score)


class Samples(Search):
    """Texts that are written each for itself: greedily, or drawn from the nucleus."""

    def __init__(
        self, prompt: Tensor, decoding: Decoding, end: int, pad: int, dtype: torch.dtype, uniform: Tensor | None
    ) -> None:
        super().__init__(prompt, decoding, end, pad, dtype, rows=decoding.samples)
        self.ended = torch.zeros_like(self.place, dtype=torch.bool)
        self.uniform = None
        if decoding.strategy == "nucleus":
            wanted, given = [*self.place.shape, self.room], [] if uniform is None else list(uniform.shape)
            if uniform is None or given != wanted:
                raise ValueError(f"nucleus sampling draws with numbers of shape {wanted}, not {given}")
            self.uniform = uniform.to(prompt.device)

    def step(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Takes logits [P, r, V], after the prompt r = 1: the tokens of all rows, and whence rows come that have moved."""
        pictures, rows = self.ended.shape
        new, before = self.length - self.prompt, logits.shape[1]
        scores = controlled(logits.clone(), self.ids[:, :before, : self.length], self.decoding, self.end)
        if self.uniform is None:
            tokens = scores.argmax(-1)
        else:
            tokens = draw(nucleus(scores, self.decoding), self.uniform[..., new])
        told = logits.expand(-1, rows, -1).gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)
        self.log_probs[..., new] = told.masked_fill(self.ended, 0.0)
        tokens = tokens.masked_fill(self.ended, self.pad)
        self.ids[..., self.length] = tokens
        self.ended = self.ended | (tokens == self.end)
        self.length += 1
        came = None if before == rows else torch.arange(pictures, device=tokens.device).repeat_interleave(rows)
        return tokens.flatten(), came

    def compact(self) -> tuple[Tensor, Tensor] | None:
        """Drops complete pictures, and as many rows as have ended in each. Which pictures and rows are left; None: all."""
        (pictures, rows), counts = self.ended.shape, (~self.ended).sum(1).tolist()
        left = [picture for picture, count in enumerate(counts) if count]
        most = max(counts)
        if len(left) > SHARE_LEFT * pictures:
            left = list(range(pictures))
        if len(left) == pictures and most == rows:
            return None
        self.flush()
        kept = torch.tensor(left, dtype=torch.long, device=self.ids.device)
        order = self.ended[kept].byte().argsort(dim=1, stable=True)[:, :most]  # those that go on come first
        self.ids, self.log_probs = take(self.ids[kept], order), take(self.log_probs[kept], order)
        self.place, self.ended = take(self.place[kept], order), take(self.ended[kept], order)
        self.uniform = None if self.uniform is None else take(self.uniform[kept], order)
        return kept, (kept[:, None] * rows + order).flatten()

    def flush(self) -> None:
        self.put(self.ids, self.log_probs, self.log_probs.sum(-1))


class Beams(Search):
    """Beam search: the `beams` best texts that go on, and the `beams` best that have ended."""

    def __init__(self, prompt: Tensor, decoding: Decoding, end: int, pad: int, dtype: torch.dtype) -> None:
        super().__init__(prompt, decoding, end, pad, dtype, rows=1)
        self.sums = self.log_probs.new_zeros(self.log_probs.shape[:2])  # [P, k] of the texts that go on
        self.done = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
        self.best_ids, self.best_log_probs = (x.expand(-1, decoding.beams, -1) for x in (self.ids, self.log_probs))
        self.best = self.sums.new_full((prompt.shape[0], decoding.beams), NEVER)  # [P, K] scores, descending

    def step(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Takes logits [P, r, V], after the prompt r = 1: the tokens of the texts that go on, and which rows these follow."""
        pictures, rows, pieces = logits.shape
        beams, power, new = self.decoding.beams, self.decoding.length_penalty, self.decoding.length_counts == "new"
        whole = logits.logsumexp(-1, keepdim=True)
        scores = controlled(logits - whole, self.ids[..., : self.length], self.decoding, self.end)
        sums, flat = (scores + self.sums[..., None]).flatten(1).topk(2 * beams)  # [P, 2K]
        origin, tokens = flat // pieces, flat % pieces
        ids, log_probs = take(self.ids, origin), take(self.log_probs, origin)
        ids[..., self.length] = tokens
        log_probs[..., self.length - self.prompt] = logits.flatten(1).gather(1, flat) - take(whole[..., 0], origin)

        ended, last = tokens == self.end, self.length + 1 == self.decoding.max_length
        going = ended.byte().argsort(dim=1, stable=True)[:, :beams]  # of 2K candidates at most K have ended
        first = torch.arange(2 * beams, device=ids.device) < beams  # the others only see to it that enough go on
        length = self.length + 1 - self.prompt if new else self.length
        self.offer(sums / length**power, (ended | (new and last)) & first, ids, log_probs)
        hope = take(sums, going)[:, 0] if new else sums[:, 0]
        worst = self.best[:, -1]
        self.done |= (worst > NEVER) & (self.decoding.early_stopping | (worst >= hope / length**power))
        self.ids, self.log_probs, self.sums = take(ids, going), take(log_probs, going), take(sums, going)
        if last and not new:
            everything = torch.ones_like(going, dtype=torch.bool)
            self.offer(self.sums / (length + 1) ** power, everything, self.ids, self.log_probs)
        self.length += 1
        start = torch.arange(pictures, device=ids.device)[:, None] * rows
        return take(tokens, going).flatten(), (start + take(origin, going)).flatten()

    def offer(self, scores: Tensor, complete: Tensor, ids: Tensor, log_probs: Tensor) -> None:
        """Puts complete texts among the best, where the picture's search is not over."""
        scores = scores.masked_fill(~complete | self.done[:, None], NEVER)
        scores, order = torch.cat([self.best, scores], 1).sort(dim=1, descending=True, stable=True)
        order = order[:, : self.decoding.beams]
        self.best = scores[:, : self.decoding.beams]
        self.best_ids = take(torch.cat([self.best_ids, ids], 1), order)
        self.best_log_probs = take(torch.cat([self.best_log_probs, log_probs], 1), order)

    def compact(self) -> tuple[Tensor, Tensor] | None:
        """Drops pictures whose search is over. Which pictures and rows are left; None: all."""
        kept = (~self.done).nonzero().flatten()
        if len(kept) > SHARE_LEFT * len(self.done):
            return None
        self.flush()
        for name in ("ids", "log_probs", "sums", "best_ids", "best_log_probs", "best", "done", "place"):
            setattr(self, name, getattr(self, name)[kept])
        beams = self.decoding.beams
        return kept, (kept[:, None] * beams + torch.arange(beams, device=kept.device)).flatten()

    def flush(self) -> None:
        count = self.decoding.samples
        self.put(self.best_ids[:, :count], self.best_log_probs[:, :count], self.best[:, :count])


def take(x: Tensor, order: Tensor) -> Tensor:
    """For each picture the rows [P, m] of x [P, k, ...]."""
    return x.gather(1, order.view(*order.shape, *[1] * (x.dim() - 2)).expand(*order.shape, *x.shape[2:]))

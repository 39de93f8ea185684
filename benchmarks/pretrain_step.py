"""A pre-training step of the base model at 224 px: pairs a second, FLOPs a pair, and the share of the device's matrix rate.

    python -m benchmarks.pretrain_step [--batch N] [--device cuda] [--repeats N] [--json FILE]

Beside it, in the same run and turn by turn, the same step computed the released way, written out here plainly: four passes
of padded texts, keys and values of the picture anew for each, logits for every position. Both share the image encoders, the
update of the momentum encoders, the draws and the loss functions, so that they give the same losses (a test says so); the
optimizer's step is left out of both. FLOPs are counted at batch 75 by torch over tensors without numbers.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from benchmarks.report import begin, end, row
from benchmarks.turns import clock
from blip.layout import TextLayout
from blip.modules.blip import BLIP
from blip.modules.flops import counter, pretraining_flops
from blip.modules.losses import draw, itm_loss, negative_weights
from blip.modules.med import CrossAttention, FeedForward, SelfAttention
from blip.overrides import CONF
from blip.tasks.pretrain import PretrainTask

PADDED = 30  # tokens: what the released code pads every caption to
COUNTED_BATCH = 75
# Captions of n tokens, [CLS] and [SEP] among them, in each 998: 5,393 captions of COCO's val2017, of the Karpathy val and test
# splits and of some train2017 photos (excerpts, mean 13.04 by BERT's vocabulary), tilted by exp(0.058 n) to the mean of 13.5
# that is reported for the whole. An approximation.
LENGTHS = {
    **{9: 3, 10: 91, 11: 158, 12: 179, 13: 169, 14: 137, 15: 91, 16: 55, 17: 36, 18: 22, 19: 14, 20: 11, 21: 5, 22: 5},
    **{23: 6, 24: 2, 25: 4, 26: 2, 27: 1, 28: 1, 29: 1, 30: 5},
}


@dataclass
class Pairs:
    """What the step reads of a batch."""

    image: Tensor
    input_ids: Tensor
    layout: TextLayout
    image_ids: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Pairs:
        layout = TextLayout(*(change(t) for t in (self.layout.index, self.layout.mask, self.layout.firsts)))
        return Pairs(change(self.image), change(self.input_ids), layout, change(self.image_ids))


def lengths(batch: int, seed: int) -> list[int]:
    """Tokens of each caption, drawn from COCO's spread."""
    return random.Random(seed).choices(list(LENGTHS), list(LENGTHS.values()), k=batch)


def some_pairs(batch: int, image_size: int, vocabulary: int, seed: int) -> Pairs:
    sizes = lengths(batch, seed)
    generator = torch.Generator().manual_seed(seed)
    return Pairs(
        torch.randn(batch, 3, image_size, image_size, generator=generator),
        torch.randint(5, vocabulary - 2, (sum(sizes),), generator=generator),
        TextLayout.from_lengths(sizes),
        torch.arange(batch),
    )


class Alone(PretrainTask):
    """The task in the middle of a run, without a trainer."""

    progress, global_step = 0.5, 0  # type: ignore[assignment]

    def forward(self, batch: Pairs, released: bool) -> Tensor:
        self.pending = []
        return released_step(self, batch) if released else self.training_step(batch, 0)

    def uniform(self, size: int) -> Tensor:
        device = self.queue.image.device
        return torch.rand(2, size, generator=torch.Generator(device).manual_seed(0), device=device)

    def log(self, *args: Any, **kwargs: Any) -> None: ...

    def log_dict(self, *args: Any, **kwargs: Any) -> None: ...


def base_task() -> Alone:
    """ViT-B/16 and BERT base as `experiment=pretrain_14m_vit_b` has them; the vocabulary has BERT's size."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", ["experiment=pretrain_14m_vit_b"])
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(30522 - 5))]
    vocabulary = {word: i for i, word in enumerate(words)}
    return Alone(
        OmegaConf.to_container(config.task.objectives, resolve=True),  # type: ignore[arg-type]
        config.data.max_tokens,
        model=OmegaConf.to_container(config.model, resolve=True),
        tokenizer=tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")).to_str(),
        optimizer=None,
        schedule=None,
        evaluators={},
    ).train()


# --- the released way ---------------------------------------------------------------------------------------------------


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None, dropout: float) -> Tensor:
    """Written out over heads: [B, L, D] looks at [B, N, D]; `mask` broadcasts to [B, H, L, N]."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (F.dropout(scores.softmax(-1), dropout) @ value).transpose(1, 2).flatten(2)


def padded_block(
    own: SelfAttention,
    cross: CrossAttention | None,
    feed_forward: FeedForward,
    x: Tensor,
    mask: Tensor,
    states: Tensor | None,
) -> Tensor:
    """One block over padded texts [B, L, D]; keys and values of the states [B, N, look_width] are computed here."""
    looked = attention(*own.qkv(x).chunk(3, -1), own.heads, mask, own.attention_dropout)
    x = own.norm(x + own.dropout(own.out(looked)))
    if cross is not None and states is not None:
        looked = attention(
            cross.query(x), *cross.key_value(states).chunk(2, -1), cross.heads, None, cross.attention_dropout
        )
        x = cross.norm(x + cross.dropout(cross.out(looked)))
    return feed_forward(x)


def padded_text(
    model: BLIP, blocks: nn.ModuleList, ids: Tensor, mask: Tensor, states: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Padded ids [B, L] through one mode, every position computed, [B, L, D]."""
    med, width = model.med, ids.shape[1]
    x = med.embeddings(ids, torch.arange(width, device=ids.device))
    may_look = mask[:, None, None]
    if causal:
        may_look = may_look & torch.ones(width, width, dtype=torch.bool, device=ids.device).tril()
    for block in blocks:
        x = padded_block(block.self_attention, block.cross_attention, block.feed_forward, x, may_look, states)
    return x


def released_step(task: Alone, batch: Pairs) -> Tensor:
    """ITC, ITM and LM of the same batch in separate passes over padded texts."""
    model, momentum, goals = task.model, task.momentum, task.objectives
    med, size = model.med, batch.image.shape[0]
    fill = (0, PADDED - batch.layout.longest)
    ids, mask = F.pad(batch.layout.pad(batch.input_ids), fill), F.pad(batch.layout.mask, fill)  # [B, 30]

    image_states = model.visual_encoder(batch.image)
    image_features = model.image_features(image_states)
    states = padded_text(model, med.encoder, ids, mask)
    text_features = F.normalize(model.text_proj(states[:, 0]).float(), dim=-1)
    momentum.update(model, goals.momentum)
    with torch.no_grad():
        momentum_image = F.normalize(momentum.vision_proj(momentum.visual_encoder(batch.image)[:, 0]).float(), dim=-1)
        x = momentum.embeddings(ids, torch.arange(PADDED, device=ids.device))
        for self_attention, feed_forward in zip(momentum.self_attentions, momentum.feed_forwards, strict=True):
            x = padded_block(self_attention, None, feed_forward, x, mask[:, None, None], None)
        momentum_text = F.normalize(momentum.text_proj(x[:, 0]).float(), dim=-1)
    with torch.autocast(batch.image.device.type, enabled=False):
        itc, image_similarity, text_similarity = task.contrast(
            image_features, text_features, momentum_image, momentum_text, batch.image_ids
        )

    admissible = batch.image_ids[:, None] != batch.image_ids
    uniform = task.uniform(size)
    pictures, _ = draw(negative_weights(text_similarity[:, :size], admissible, goals.negative_floor), uniform[0])
    texts, _ = draw(negative_weights(image_similarity[:, :size], admissible, goals.negative_floor), uniform[1])
    asked = ids.index_fill(1, torch.zeros(1, dtype=torch.long, device=ids.device), model.config.enc_id)
    matching = padded_text(model, med.encoder, asked, mask, image_states)
    # The two kinds of negatives are one pass of 2B rows: texts with drawn pictures, then drawn texts with pictures.
    mismatching = padded_text(
        model,
        med.encoder,
        torch.cat([asked, asked[texts]]),
        torch.cat([mask, mask[texts]]),
        torch.cat([image_states[pictures], image_states]),
    )
    logits = model.itm_head(torch.cat([matching[:, 0], mismatching[:, 0]])).float()  # [3B, 2]
    matched = torch.arange(3 * size, device=logits.device) < size
    itm = itm_loss(logits, matched, torch.ones_like(matched))

    begun = ids.index_fill(1, torch.zeros(1, dtype=torch.long, device=ids.device), model.config.dec_id)
    logits = med.lm_head(padded_text(model, med.decoder, begun, mask, image_states, causal=True)).float()  # [B, 30, V]
    told = ids.masked_fill(~mask, -100)[:, 1:]
    lm = F.cross_entropy(logits[:, :-1].flatten(0, 1), told.flatten(), label_smoothing=goals.label_smoothing)
    return goals.itc_weight * itc + goals.itm_weight * itm + goals.lm_weight * lm


# --- the measurement ----------------------------------------------------------------------------------------------------


def counted(task: Alone, batch: Pairs, released: bool) -> int:
    """FLOPs of a real forward and backward pass in bf16 over tensors without numbers, for the whole batch.

    `task` stands on the meta device and is of no other use afterwards; in bf16 on a CPU attention is written out, so that each of its products is seen.
    """
    with FakeTensorMode() as mode:
        own = {
            name: torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad)
            for name, t in [*task.named_parameters(), *task.named_buffers()]
        }
        with torch.autocast("cpu", torch.bfloat16), counter() as flops:
            functional_call(task, own, (batch.each(mode.from_tensor), released)).backward()
    return flops.get_total_flops()


def hollow_task() -> Alone:
    """The task on the meta device: shapes alone."""
    with torch.device("meta"):
        return base_task()


def count() -> tuple[list[dict], list[str]]:
    """FLOPs a pair of both ways at batch 75, as rows of the JSON contract and as lines for the reader."""
    task = hollow_task()
    config = task.model.config
    batch = some_pairs(COUNTED_BATCH, config.vit.image_size, config.med.vocab_size, seed=0)
    ours, released = (counted(task, batch, way) / COUNTED_BATCH / 1e9 for way in (False, True))
    closed = task.flops_per_pair(batch) / 1e9
    draws = [lengths(COUNTED_BATCH, seed) for seed in range(1000)]
    keys = COUNTED_BATCH + task.objectives.queue_size
    parts = [pretraining_flops(config, COUNTED_BATCH, sum(sizes), max(sizes), keys) for sizes in draws]
    share = {name: statistics.mean(step[name].total for step in parts) / COUNTED_BATCH / 1e9 for name in parts[0]}
    rows = [
        row("FLOPs a pair, counted", ours, "GFLOP", "released way, counted", released),
        row("FLOPs a pair, counted", ours, "GFLOP", "closed form, same batch", closed),
        row("FLOPs a pair, closed form, mean of 1,000 batches", sum(share.values()), "GFLOP", "limit", 215.0),
    ]
    return rows, [f"| {name} | {value:.2f} |" for name, value in share.items()]


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of square matrix products, kept up for about so many seconds."""
    side = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    a @ b
    done, start = 0, clock(device)
    while clock(device) - start < seconds:
        a @ b
        done += 1
    return done * 2 * side**3 / (clock(device) - start)


def measure(batch_size: int, device: torch.device, dtype: torch.dtype, repeats: int) -> list[dict]:
    """Seconds of both ways and the matrix rate, taking turns; medians, as rows of the JSON contract."""
    torch.manual_seed(0)
    task = base_task().to(device)
    config = task.model.config
    batch = some_pairs(batch_size, config.vit.image_size, config.med.vocab_size, seed=0)
    flops = task.flops_per_pair(batch) * batch_size
    released_flops = counted(hollow_task(), batch, released=True)
    batch = batch.each(lambda t: t.to(device))

    def seconds(released: bool) -> float:
        task.zero_grad(set_to_none=True)
        start = clock(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = task(batch, released)
        loss.backward()
        return clock(device) - start

    rates: list[float] = []
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(-1, repeats):
        for released in (False, True):
            rate, spent = matrix_rate(device, dtype, seconds=1.0), seconds(released)
            if turn >= 0:  # the first turn warms caches and allocators
                rates.append(rate)
                times[released].append(spent)
    ours, released_time, rate = (statistics.median(values) for values in (times[False], times[True], rates))
    ratio = statistics.median(b / a for a, b in zip(times[False], times[True], strict=True))
    print(f"seconds a step, turn by turn: {times[False]} beside {times[True]}; median of the ratios {ratio:.3f}")
    return [
        row("pairs/s", batch_size / ours, "pairs/s", "released way", batch_size / released_time),
        row("MFU", flops / ours / rate, "fraction", "released way", released_flops / released_time / rate),
        row("FLOP/s in the step", flops / ours / 1e9, "GFLOP/s", "matrix rate", rate / 1e9),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="pairs in the timed step (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: %(default)s")
    parser.add_argument(
        "--float32", action="store_true", help="time the step in float32 instead of bf16 mixed precision"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed turns (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    dtype = torch.float32 if options.float32 else torch.bfloat16
    head = begin(
        f"random pictures of 224 px; counted at batch {COUNTED_BATCH}, timed at {options.batch} in {dtype}, "
        f"median of {options.repeats} turns",
        options.device,
    )
    rows, parts = count()
    print("\n| part | GFLOP a pair, forward and backward |\n|---|---|", *parts, sep="\n")
    rows += measure(options.batch, options.device, dtype, options.repeats)
    end(head, rows, options.json)


if __name__ == "__main__":
    main()

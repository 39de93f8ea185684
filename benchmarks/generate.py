"""Captions a second of the base model at 384 px: nucleus sampling and beam search, beside transformers and the bare encoder.

    python -m benchmarks.generate [--batch N] [--tokens N] [--device cuda] [--float32] [--repeats N] [--json FILE]

Transformers' BLIP gets the same weights, pictures and prompt in the same run, turn by turn. Every text is as long (the end is
banned), so that all do the same work; weights are random, which changes no product. The image encoder alone is the limit;
what comes on top cannot be less than the arithmetic of keys, values and tokens at the encoder's FLOP/s, nor, with that of
keys and values, than reading the decoder's weights once a token at the memory's rate, measured here: both floors are printed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import begin, end, row
from benchmarks.turns import clock, taken
from blip.modules.blip import BLIP
from blip.modules.checkpoint import Weights, load, sizes
from blip.modules.decoding import Decoding, noise
from blip.modules.flops import blocks_flops, look_flops, stem_flops, text_flops
from blip.modules.generation import Texts, generate
from blip.modules.names import from_transformers

END, PAD = 102, 0
PROMPT = [30522, 1037, 3861, 1997]  # [DEC] a picture of, by BERT's vocabulary
PLAIN = Decoding(
    strategy="greedy",
    max_length=20,
    min_length=20,
    beams=1,
    top_p=0.9,
    top_k=0,
    temperature=1.0,
    repetition_penalty=1.0,
    no_repeat_ngram=0,
    length_penalty=1.0,
    length_counts="new",
    samples=1,
)
WAYS = {"nucleus": replace(PLAIN, strategy="nucleus"), "beam 3": replace(PLAIN, strategy="beam", beams=3)}
THEIR_WAYS: dict[str, dict[str, Any]] = {
    "nucleus": {"do_sample": True, "top_p": 0.9, "top_k": 0},
    "beam 3": {"do_sample": False, "num_beams": 3},
}


def models(dtype: torch.dtype, device: torch.device) -> tuple[BLIP, Any]:
    """Our captioner and transformers' of the base size, with the same random weights."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {"vocab_size": 30524, "encoder_hidden_size": 768, "bos_token_id": 30522, "sep_token_id": END}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "image_size": 384, "layer_norm_eps": 1e-6}
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config=vision)
    theirs: Any = BlipForConditionalGeneration(config)
    theirs.to(dtype).eval()
    tensors, dropped = from_transformers(theirs.state_dict())
    weights = Weights(Path("transformers"), "transformers", tensors, dropped)
    ours = BLIP(sizes(tensors, (12, 12), dropout=0.0), encoder=False).to(dtype).eval().requires_grad_(False)
    load(ours, weights)
    return ours.to(device), theirs.to(device)


def captions(model: BLIP, image: Tensor, how: Decoding) -> Texts:
    cross = model.med.look(model.visual_encoder(image), decoder=True)
    uniform = noise(range(len(image)), how.samples, how.max_length - len(PROMPT)) if how.strategy == "nucleus" else None
    return generate(model.med, cross, PROMPT, how, END, PAD, uniform)


def their_captions(model: Any, image: Tensor, how: Decoding, way: dict[str, Any]) -> Tensor:
    prompt = torch.tensor([[*PROMPT, END]], device=image.device).repeat(len(image), 1)
    lengths = {"max_length": how.max_length, "min_length": how.min_length}
    return model.generate(pixel_values=image, input_ids=prompt, **lengths, **way)


def flops(model: BLIP, how: Decoding) -> tuple[int, int, int]:
    """FLOPs of a picture: the image encoder, keys and values, and everything that the decoder does for its tokens."""
    vit, med = model.config.vit, model.config.med
    written, rows = how.max_length - len(PROMPT), how.beams if how.strategy == "beam" else how.samples
    tokens = len(PROMPT) + rows * (written - 1)  # the prompt is read once, the last token is not read
    told = 1 + rows * (written - 1)
    head = told * 2 * med.width * (med.width + med.vocab_size)
    text = text_flops(med, tokens, 1, tokens, vit.tokens)
    return sum(stem_flops(vit)) + blocks_flops(vit), look_flops(med, vit.tokens), text + head


def decoder_bytes(model: BLIP) -> int:
    """What a token makes the decoder read: all of its matrices but those of keys and values, and the output's."""
    once = {id(p) for block in model.med.blocks(decoder=True) for p in block.cross_attention.key_value.parameters()}
    read = [p for part in (model.med.decoder, model.med.lm_head) for p in part.parameters() if id(p) not in once]
    return sum(p.numel() * p.element_size() for p in read)


def memory_rate(device: torch.device, size: int) -> float:
    """Bytes a second that a sum over float32 numbers reads; more of them than fit a cache."""
    numbers = torch.ones(size // 4, device=device)
    numbers.sum()
    times = []
    for _ in range(5):
        start = clock(device)
        numbers.sum()
        times.append(clock(device) - start)
    return numbers.numel() * 4 / statistics.median(times)


@torch.inference_mode()
def measure(batch: int, tokens: int, device: torch.device, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Medians over turns, as rows of the JSON contract."""
    ours, theirs = models(dtype, device)
    image = torch.randn(batch, 3, 384, 384, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    ways = {name: replace(how, max_length=4 + tokens, min_length=4 + tokens) for name, how in WAYS.items()}
    runs: dict[str, Callable[[], Any]] = {"encoder": partial(ours.visual_encoder, image)}
    for name, how in ways.items():
        runs[name] = partial(captions, ours, image, how)
        runs[f"{name}, transformers"] = partial(their_captions, theirs, image, how, THEIR_WAYS[name])
    turns = taken(runs, repeats, device)
    ratio, seconds = turns.ratio, {name: turns.seconds(name) for name in runs}
    rate, read = memory_rate(device, size=2**29), decoder_bytes(ours)
    print(f"memory: {rate / 1e9:.1f} GB/s; a token reads {read / 1e6:.0f} MB of weights")
    rows = []
    for name, how in ways.items():
        encoder, look, text = flops(ours, how)
        reading = tokens * read / rate / seconds["encoder"]  # in units of the encoder's time
        made = row(f"{name}: captions/s", batch / seconds[name], "captions/s", "transformers", 1.0)
        made["peer_value"] = round(batch / seconds[f"{name}, transformers"], 4)
        rows.append(made | {"ratio": round(ratio(name, f"{name}, transformers"), 4)})
        made = row(f"{name}: captions/s", batch / seconds[name], "captions/s", "image encoder alone", 1.0)
        made["peer_value"] = round(batch / seconds["encoder"], 4)
        rows.append(made | {"ratio": round(ratio(name, "encoder"), 4)})
        share, theirs_share = ratio(name, "encoder"), ratio(f"{name}, transformers", "encoder")
        allowed, floor = encoder / (encoder + look + text), 1 / (1 + look / encoder + max(text / encoder, reading))
        for peer, value in (
            ("transformers'", theirs_share),
            ("allowed by arithmetic", allowed),
            ("allowed by reading the weights once a token", floor),
        ):
            rows.append(row(f"{name}: share of the encoder's rate", share, "fraction", peer, value))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="pictures at once (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each caption (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: %(default)s")
    parser.add_argument("--float32", action="store_true", help="float32 instead of bf16")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    dtype = torch.float32 if options.float32 else torch.bfloat16
    import transformers

    head = begin(
        f"{options.batch} random pictures of 384 px at once, {options.tokens} new tokens behind a prompt of 4, "
        f"{dtype}, median of {options.repeats} turns",
        options.device,
        transformers=transformers.__version__,
    )
    rows = measure(options.batch, options.tokens, options.device, dtype, options.repeats)
    end(head, rows, options.json)


if __name__ == "__main__":
    main()

"""Filtering by the base model at 384 px: pictures a second with their texts, beside transformers pair by pair and the bare encoder.

    python -m benchmarks.filter [--batch N] [--texts N] [--device cuda] [--float32] [--repeats N] [--json FILE]

`MatchScorer` from pixels and words to ITM and ITC. Transformers' `BlipForImageTextRetrieval` has the same weights, converted by
`blip convert`, in the same run, turn by turn, and scores each pair by itself, ITM alone: its pictures are already normalised,
its texts already pieces. The image encoder alone is the limit; the share of its rate that arithmetic allows stands beside.
Weights are random; texts have COCO's lengths. ValueError where the two don't say the same.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.pretrain_step import lengths
from benchmarks.report import begin, end, row
from benchmarks.rerank import base
from benchmarks.turns import taken
from blip.capfilt.filter import MatchScorer
from blip.modules.blip import BLIP, BLIPConfig
from blip.modules.checkpoint import convert, nodes
from blip.modules.flops import blocks_flops, look_flops, stem_flops, text_flops
from blip.modules.vit import normalize
from blip.text import BERT_TOKENS

AGREE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # logits of ITM at most apart


def vocabulary(config: BLIPConfig) -> list[str]:
    """As many pieces as the model has less the two that BLIP appends, each a word that stands by itself."""
    return [*BERT_TOKENS, *(f"w{n}" for n in range(config.med.vocab_size - 2 - len(BERT_TOKENS)))]


def models(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[MatchScorer, Any]:
    """Our scorer and transformers' model, of the same random weights in two files."""
    import transformers

    config = base()
    (folder / "vocab.txt").write_text("\n".join(vocabulary(config)))
    torch.manual_seed(0)
    state = {f"model.{name}": tensor for name, tensor in BLIP(config, decoder=False).state_dict().items()}
    torch.save({"state_dict": state, "config": json.dumps({"model": nodes(config)})}, folder / "model.ckpt")
    convert(folder / "model.ckpt", folder / "theirs", "transformers", "BlipForImageTextRetrieval")
    precision = str(dtype).removeprefix("torch.")
    ours = MatchScorer(folder / "model.ckpt", folder / "vocab.txt", device, precision)
    theirs = transformers.BlipForImageTextRetrieval.from_pretrained(folder / "theirs", dtype=dtype).eval().to(device)
    return ours, theirs


def their_logits(model: Any, image: Tensor, ids: list[list[int]], each: int) -> Tensor:
    """[R, 2]: each pair by itself, as many at once as there are pictures; [ENC] replaces [CLS] as in the released training."""
    found = []
    for start in range(0, len(ids), len(image)):
        some = [torch.tensor(text) for text in ids[start : start + len(image)]]
        padded = torch.nn.utils.rnn.pad_sequence(some, batch_first=True).to(image.device)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in some], batch_first=True)
        mask = mask.to(image.device)
        shown = image[[n // each for n in range(start, start + len(some))]]
        found.append(model(input_ids=padded, attention_mask=mask, pixel_values=shown, use_itm_head=True)[0])
    return torch.cat(found)


def flops(config: BLIPConfig, ids: list[list[int]]) -> tuple[int, int]:
    """FLOPs of a picture in the image encoder, and of all that comes on top for texts, all pictures together."""
    vit, med = config.vit, config.med
    tokens, longest = sum(map(len, ids)), max(map(len, ids))
    alone = text_flops(med, tokens, len(ids), longest)
    looking = alone + med.depth * tokens * (4 * med.width**2 + 4 * vit.tokens * med.width)
    return sum(stem_flops(vit)) + blocks_flops(vit), alone + looking


@torch.inference_mode()
def measure(batch: int, each: int, device: torch.device, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Medians over turns, as rows of the JSON contract."""
    with TemporaryDirectory() as folder:
        ours, theirs = models(Path(folder), device, dtype)
    config, network, tokenizer = base(), ours.model.network, ours.model.tokenizer
    draw = np.random.default_rng(0)
    pixels = list(draw.integers(0, 256, (batch, ours.image_size, ours.image_size, 3), dtype=np.uint8))
    words, sizes = random.Random(0), lengths(batch * each, seed=0)
    told = [" ".join(f"w{words.randrange(30000)}" for _ in range(size - 2)) for size in sizes]
    texts = [told[n * each : (n + 1) * each] for n in range(batch)]
    image = normalize(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(device))
    ids = [[tokenizer.enc_id, *text[1:]] for text in tokenizer.encode(told, max(sizes))]

    def encoder() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return network.visual_encoder(image)

    runs: dict[str, Callable[[], Any]] = {
        "encoder": encoder,
        "blip": lambda: ours.score(pixels, texts),
        "transformers": lambda: their_logits(theirs, image.to(dtype), ids, each),
    }
    turns = taken(runs, repeats, device)
    said, ratio = turns.given, turns.ratio
    probability = torch.tensor([itm for scores in said["blip"] for itm, _ in scores])
    theirs_too = said["transformers"].float().softmax(-1)[:, 1].cpu()
    apart = (probability.logit() - theirs_too.logit()).abs().max().item()
    print(f"logits of ITM at most {apart:.2g} apart, spread {probability.logit().std().item():.2g}")
    if not apart <= AGREE[dtype]:
        raise ValueError(f"transformers and we differ by {apart} in ITM's logit: these are not the same weights")

    rate = {name: batch / turns.seconds(name) for name in runs}
    rows = []
    for beside, peer in (
        ("transformers", "transformers, each pair by itself, ITM alone"),
        ("encoder", "image encoder alone"),
    ):
        made = row(f"pictures with {each} texts each", rate["blip"], "images/s", peer, rate[beside])
        rows.append(made | {"ratio": round(ratio("blip", beside), 4)})
    seen, on_top = flops(config, ids)
    allowed = batch * seen / (batch * (seen + look_flops(config.med, config.vit.tokens)) + on_top)
    share = ratio("blip", "encoder")
    for peer, value in (("transformers'", ratio("transformers", "encoder")), ("allowed by arithmetic", allowed)):
        rows.append(row("share of the encoder's rate", share, "fraction", peer, value))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="pictures at once (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=4, help="of each picture (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: %(default)s")
    parser.add_argument("--float32", action="store_true", help="float32 instead of bf16")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    dtype = torch.float32 if options.float32 else torch.bfloat16
    import transformers

    head = begin(
        f"{options.batch} random pictures of 384 px at once, {options.texts} texts of COCO's lengths each, {dtype}, "
        f"median of {options.repeats} turns",
        options.device,
        transformers=transformers.__version__,
    )
    rows = measure(options.batch, options.texts, options.device, dtype, options.repeats)
    end(head, rows, options.json)


if __name__ == "__main__":
    main()

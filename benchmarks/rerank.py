"""Re-ranking of retrieval by ITM: pairs a second of the base model at 384 px, keys and values of a picture once or for each pair.

    python -m benchmarks.rerank [--pictures N] [--texts K] [--device cuda] [--bf16] [--repeats N] [--json FILE]

Three ways, turn by turn in one run, over the same pictures and captions of COCO's lengths: the evaluator's own (each picture's
keys and values projected once, its candidate texts folded into one row of queries); the same with keys and values projected
anew for each pair; and the released way, which pads every text to 35 tokens besides. The arithmetic for COCO's 5,000 pictures
and 25,000 texts at k = 256 stands beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.pretrain_step import LENGTHS, lengths
from benchmarks.report import begin, end, row
from benchmarks.turns import taken
from blip.evaluators.retrieval import RetrievalEvaluator, Words
from blip.evaluators.rows import Rows
from blip.layout import TextLayout
from blip.modules.blip import BLIP, BLIPConfig
from blip.modules.flops import look_flops, text_flops
from blip.modules.med import MEDConfig
from blip.modules.vit import ViTConfig

PADDED = 35  # tokens: what the released code pads every text of retrieval to
COCO = {"pictures": 5000, "texts": 25000, "k": 256}
AT_ONCE = 256  # texts that go through ITM together


def base() -> BLIPConfig:
    """ViT-B/16 at 384 px and BERT base."""
    vit = ViTConfig(image_size=384, patch_size=16, width=768, depth=12, heads=12, drop_path=0.0)
    med = MEDConfig(30524, 768, 12, 12, 3072, 512, 768, "all_but_sa", dropout=0.0, attention_dropout=0.0)
    return BLIPConfig(vit, med, embed_width=256, temperature=0.07, dec_id=30522, enc_id=30523)


def itm_flops(config: BLIPConfig, pairs: int, looks: int, tokens: float, longest: int) -> float:
    """ITM of so many pairs, of which each text has so many tokens, with so many pictures projected."""
    texts = text_flops(config.med, 1000, 0, longest) / 1000 * tokens  # linear layers of one text
    texts += text_flops(config.med, 0, 1, longest, config.vit.tokens)  # attention on its grid, and to the picture
    texts += config.med.depth * tokens * 4 * config.med.width**2  # the cross-attention's own linear layers
    return pairs * texts + looks * look_flops(config.med, config.vit.tokens)


def arithmetic(config: BLIPConfig) -> list[dict[str, Any]]:
    """COCO at k = 256, in PFLOP, as rows of the JSON contract."""
    pairs = (COCO["pictures"] + COCO["texts"]) * COCO["k"]
    mean = sum(n * count for n, count in LENGTHS.items()) / sum(LENGTHS.values())
    each, shared, packed = (
        itm_flops(config, pairs, looks, tokens, longest) / 1e15
        for looks, tokens, longest in (
            (pairs, PADDED, PADDED),
            (COCO["pictures"], PADDED, PADDED),
            (COCO["pictures"], mean, max(LENGTHS)),
        )
    )
    return [
        row("COCO, k 256, texts of 35 tokens", shared, "PFLOP", "keys and values for each pair", each),
        row("COCO, k 256, texts packed", packed, "PFLOP", "keys and values for each pair, padded", each),
    ]


def each_its_own(model: BLIP, states: Tensor, texts: list[Tensor], padded: int | None) -> Tensor:
    """Logits of all pairs [P, T] with keys and values projected for each; `padded`: all texts computed that long."""
    device = model.itm_head.weight.device
    found = []
    for state in states:
        for start in range(0, len(texts), AT_ONCE):
            some = texts[start : start + AT_ONCE]
            sizes = [len(text) for text in some]
            layout = TextLayout.from_lengths(sizes, padded)
            ids = torch.cat(some)
            if padded is not None:
                ids, layout = layout.pad(ids).flatten(), TextLayout.from_mask(layout.mask)
            cross = model.med.look(state.to(device).expand(len(some), -1, -1))
            found.append(model.itm_logits(ids.to(device), layout.to(device), cross)[:, 1].float().cpu())
    return torch.cat(found).view(len(states), -1)


@torch.no_grad()
def measure(pictures: int, texts: int, device: torch.device, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Pairs a second of the three ways, as rows of the JSON contract; ValueError where they don't say the same."""
    torch.manual_seed(0)
    config = base()
    model = BLIP(config, decoder=False).eval().to(device)
    states = torch.randn(pictures, config.vit.tokens, config.vit.width)
    told = [torch.randint(5, 30000, (size,)) for size in lengths(texts, seed=0)]
    words = Words(Rows(None), torch.tensor([len(text) for text in told]))
    words.ids.append(torch.nn.utils.rnn.pad_sequence(told, batch_first=True).int())
    tokenizer: Any = None  # the evaluator gets ids
    judge = RetrievalEvaluator(tokenizer, top_k=texts, texts_at_once=AT_ONCE, itc_scale=1.0)
    judge.states.append(states)
    every = torch.ones(pictures, texts, dtype=torch.bool)
    ways: dict[str, Callable[[], Tensor]] = {
        "once": lambda: judge.rerank(model, torch.arange(pictures), words, every),
        "each": lambda: each_its_own(model, states, told, None),
        "released": lambda: each_its_own(model, states, told, PADDED),
    }

    def mixed(way: Callable[[], Tensor]) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return way()

    turns = taken({name: partial(mixed, way) for name, way in ways.items()}, repeats, device)
    said = turns.given
    apart = max((said[name] - said["once"]).abs().max().item() for name in ways)
    if apart > (1e-3 if dtype == torch.float32 else 0.1):
        raise ValueError(f"the ways give logits that differ by {apart:.2g}")
    pairs = pictures * texts
    once, each, released = (pairs / turns.seconds(name) for name in ways)
    print(f"logits differ by {apart:.1e} at most")
    return [
        row("pairs/s, keys and values once a picture", once, "pairs/s", "for each pair", each),
        row("pairs/s, keys and values once a picture", once, "pairs/s", "for each pair, padded to 35", released),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--texts", type=int, default=64, help="candidates of each picture (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: %(default)s")
    parser.add_argument("--bf16", action="store_true", help="bf16 mixed precision instead of float32, as evaluated")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    head = begin(
        f"states of {options.pictures} pictures of 384 px with {options.texts} captions of COCO's lengths each, "
        f"{dtype}, median of {options.repeats} turns",
        options.device,
    )
    rows = arithmetic(base())
    rows += measure(options.pictures, options.texts, options.device, dtype, options.repeats)
    end(head, rows, options.json)


if __name__ == "__main__":
    main()

"""MED, the mixture of encoder-decoder (paper section 3.1): one stack of blocks, read in three modes.

- `text` (bidirectional, sees no picture), `multimodal` (bidirectional, looks at a picture), `decoder` (causal, looks)
- a mode is which self-attention, causal or not, and a `CrossKV` or none: a block has no branches on modes
- encoder and decoder share tensors as `share` says; the paper shares all but the self-attention
- keys and values of what a text looks at depend on no text: `look` projects them once, everything that looks takes them
- several texts that look at one picture fold into the query axis: keys and values are neither copied nor indexed
- linear layers and norms see packed tokens [T, D]; padding exists only around `attend`
- post-norm blocks, exact GELU and learned positions, as BERT has them; no token types
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip.layout import TextLayout
from blip.modules.attention import attend

SHARES = ("all", "all_but_sa", "all_but_ca", "none")


@dataclass(frozen=True)
class MEDConfig:
    """Sizes of the text transformer; `look_width` is the width of the states that its cross-attention looks at.

    decoder_look_width: where the decoder looks at something of another width (VQA: at the states of the question).
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    positions: int
    look_width: int
    share: str
    dropout: float
    attention_dropout: float
    init_std: float = 0.02
    norm_eps: float = 1e-12
    checkpoint_blocks: int = 0
    decoder_look_width: int | None = None


@dataclass(frozen=True)
class CrossKV:
    """Keys and values [B, H, N, d] of what texts look at; `mask` [B, 1, 1, N] is True where it may be looked at."""

    key: Tensor
    value: Tensor
    mask: Tensor | None = None

    def select(self, rows: Tensor) -> CrossKV:
        """The given rows [K] of the batch; for texts that look at another picture than their own."""
        mask = None if self.mask is None else self.mask.index_select(0, rows)
        return CrossKV(self.key.index_select(0, rows), self.value.index_select(0, rows), mask)


class Cache:
    """Keys and values of the tokens decoded so far, preallocated for one block: [R, H, L, d] each."""

    def __init__(self, rows: int, heads: int, length: int, head_width: int, like: Tensor) -> None:
        self.key = like.new_empty(rows, heads, length, head_width)
        self.value = like.new_empty(rows, heads, length, head_width)
        self.filled = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds [R, H, t, d] and returns all keys and values so far."""
        end = self.filled + key.shape[2]
        self.key[:, :, self.filled : end] = key
        self.value[:, :, self.filled : end] = value
        self.filled = end
        return self.key[:, :, :end], self.value[:, :, :end]

    def select(self, rows: Tensor) -> Cache:
        """A cache of the same room with the given rows [K] of this one."""
        _, heads, length, head_width = self.key.shape
        selected = Cache(len(rows), heads, length, head_width, self.key)
        selected.append(*(x[:, :, : self.filled].index_select(0, rows) for x in (self.key, self.value)))
        return selected


class Embeddings(nn.Module):
    """Word and position embeddings, summed, normed: packed ids [T] -> [T, D]."""

    def __init__(self, config: MEDConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.positions, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self.dropout(self.norm(self.word(input_ids) + self.position(positions)))


class SelfAttention(nn.Module):
    """Tokens of a text look at each other; residual and norm included."""

    def __init__(self, config: MEDConfig) -> None:
        super().__init__()
        self.heads, self.attention_dropout = config.heads, config.attention_dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, layout: TextLayout, causal: bool, cache: Cache | None = None) -> Tensor:
        qkv = layout.pad(self.qkv(x)).unflatten(-1, (3, self.heads, -1))  # [R, L, 3, H, d]
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [R, H, L, d]
        if cache is not None:
            key, value = cache.append(key, value)
        # Padding follows the text, so a causal text never meets it.
        mask = None if causal else layout.mask[:, None, None]
        dropout = self.attention_dropout if self.training else 0.0
        looked = attend(query, key, value, mask, causal, dropout).transpose(1, 2).flatten(2)  # [R, L, D]
        return self.norm(x + self.dropout(self.out(layout.pack(looked))))


class Look(nn.Module):
    """Queries of texts against keys and values of what they look at: neither residual nor norm."""

    def __init__(self, config: MEDConfig) -> None:
        super().__init__()
        self.heads, self.attention_dropout = config.heads, config.attention_dropout
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.look_width, 2 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def look(self, states: Tensor, mask: Tensor | None = None) -> CrossKV:
        """States [B, N, look_width] (mask [B, N]: True where real) to keys and values."""
        kv = self.key_value(states).unflatten(-1, (2, self.heads, -1))  # [B, N, 2, H, d]
        key, value = kv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, d]
        return CrossKV(key, value, None if mask is None else mask[:, None, None])

    def forward(self, x: Tensor, layout: TextLayout, cross: CrossKV) -> Tensor:
        # Several texts that look at one thing are one row of queries: rows k*b .. k*b + k-1 of the grid, or as folded.
        grid = layout.queries or layout
        query = grid.pad(self.query(x)).view(cross.key.shape[0], -1, self.heads, cross.key.shape[-1])  # [B, Q, H, d]
        dropout = self.attention_dropout if self.training else 0.0
        looked = attend(query.transpose(1, 2), cross.key, cross.value, cross.mask, dropout=dropout)
        looked = looked.transpose(1, 2).reshape(grid.rows, grid.longest, -1)
        return self.out(grid.pack(looked))


class CrossAttention(Look):
    """Tokens of texts look at a picture (or at whatever was projected by `look`); residual and norm included."""

    def __init__(self, config: MEDConfig) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, layout: TextLayout, cross: CrossKV) -> Tensor:
        return self.norm(x + self.dropout(super().forward(x, layout, cross)))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between; residual and norm included."""

    def __init__(self, config: MEDConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.fc2(nn.functional.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Self-attention, cross-attention where the text looks at something, feed-forward."""

    def __init__(
        self, self_attention: SelfAttention, cross_attention: CrossAttention, feed_forward: FeedForward
    ) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.cross_attention = cross_attention
        self.feed_forward = feed_forward

    def forward(
        self, x: Tensor, layout: TextLayout, causal: bool, cross: CrossKV | None, cache: Cache | None = None
    ) -> Tensor:
        x = self.self_attention(x, layout, causal, cache)
        if cross is not None:
            x = self.cross_attention(x, layout, cross)
        return self.feed_forward(x)


class LMHead(nn.Module):
    """States [T, D] to logits over the vocabulary [T, V]; the output matrix is the decoder's word embedding."""

    def __init__(self, config: MEDConfig, word: nn.Embedding) -> None:
        super().__init__()
        self.transform = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.output = nn.Linear(config.width, config.vocab_size)
        self.output.weight = word.weight

    def forward(self, states: Tensor) -> Tensor:
        return self.output(self.norm(nn.functional.gelu(self.transform(states))))


class MED(nn.Module):
    """The text transformer with its three modes. A task that needs no decoder (or no encoder) leaves it out."""

    def __init__(self, config: MEDConfig, encoder: bool = True, decoder: bool = True) -> None:
        super().__init__()
        if config.share not in SHARES:
            raise ValueError(f"model.med.share must be one of {', '.join(SHARES)}, not {config.share!r}")
        self.config = config
        self.embeddings = Embeddings(config)
        blocks = [
            Block(SelfAttention(config), CrossAttention(config), FeedForward(config)) for _ in range(config.depth)
        ]
        if encoder:
            self.encoder = nn.ModuleList(blocks)
        if decoder:
            apart = encoder and config.share != "all"
            self.decoder = nn.ModuleList(self._sibling(block, config) if apart else block for block in blocks)
            self.decoder_embeddings = Embeddings(config) if encoder and config.share == "none" else self.embeddings
            self.lm_head = LMHead(config, self.decoder_embeddings.word)
        self.apply(self.initialise)

    @staticmethod
    def _sibling(block: Block, config: MEDConfig) -> Block:
        """A decoder's block that shares with the encoder's what `share` says."""
        own = {"all_but_sa": {"sa"}, "all_but_ca": {"ca"}, "none": {"sa", "ca", "ff"}}[config.share]
        if config.decoder_look_width is not None:
            if "ca" not in own and config.decoder_look_width != config.look_width:
                raise ValueError(f"share={config.share!r} is one cross-attention, which looks at states of one width")
            config = replace(config, look_width=config.decoder_look_width)
        return Block(
            SelfAttention(config) if "sa" in own else block.self_attention,
            CrossAttention(config) if "ca" in own else block.cross_attention,
            FeedForward(config) if "ff" in own else block.feed_forward,
        )

    def initialise(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def blocks(self, decoder: bool = False) -> list[Block]:
        """The encoder's stack, or the decoder's."""
        return cast(list[Block], list(self.decoder if decoder else self.encoder))

    def look(self, states: Tensor, mask: Tensor | None = None, decoder: bool = False) -> list[CrossKV]:
        """What a text will look at, states [B, N, look_width], as keys and values for each block.

        Serves both stacks where they share the cross-attention; `decoder` asks for the decoder's own where they do not.
        """
        return [block.cross_attention.look(states, mask) for block in self.blocks(decoder)]

    @property
    def looks_alike(self) -> bool:
        """True where encoder and decoder share the cross-attention, so that one `look` serves both."""
        return self.config.share in ("all", "all_but_sa")

    def encode(self, input_ids: Tensor, layout: TextLayout, cross: list[CrossKV] | None = None) -> Tensor:
        """Packed ids [T] to states [T, D]: mode `text` without, mode `multimodal` with something to look at."""
        x = self.embeddings(input_ids, layout.index % layout.longest)
        return self._run(self.encoder, x, layout, False, cross)

    def decode(
        self, input_ids: Tensor, layout: TextLayout, cross: list[CrossKV] | None, caches: list[Cache] | None = None
    ) -> Tensor:
        """Packed ids [T] to states [T, D], each token seeing only those before it; `lm_head` makes logits of them.

        With `caches` the ids follow those already cached, the same number for each row.
        """
        start = caches[0].filled if caches else 0
        x = self.decoder_embeddings(input_ids, layout.index % layout.longest + start)
        return self._run(self.decoder, x, layout, True, cross, caches)

    def caches(self, rows: int, length: int, like: Tensor) -> list[Cache]:
        """Empty caches for decoding `rows` texts of at most `length` tokens, in the dtype and on the device of `like`."""
        head_width = self.config.width // self.config.heads
        return [Cache(rows, self.config.heads, length, head_width, like) for _ in range(self.config.depth)]

    def _run(
        self,
        blocks: nn.ModuleList,
        x: Tensor,
        layout: TextLayout,
        causal: bool,
        cross: list[CrossKV] | None,
        caches: list[Cache] | None = None,
    ) -> Tensor:
        plain = len(blocks) - self.config.checkpoint_blocks
        for i, block in enumerate(blocks):
            inputs = (x, layout, causal, None if cross is None else cross[i], None if caches is None else caches[i])
            if i >= plain and self.training and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        return x

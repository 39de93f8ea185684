"""Words, without torch: cleaning captions and questions, and the tokenizer with BLIP's two own special tokens.

The tokenizer is a WordPiece vocabulary of any language, from a `vocab.txt` (one piece a line) or a `tokenizer.json`. BLIP
puts `[ENC]` in the place of `[CLS]` where a text looks at an image and `[DEC]` where it is to be written; both are appended
after the vocabulary where they are not part of it, `[DEC]` first, so that old ids keep their meaning.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Captions are tokenised in loader workers: the library's threads do not survive a fork, and gain nothing on batches this small.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

OWN_TOKENS = ("[DEC]", "[ENC]")
NEEDED_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
BERT_TOKENS = (*NEEDED_TOKENS, "[MASK]")
_MARKS = re.compile(r"[.!\"()*#:;~]")
_SPACE_RUNS = re.compile(r"\s{2,}")
# The clean-up of the released tokenizer's `decode`, in its order.
_TIDY = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
         (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


def clean_caption(text: str, max_words: int) -> str:
    """A caption as the released `pre_caption` leaves it: lower case, some marks to spaces, the first `max_words` words."""
    text = _SPACE_RUNS.sub(" ", _MARKS.sub(" ", text.lower())).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def clean_question(text: str, max_words: int) -> str:
    """A question as the released `pre_question` leaves it: lower case, the same marks deleted, the first `max_words` words."""
    text = _MARKS.sub("", text.lower()).rstrip(" ")
    return " ".join(text.split(" ")[:max_words])


class Tokenizer:
    """Texts to ids and back. Two tokenizers with equal `to_json()` give equal ids; a checkpoint carries that string."""

    def __init__(self, wordpiece: tokenizers.Tokenizer) -> None:
        """Takes the library's tokenizer over: checks its vocabulary, appends [DEC] and [ENC] where they are missing."""
        if not isinstance(wordpiece.model, models.WordPiece):
            raise ValueError(
                f"the tokenizer holds a {type(wordpiece.model).__name__} model; BLIP's texts need WordPiece"
            )
        pieces = wordpiece.get_vocab(with_added_tokens=True)
        missing = [token for token in NEEDED_TOKENS if token not in pieces]
        if missing:
            raise ValueError(f"the vocabulary of {len(pieces)} pieces lacks {', '.join(missing)}; add a line for each")
        if sorted(pieces.values()) != list(range(len(pieces))):
            raise ValueError(
                f"the ids of the {len(pieces)} pieces are not 0 to {len(pieces) - 1} (highest: {max(pieces.values())}), "
                "so that added tokens would clash; close the gaps or remove the repeated pieces"
            )
        wordpiece.no_padding()
        wordpiece.no_truncation()
        # Marked as special they are found in a raw text as they stand, before lower-casing, as the released tokenizer does.
        special = [token for token in (*BERT_TOKENS, *OWN_TOKENS) if token in pieces or token in OWN_TOKENS]
        wordpiece.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        self._wordpiece = wordpiece
        ids = {token: wordpiece.get_vocab(with_added_tokens=True)[token] for token in special}
        added = [token for token in OWN_TOKENS if token not in pieces]
        expected = {token: len(pieces) + n for n, token in enumerate(added)}
        if {token: ids[token] for token in added} != expected:
            raise ValueError(f"special tokens were to get the ids {expected}, but the tokenizer gave {ids}")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id = (ids[token] for token in NEEDED_TOKENS)
        self.dec_id, self.enc_id = (ids[token] for token in OWN_TOKENS)
        self._special = frozenset(ids.values())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a `vocab.txt`, a `tokenizer.json`, or a folder with either (tokenizer.json first).

        A vocabulary file is read as BERT's: lower-cased, accents stripped, Chinese characters apart. A `tokenizer_config.json`
        beside it is heeded where it says otherwise (`do_lower_case`, `strip_accents`, `tokenize_chinese_chars`).
        """
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
            if not found:
                raise FileNotFoundError(f"{path}: neither tokenizer.json nor vocab.txt in this folder")
            path = found[0]
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such vocabulary; give a vocab.txt, a tokenizer.json or a folder with either"
            )
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                return cls.from_json(text)
            config = path.with_name("tokenizer_config.json")
            return cls(_wordpiece(text, json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The tokenizer that `to_json` wrote, or the contents of any `tokenizer.json` with a WordPiece model."""
        try:
            wordpiece = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare exceptions
            raise ValueError(f"not a tokenizer.json: {error}") from error
        return cls(wordpiece)

    def to_json(self) -> str:
        return self._wordpiece.to_str()

    def pieces(self) -> dict[str, int]:
        """Every piece with its id, special tokens included."""
        return self._wordpiece.get_vocab(with_added_tokens=True)

    def __len__(self) -> int:
        """Pieces with the added special tokens: what the embedding of a model needs."""
        return self._wordpiece.get_vocab_size(with_added_tokens=True)

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Ids of each text, `[CLS] ... [SEP]`, at most `max_tokens` with both."""
        if max_tokens < 2:
            raise ValueError(f"max_tokens={max_tokens} leaves no room for [CLS] and [SEP]")
        room = max_tokens - 2
        encodings = self._wordpiece.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[self.cls_id, *encoding.ids[:room], self.sep_id] for encoding in encodings]

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """The text of ids, spaces tidied as the released tokenizer does; special tokens ([UNK] too) dropped unless kept."""
        tokens = (self._piece(i) for i in ids if keep_special or i not in self._special)
        text = " ".join(tokens).replace(" ##", "").strip()
        for ugly, tidy in _TIDY:
            text = text.replace(ugly, tidy)
        return text

    def check_ids(self, ids: Sequence[Sequence[int]], vocab_size: int) -> None:
        """Refuses texts with an id that a model of `vocab_size` pieces has no embedding for (ValueError with text and id)."""
        for text in ids:
            for i in text:
                if not 0 <= i < vocab_size:
                    known = [j for j in text if 0 <= j < len(self)]
                    raise ValueError(
                        f"text {self.decode(known, keep_special=True)!r} holds id {i}, but the model has {vocab_size} pieces "
                        f"and the tokenizer {len(self)}; tokenizer and model do not belong together"
                    )

    def _piece(self, i: int) -> str:
        token = self._wordpiece.id_to_token(int(i))
        if token is None:
            raise ValueError(f"id {i} is outside the vocabulary of {len(self)} pieces")
        return token


def _wordpiece(vocabulary: str, config: dict) -> tokenizers.Tokenizer:
    """BERT's tokenizer over the lines of a vocab.txt."""
    pieces: dict[str, int] = {}
    lines = vocabulary.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()  # a file may end with line breaks
    for number, line in enumerate(lines):
        piece = line.rstrip("\r")
        if piece in pieces:
            raise ValueError(
                f"line {number + 1} repeats the piece {piece!r} of line {pieces[piece] + 1}; ids would clash"
            )
        pieces[piece] = number
    return _bert(pieces, config)


def _bert(pieces: dict[str, int], config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    wordpiece = tokenizers.Tokenizer(models.WordPiece(pieces, unk_token="[UNK]", max_input_chars_per_word=100))
    wordpiece.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    return wordpiece


def train_wordpiece(texts: Sequence[str], size: int, alphabet: Iterable[str] | None = None) -> tokenizers.Tokenizer:
    """BERT's lower-case WordPiece of at most `size` pieces learned from texts: equal texts in any process, equal ids.

    The characters of `alphabet`, by default the texts' own (the most frequent, up to a quarter of `size`), are pieces also
    alone, so that a word never met can be spelled. Without [DEC] and [ENC], which `Tokenizer` appends.
    """
    learner = _bert({"[UNK]": 0}, {})
    alphabet = _characters(learner, texts, size // 4) if alphabet is None else list(alphabet)
    # The trainer numbers the inner letters in the order of a hash table unless they are given to it.
    inner = [f"##{c}" for c in alphabet if len(learner.pre_tokenizer.pre_tokenize_str(f"a{c}")) == 1]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=[*BERT_TOKENS, *inner],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    wordpiece = _bert(learner.get_vocab(), {})
    wordpiece.add_special_tokens(list(BERT_TOKENS))
    wordpiece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, wordpiece.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return wordpiece


def _characters(wordpiece: tokenizers.Tokenizer, texts: Iterable[str], limit: int) -> list[str]:
    """The most frequent characters of texts as the vocabulary sees them, in the order of their codes."""
    counts = Counter(c for text in texts for c in wordpiece.normalizer.normalize_str(text) if not c.isspace())
    return sorted(character for character, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit])

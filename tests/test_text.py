"""Cleaning of texts and the tokenizer, against the released ones and on vocabularies of other languages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from blip.text import Tokenizer, clean_caption, clean_question, train_wordpiece

BASE = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture
def vocab(tmp_path: Path):
    def write(pieces: list[str], ending: str = "\n") -> Path:
        path = tmp_path / "vocab.txt"
        path.write_bytes(ending.join([*pieces, ""]).encode())
        return path

    return write


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ('A Dog. "Runs" (fast)!', "a dog runs fast"),
        ("#cute ~ dog: a*b; c", "cute dog a b c"),
        ("it's a well-known dog, isn't it?", "it's a well-known dog, isn't it?"),
        ("one two three four five six", "one two three four"),
        (" \n ", ""),
        ("dog\t\tcat\n", "dog cat"),
    ],
)
def test_captions_are_cleaned_as_released(text: str, clean: str):
    assert clean_caption(text, max_words=4 if "six" in text else 30) == clean


def test_questions_lose_marks_without_a_space():
    assert clean_question("What's in the U.S. flag: (red)?  ", 50) == "what's in the us flag red?"
    assert clean_question("a b c d", 2) == "a b"


def golden(reference: Path) -> tuple[dict, Tokenizer]:
    cases = json.loads((reference / "golden/tokenizer.json").read_text())
    return cases, Tokenizer.load(reference / "golden/vocab.txt")


def test_ids_masks_and_texts_equal_the_released_tokenizer(reference: Path):
    cases, tokenizer = golden(reference)
    special = cases["special_ids"]
    ours = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.dec_id, tokenizer.enc_id)
    assert ours == tuple(special[name] for name in ("pad", "unk", "cls", "sep", "bos", "enc"))
    assert len(tokenizer) == cases["len"]
    for case in cases["encode"]:
        assert tokenizer.encode([case["text"]], 200) == [case["ids"]], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded_skip_special"]
        assert tokenizer.decode(case["ids"], keep_special=True) == case["decoded"]
    for case in cases["decode"]:
        assert tokenizer.decode(case["ids"]) == case["skip"]
        assert tokenizer.decode(case["ids"], keep_special=True) == case["full"]
    texts = cases["padded_max_length_8_truncated"]["texts"]
    for key, limit in (("padded_max_length_8_truncated", 8), ("padded_longest", 512)):
        rows, masks = cases[key]["input_ids"], cases[key]["attention_mask"]
        unpadded = [
            [i for i, real in zip(row, mask, strict=True) if real] for row, mask in zip(rows, masks, strict=True)
        ]
        assert tokenizer.encode(texts, limit) == unpadded


def test_own_tokens_follow_the_vocabulary_of_bert(reference: Path):
    tokenizer = Tokenizer.load(reference / "data/bert_vocab")
    assert (tokenizer.dec_id, tokenizer.enc_id, len(tokenizer)) == (30522, 30523, 30524)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id) == (0, 100, 101, 102)
    assert tokenizer.encode(["a dog"], 30) == [[101, 1037, 3899, 102]]


def test_json_gives_the_same_tokenizer_back(vocab):
    tokenizer = Tokenizer.load(vocab([*BASE, "dog", "##s"]))
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.to_json() == tokenizer.to_json()
    assert again.encode(["dogs [DEC] [ENC]"], 9) == tokenizer.encode(["dogs [DEC] [ENC]"], 9) == [[2, 5, 6, 7, 8, 3]]
    assert len(again) == 9


def test_a_vocabulary_that_has_the_own_tokens_keeps_their_ids(vocab):
    tokenizer = Tokenizer.load(vocab(["[ENC]", *BASE, "dog", "[DEC]"]))
    assert (tokenizer.enc_id, tokenizer.dec_id, len(tokenizer)) == (0, 7, 8)
    half = Tokenizer.load(vocab([*BASE, "[ENC]", "dog"]))
    assert (half.enc_id, half.dec_id, len(half)) == (5, 7, 8)


def test_other_languages_work_from_their_vocabulary(vocab):
    tokenizer = Tokenizer.load(vocab([*BASE, "собака", "##ми", "狗", "犬", "hund"], ending="\r\n"))
    assert tokenizer.encode(["Собаками 狗犬 Hund"], 20) == [[2, 5, 6, 7, 8, 9, 3]]
    assert tokenizer.decode([5, 6, 7]) == "собаками 狗"
    assert tokenizer.dec_id == 10


def test_accents_stay_where_the_config_beside_the_vocabulary_says_so(vocab):
    path = vocab([*BASE, "tür", "tur"])
    assert Tokenizer.load(path).encode(["Tür"], 9) == [[2, 6, 3]]
    path.with_name("tokenizer_config.json").write_text('{"strip_accents": false}')
    assert Tokenizer.load(path.parent).encode(["Tür"], 9) == [[2, 5, 3]]


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([*BASE, "dog", "cat", "dog"], "line 8 repeats the piece 'dog' of line 6"),
        (["[PAD]", "[UNK]", "dog"], r"lacks \[CLS\], \[SEP\]"),
    ],
)
def test_an_unusable_vocabulary_is_refused(vocab, pieces: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(vocab(pieces))


def test_ids_with_gaps_are_refused():
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    pieces = {piece: n for n, piece in enumerate(BASE)} | {"dog": 6}
    with pytest.raises(ValueError, match="would clash"):
        Tokenizer(Library(models.WordPiece(pieces, unk_token="[UNK]")))


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="neither"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_truncated_texts_keep_both_ends(vocab):
    tokenizer = Tokenizer.load(vocab([*BASE, "dog"]))
    assert tokenizer.encode(["dog dog dog dog", "", "dog"], 4) == [[2, 5, 5, 3], [2, 3], [2, 5, 3]]
    with pytest.raises(ValueError, match="no room"):
        tokenizer.encode(["dog"], 1)


def test_an_id_outside_the_model_is_named_with_its_text(vocab):
    tokenizer = Tokenizer.load(vocab([*BASE, "dog"]))
    ids = tokenizer.encode(["dog", "dog [ENC]"], 9)
    tokenizer.check_ids(ids, len(tokenizer))
    with pytest.raises(ValueError, match=r"dog \[ENC\].* holds id 7, but the model has 7 pieces"):
        tokenizer.check_ids(ids, 7)
    with pytest.raises(ValueError, match="id 99 is outside"):
        tokenizer.decode([99])


TEXTS = ["a red dog runs", "two dogs run in the snow .", "a café in the sun, naïve", "собака и кошка"] * 3


def test_a_learned_vocabulary_is_the_same_in_every_process():
    """The order of a hash table, new in each process, decides nothing."""
    code = f"from blip.text import train_wordpiece; print(train_wordpiece({TEXTS!r}, 120).to_str())"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert len({r.stdout for r in runs}) == 1
    tokenizer = Tokenizer.from_json(runs[0].stdout)
    assert len(tokenizer) <= 122  # and [DEC], [ENC]
    assert tokenizer.decode(tokenizer.encode(["собака runs"], 30)[0]) == "собака runs"


def test_rare_characters_are_unknown_where_the_vocabulary_is_small():
    tokenizer = Tokenizer(train_wordpiece(["aaaa bbbb cccc", "cccc z"], 12))  # three characters
    assert tokenizer.encode(["z"], 30) == [[tokenizer.cls_id, tokenizer.unk_id, tokenizer.sep_id]]
    assert tokenizer.decode(tokenizer.encode(["cab"], 30)[0]) == "cab"

"""A batch of pairs: each text with its picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blip.datamodules.pairs import PairsDataModule, collate
from tests.datamodules.making import write_shards, write_vocabulary
from tests.datamodules.samples import sample, spoken, words


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_vocabulary(folder / "vocab.txt")
    write_shards(folder / "train", [13, 5, 22], texts=2)
    write_shards(folder / "val", [7], texts=3, first=900)
    return folder


def module(data: Path, **options) -> PairsDataModule:
    defaults = {
        "sources": [{"name": "human", "shards": str(data / "train" / "*.tar")}],
        "val": {"main": {"shards": str(data / "val" / "*.tar"), "captions": "all"}},
        "tokenizer": data / "vocab.txt",
        "image_size": 8,
        "batch_size": 8,
        "eval_batch_size": 4,
        "seed": 1,
        "max_words": 30,
        "max_tokens": 12,
        "augment": {},
    }
    return PairsDataModule(**(defaults | options))


def test_a_batch_keeps_its_contract(data):
    batch = next(iter(module(data).train_dataloader()))
    assert (batch.image.shape, batch.image.dtype) == ((8, 3, 8, 8), torch.uint8)
    assert batch.image.is_contiguous()
    assert batch.layout.mask.shape[0] == len(batch.texts) == len(batch.keys) == 8
    tokenizer = module(data).tokenizer
    for row, (text, key, picture) in enumerate(zip(batch.texts, batch.keys, batch.image_ids.tolist(), strict=True)):
        ids = batch.layout.pad(batch.input_ids)[row][batch.layout.mask[row]].tolist()
        assert (ids[0], ids[-1]) == (tokenizer.cls_id, tokenizer.sep_id)
        assert tokenizer.decode(ids) == text
        assert int(key) == picture == int(text.split()[4])
    assert batch.text_row.tolist() == list(range(8))
    assert (batch.epoch, batch.position, batch.replaced) == (0, 8, [])
    moved = batch.to("cpu")
    assert torch.equal(moved.image, batch.image)
    assert (moved.texts, moved.keys) == (batch.texts, batch.keys)


def test_in_evaluation_texts_know_the_row_of_their_picture_and_all_are_references(data):
    (loader,) = module(data).val_dataloader()
    for batch in loader:
        assert batch.layout.rows == len(batch.text_row) == 3 * len(batch.keys)
        assert batch.text_row.tolist() == [row for row in range(len(batch.keys)) for _ in range(3)]
        assert [text for texts in batch.references for text in texts] == batch.texts


def test_a_text_is_cleaned_and_kept_as_it_stands():
    known = words(max_words=2)
    batch = collate([sample(0, ["Red (blue) green"])], known)
    assert spoken(known, batch.input_ids, batch.layout) == ["red blue"]
    assert batch.texts == ["Red (blue) green"]


def test_captions_that_are_neither_all_nor_one_are_refused(data):
    with pytest.raises(ValueError, match="each picture once"):
        module(data, captions="some")

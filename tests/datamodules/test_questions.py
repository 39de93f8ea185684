"""A batch of questions: each distinct answer once, with its share of the humans."""

from __future__ import annotations

import pytest
import torch

from blip.datamodules.questions import collate
from tests.datamodules.samples import sample, spoken, words


def question(number: int, text: str, answers: list[str], weight: float = 1.0) -> dict:
    return {"id": number, "question": text, "answers": answers, "weight": weight}


def test_answers_are_distinct_and_weighed_by_how_many_said_so():
    known = words()
    samples = [
        sample(0, [question(1, "What colour is (the) left!", ["red"] * 7 + ["blue"] * 3)]),
        sample(1, [question(2, "how many cubes?", ["Two"], weight=0.2)]),
    ]
    batch = collate(samples, known, training=True)
    assert spoken(known, batch.input_ids, batch.layout) == ["what colour is the left", "how many cubes?"]
    assert spoken(known, batch.answer_ids, batch.answer_layout) == ["red", "blue", "two"]
    assert batch.answer_row.tolist() == [0, 0, 1]
    assert torch.allclose(batch.weights, torch.tensor([0.7, 0.3, 0.2]))
    assert (batch.text_row.tolist(), batch.image_ids.tolist()) == ([0, 1], [0, 1])
    assert (batch.image.shape, batch.image.dtype) == ((2, 3, 8, 8), torch.uint8)
    assert batch.image[1].unique().tolist() == [1]
    assert [entry["id"] for entry in batch.questions] == [1, 2]


def test_in_evaluation_every_question_of_a_picture_is_asked_and_answers_may_be_missing():
    known = words(max_tokens=4)
    asked = [question(n, "is there a red", []) for n in range(3)]
    batch = collate([sample(0, asked[:2]), sample(1, asked[2:])], known, training=False)
    assert batch.text_row.tolist() == [0, 0, 1]
    assert spoken(known, batch.input_ids, batch.layout) == ["is there"] * 3
    assert batch.answer_layout is None
    assert (len(batch.answer_ids), len(batch.answer_row), len(batch.weights)) == (0, 0, 0)
    moved = batch.to("cpu")
    assert moved.answer_layout is None
    assert torch.equal(moved.image, batch.image)


def test_training_on_a_question_without_answers_is_refused():
    with pytest.raises(ValueError, match="key3: a question without answers"):
        collate([sample(3, [question(1, "how many", [])])], words(), training=True)


def test_clips_keep_their_frames():
    batch = collate([sample(n, [question(n, "how many", ["one"])], (4, 8, 8, 3)) for n in range(2)], words(), False)
    assert batch.image.shape == (2, 4, 3, 8, 8)
    assert batch.image[1, :, 0, 0, 0].tolist() == [1, 51, 101, 151]


def test_ids_beyond_the_model_are_refused():
    with pytest.raises(ValueError, match="model has 9 pieces"):
        collate([sample(0, [question(1, "how many", ["one"])])], words(vocab_size=9), training=True)

"""A batch of rounds: every candidate behind the same history, of which the oldest goes when there is too much."""

from __future__ import annotations

import pytest
import torch

from blip.datamodules.dialogues import collate
from tests.datamodules.samples import sample, spoken, words

OPTIONS = ["yes", "no", "red", "two cubes", "blue", "green"]


def entry(history: list[tuple[str, str]] | None = None, true: int = 2, options: list[str] = OPTIONS) -> dict:
    asked = {"caption": "A picture of cubes.", "round": 1, "question": "what colour", "history": history or []}
    return asked | {"options": options, "answer_index": true}


def test_a_text_is_history_question_and_candidate():
    known = words()
    batch = collate([sample(0, [entry([("is there a", "yes"), ("are there two?", "no")])])], known)
    said = spoken(known, batch.input_ids, batch.layout)
    before = "is there a? yes are there two? no what colour?"
    assert said == [f"{before} {option}" for option in OPTIONS]
    assert (batch.labels.tolist(), batch.text_row.tolist()) == ([0, 0, 1, 0, 0, 0], [0] * 6)


def test_rows_of_a_round_are_adjacent_and_a_caption_goes_with_each():
    known = words()
    batch = collate([sample(n, [entry(true=n)]) for n in range(3)], known)
    assert batch.layout.rows == 18
    assert batch.text_row.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert batch.labels.view(3, 6).argmax(1).tolist() == [0, 1, 2]
    assert spoken(known, batch.caption_ids, batch.caption_layout) == ["a picture of cubes"] * 3
    assert (batch.image.shape, len(batch.rounds)) == ((3, 3, 8, 8), 3)
    assert torch.equal(batch.to("cpu").labels, batch.labels)


def test_what_is_too_long_loses_its_oldest_words_and_never_the_candidate():
    known = words(max_tokens=8)
    batch = collate([sample(0, [entry([("is there a", "yes"), ("are there two", "no")])])], known)
    said = spoken(known, batch.input_ids, batch.layout)
    assert said == ["? no what colour? yes", "? no what colour? no", "? no what colour? red",
                    "no what colour? two cubes", "? no what colour? blue", "? no what colour? green"]  # fmt: skip
    tiny = collate([sample(0, [entry()])], words(max_tokens=3))
    assert [text.split()[0] for text in spoken(known, tiny.input_ids, tiny.layout)] == [o.split()[0] for o in OPTIONS]


def test_training_draws_the_true_answer_and_others_by_seed_epoch_and_position():
    known = words()
    samples = [sample(n, [entry(true=n % 6)]) for n in range(30)]

    def drawn(batch) -> list[list[str]]:
        said = [text.split("? ")[1] for text in spoken(known, batch.input_ids, batch.layout)]
        return [said[i : i + 3] for i in range(0, len(said), 3)]

    batch = collate(samples, known, candidates=3, seed=1)
    rounds = drawn(batch)
    assert all(len(set(shown)) == 3 for shown in rounds)
    assert [shown[i] for shown, i in zip(rounds, batch.labels.view(30, 3).argmax(1).tolist(), strict=True)] == [
        OPTIONS[n % 6] for n in range(30)
    ]
    assert batch.labels.view(30, 3).sum(1).tolist() == [1] * 30
    assert {option for shown in rounds for option in shown} == set(OPTIONS)
    assert [drawn(collate([one], known, candidates=3, seed=1))[0] for one in samples] == rounds
    assert drawn(collate(samples, known, candidates=3, seed=2)) != rounds
    assert drawn(collate([s._replace(epoch=1) for s in samples], known, candidates=3, seed=1)) != rounds


def test_rounds_of_unequal_options_and_too_many_candidates_are_refused():
    two = [sample(0, [entry()]), sample(1, [entry(options=OPTIONS[:3])])]
    with pytest.raises(ValueError, match=r"equally many options, not \{'key0': 6, 'key1': 3\}"):
        collate(two, words())
    with pytest.raises(ValueError, match="key1: candidates=4 of 3 options"):
        collate(two, words(), candidates=4)

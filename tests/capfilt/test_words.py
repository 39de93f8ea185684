"""What is told of words: counts of the texts themselves, and preferences that few words cannot fake."""

from __future__ import annotations

import math
import random

import pytest

from blip.capfilt.words import Texts, shifts, words_of


def texts(*said: str) -> Texts:
    found = Texts()
    found.add(said)
    return found


def test_words_are_told_apart_in_lower_case_without_marks() -> None:
    assert words_of("A man's best-selling T-shirt, 50% off! Ça va?") == [
        "a",
        "man's",
        "best-selling",
        "t-shirt",
        "50",
        "off",
        "ça",
        "va",
    ]
    assert words_of(" ?! \n") == []


def test_numbers_are_those_of_the_texts() -> None:
    numbers = texts("a dog", "A dog!", "a big red dog runs", "").numbers()
    assert numbers["words_mean"] == pytest.approx(9 / 4)
    assert numbers["words_median"] == 2
    assert numbers["vocabulary"] == 5
    assert numbers["distinct_texts"] == 75.0
    shares = [3 / 9, 3 / 9, 1 / 9, 1 / 9, 1 / 9]
    assert numbers["word_entropy_bits"] == pytest.approx(-sum(p * math.log2(p) for p in shares))
    assert texts().numbers() == {}


def test_two_sets_together_are_one_set_of_both() -> None:
    both = texts("a dog", "a cat") | texts("a dog", "one " * 100)
    assert both.numbers() == texts("a dog", "a cat", "a dog", "one " * 100).numbers()


def test_a_planted_preference_comes_first_on_its_side_and_chance_stays_low() -> None:
    rng = random.Random(0)
    names = [f"w{n}" for n in range(40)]

    def drawn(word: str) -> dict[str, int]:
        weights = [4 if name == word else 1 for name in names]
        said = rng.choices(names, weights, k=4000)
        return {name: said.count(name) for name in names}

    found = shifts(drawn("w7"), drawn("w23"))
    assert [found[0].word, found[-1].word] == ["w7", "w23"]
    assert found[0].z > 10
    assert found[-1].z < -10
    assert sum(abs(shift.z) > 3 for shift in found[1:-1]) <= 1
    assert found[0].first == pytest.approx(1000 * 4 / 43, rel=0.2)


def test_sides_swap_with_the_sets_and_a_word_said_once_is_no_preference() -> None:
    many, few = {"a": 500, "dog": 100, "once": 1}, {"a": 500, "dog": 100}
    there, back = shifts(many, few), shifts(few, many)
    assert {s.word: pytest.approx(s.z) for s in there} == {s.word: -s.z for s in back}
    assert all(abs(shift.z) < 1.96 for shift in there)
    assert shifts({}, few) == shifts(few, {}) == []

"""Questions look at pictures, answers at questions; answers are ranked in two stages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blip.layout import TextLayout
from blip.modules.generation import Decoding, generate
from blip.modules.vqa import VQA, Candidates, rank
from tests.modules.small import VOCABULARY, pictures, small_config, texts

BEAM = Decoding("beam", 6, 1, 3, 1.0, 0, 1.0, 1.0, 0, 1.0, "all", 1)
ANSWERS = [[2, 7, 3], [2, 7, 9, 3], [2, 30, 3], [2, 30, 31, 32, 3], [2, 41, 3], [2, 7, 12, 3], [2, 50, 51, 3]]


@pytest.fixture
def model() -> VQA:
    torch.manual_seed(0)
    return VQA(small_config()).double().eval()


def asked(model: VQA, image: Tensor, lengths: list[int], row: list[int]) -> list:
    """What answers to these questions look at, all in one batch."""
    ids, layout = texts(*lengths)
    return model.ask(ids, layout, model.med.look(model.image_states(image)), torch.tensor(row))


def alone(model: VQA, image: Tensor, lengths: list[int], row: list[int]) -> list[list]:
    """The same of each question for itself, with its picture only."""
    parts = texts(*lengths)[0].split(lengths)
    return [
        model.ask(part, TextLayout.from_lengths([len(part)]), model.med.look(model.image_states(image[[picture]])))
        for part, picture in zip(parts, row, strict=True)
    ]


LENGTHS, ROW = [5, 3, 9, 4], [0, 1, 1, 2]


@torch.no_grad()
def test_nothing_about_an_answer_depends_on_what_else_is_in_the_batch(model: VQA):
    together = asked(model, pictures(3), LENGTHS, ROW)
    candidates = Candidates.of(ANSWERS, "cpu")
    ranking = rank(model, together, candidates, 4, 100, 0.1)
    written = generate(model.med, together, [58], BEAM, 3, 0)
    for number, question in enumerate(alone(model, pictures(3), LENGTHS, ROW)):
        own = rank(model, question, candidates, 4, 100, 0.1)
        assert torch.equal(own.chosen[0], ranking.chosen[number])
        torch.testing.assert_close(own.scores[0], ranking.scores[number], rtol=1e-12, atol=1e-12)
        ids = generate(model.med, question, [58], BEAM, 3, 0).ids[0].tolist()
        assert ids == written.ids[number, : len(ids)].tolist()
        assert not any(written.ids[number, len(ids) :].tolist())


@torch.no_grad()
def test_the_whole_question_and_its_picture_decide_the_answer(model: VQA):
    ids, layout = texts(5)
    answer, place = texts(4, seed=1)

    def loss(ids: Tensor, image: Tensor) -> Tensor:
        question = model.ask(ids, layout, model.med.look(model.image_states(image)))
        return model.answer_losses(answer, place, question, 0.0)

    before = loss(ids, pictures(1))
    for changed in range(1, 4):
        other = ids.clone()
        other[changed] += 1
        assert not torch.allclose(loss(other, pictures(1)), before)
    assert not torch.allclose(loss(ids, pictures(1, seed=1)), before)


@torch.no_grad()
def test_ranking_all_candidates_finds_the_one_of_the_least_loss(model: VQA):
    questions = asked(model, pictures(3), LENGTHS, ROW)
    ranking = rank(model, questions, Candidates.of(ANSWERS, "cpu"), len(ANSWERS), 100, 0.1)
    losses = []
    for answer in ANSWERS:
        layout = TextLayout.from_lengths([len(answer)] * 4)
        losses.append(model.answer_losses(torch.tensor(answer * 4), layout, questions, 0.1))
    table = torch.stack(losses, dim=1)  # [Q, C]
    assert torch.equal(ranking.best, table.argmin(1))
    torch.testing.assert_close(-ranking.scores, table.gather(1, ranking.chosen))
    assert all(sorted(row) == list(range(len(ANSWERS))) for row in ranking.chosen.tolist())


@torch.no_grad()
def test_how_many_answers_are_decoded_together_changes_nothing(model: VQA):
    questions = asked(model, pictures(3), LENGTHS, ROW)
    candidates = Candidates.of(ANSWERS, "cpu")
    whole, parts = (rank(model, questions, candidates, 5, at_once, 0.1) for at_once in (100, 1))
    assert torch.equal(whole.chosen, parts.chosen)
    torch.testing.assert_close(whole.scores, parts.scores, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_of_equal_first_tokens_the_earlier_candidates_come_through(model: VQA):
    questions = asked(model, pictures(3), LENGTHS, ROW)
    ranking = rank(model, questions, Candidates.of(ANSWERS, "cpu"), len(ANSWERS), 100, 0.1)
    for chosen, first in zip(ranking.chosen.tolist(), ranking.first.tolist(), strict=True):
        assert first == sorted(first, reverse=True)
        assert [number for number in chosen if number in (0, 1, 5)] == [0, 1, 5]  # all begin with 7


def test_encoder_and_decoder_share_nothing_and_the_decoder_looks_at_texts(model: VQA):
    encoder = {id(p) for p in [*model.med.encoder.parameters(), *model.med.embeddings.parameters()]}
    decoder = {id(p) for p in [*model.med.decoder.parameters(), *model.med.decoder_embeddings.parameters()]}
    assert not encoder & decoder
    assert model.med.encoder[0].cross_attention.key_value.in_features == 48
    assert model.med.decoder[0].cross_attention.key_value.in_features == 32


@torch.no_grad()
def test_a_clip_s_frames_are_all_looked_at_and_their_order_is_not(model: VQA):
    frames = pictures(6).view(2, 3, 3, 32, 32)
    states = model.image_states(frames)
    assert states.shape == (2, 3 * 17, 48)
    torch.testing.assert_close(states[1, 17:34], model.image_states(frames[1, 1:2])[0], rtol=1e-9, atol=1e-9)
    ids, layout = texts(5, 4)
    first, turned, fewer = (
        model.ask(ids, layout, model.med.look(model.image_states(clip)))[1].key
        for clip in (frames, frames.flip(1), frames[:, :2])
    )
    torch.testing.assert_close(first, turned)
    assert not torch.allclose(first, fewer)


@pytest.mark.parametrize("answers", [[], [[2, 7, 3], [2, 3]]])
def test_no_answer_or_an_empty_one_is_nothing_to_choose_from(answers: list[list[int]]):
    with pytest.raises(ValueError, match="answers to choose from"):
        Candidates.of(answers, "cpu")


def test_the_candidates_are_within_the_vocabulary_of_these_tests():
    assert max(max(answer) for answer in ANSWERS) < VOCABULARY - 2

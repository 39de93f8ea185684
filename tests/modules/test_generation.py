"""Texts do not depend on the batch, the caches or who leaves; they are transformers' where it counts as transformers does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from blip.layout import TextLayout
from blip.modules import generation
from blip.modules.blip import BLIP
from blip.modules.decoding import Decoding, noise
from blip.modules.generation import Texts, generate
from blip.modules.med import CrossKV
from tests.modules.small import pictures, small_model
from tests.modules.test_decoding import PLAIN, reference_nucleus

END, PAD, PROMPT = 3, 0, [58, 7, 9]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"strategy": "beam", "beams": 3, "samples": 2},
    "beam_new": {"strategy": "beam", "beams": 4, "samples": 1, "length_counts": "new", "no_repeat_ngram": 2},
    "nucleus": {"strategy": "nucleus", "samples": 3, "top_p": 0.9, "repetition_penalty": 1.2},
}


def write(model: BLIP, cross: list[CrossKV], seed: int = 0, **changed: Any) -> Texts:
    how = Decoding(**PLAIN | {"max_length": 16} | changed)
    seeds = [seed + int(float(kv[0, 0, 0].abs()) * 1e6) for kv in cross[0].key]  # of each picture
    uniform = noise(seeds, how.samples, how.max_length - len(PROMPT))
    return generate(model.med, cross, PROMPT, how, END, PAD, uniform if how.strategy == "nucleus" else None)


def looked_at(model: BLIP, count: int = 6, mask: Tensor | None = None) -> list[CrossKV]:
    with torch.no_grad():
        return model.med.look(model.visual_encoder(pictures(count)), mask, decoder=True)


@pytest.fixture(scope="module")
def model() -> BLIP:
    """A model that ends its texts after different numbers of tokens."""
    made = small_model(encoder=False)
    with torch.no_grad():
        made.med.lm_head.output.bias[END] += 1.0
    return made


def lines(texts: Texts, samples: int) -> list[list[list[int]]]:
    """The ids of each picture's texts without padding."""
    rows = [row[:length] for row, length in zip(texts.ids.tolist(), texts.lengths.tolist(), strict=True)]
    return [rows[i : i + samples] for i in range(0, len(rows), samples)]


@pytest.mark.parametrize("way", WAYS)
def test_a_picture_s_texts_are_the_same_alone_and_in_a_batch(model: BLIP, way: str) -> None:
    cross = looked_at(model)
    together = write(model, cross, **WAYS[way])
    samples = WAYS[way].get("samples", 1)
    assert len({len(text) for texts in lines(together, samples) for text in texts}) > 1  # some end early
    for i, texts in enumerate(lines(together, samples)):
        alone = write(model, [kv.select(torch.tensor([i])) for kv in cross], **WAYS[way])
        assert lines(alone, samples) == [texts]
        rows = slice(i * samples, (i + 1) * samples)
        torch.testing.assert_close(alone.score, together.score[rows])
        torch.testing.assert_close(alone.log_probs.sum(1), together.log_probs[rows].sum(1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("every", "share"), [(1, 1.0), (3, 0.9), (1, 0.5), (100, 1.0)])
def test_texts_are_the_same_whenever_those_that_ended_leave(
    model: BLIP, way: str, every: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    cross = looked_at(model)
    want = write(model, cross, **WAYS[way])
    monkeypatch.setattr(generation, "look_every", lambda device: every)
    monkeypatch.setattr(generation, "SHARE_LEFT", share)
    got = write(model, cross, **WAYS[way])
    assert torch.equal(got.ids, want.ids)
    assert torch.equal(got.lengths, want.lengths)
    torch.testing.assert_close(got.log_probs, want.log_probs)
    torch.testing.assert_close(got.score, want.score)


def worked(model: BLIP, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> list[tuple[int, int, int]]:
    """For each pass of the decoder how many pictures it looked at, with how many rows, of how many tokens."""
    seen = []
    next_logits = generation.next_logits

    def watched(med: Any, step: Tensor, cross: list[CrossKV], caches: Any) -> Tensor:
        seen.append((cross[0].key.shape[0], *step.shape))
        return next_logits(med, step, cross, caches)

    monkeypatch.setattr(generation, "next_logits", watched)
    write(model, looked_at(model), **changed)
    return seen


@pytest.mark.parametrize("changed", [{"strategy": "beam", "beams": 3}, {"strategy": "nucleus", "samples": 3}])
def test_keys_and_values_of_a_picture_exist_once(
    model: BLIP, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *rest = worked(model, monkeypatch, **changed, min_length=16)
    assert first == (6, 6, len(PROMPT))  # the prompt is read once for each picture
    assert rest == [(6, 18, 1)] * 12


@pytest.mark.parametrize(("way", "haste"), [("greedy", 0.0), ("beam", 0.0), ("nucleus", 1.5)])
def test_texts_that_ended_are_worked_on_no_more(way: str, haste: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(encoder=False)
    with torch.no_grad():
        model.med.lm_head.output.bias[END] += 1.0 + haste
    texts = write(model, looked_at(model), **WAYS[way])
    passes = worked(model, monkeypatch, **WAYS[way])
    rows = [rows for _, rows, _ in passes[1:]]
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < rows[0]
    if way != "beam":  # whose search goes on after its best text
        for written, (of_pictures, of_rows, _) in enumerate(passes[1:], 1):
            going = (texts.written > written).view(6, -1)
            assert of_pictures <= max(1, int(going.any(1).sum()) / generation.SHARE_LEFT)
            assert of_rows == of_pictures * int(going.sum(1).max())


@pytest.mark.parametrize("way", WAYS)
def test_texts_that_look_at_padded_states_are_those_of_the_states_alone(model: BLIP, way: str) -> None:
    """Keys and values of a padded row, as of short questions in a batch, give what the row gives without padding."""
    mask = torch.ones(6, 17, dtype=torch.bool)
    mask[1, 9:] = mask[4, 5:] = False
    cross = looked_at(model, mask=mask)
    texts = lines(write(model, cross, **WAYS[way]), WAYS[way].get("samples", 1))
    for i, width in ((1, 9), (4, 5), (5, 17)):
        short = [CrossKV(kv.key[i : i + 1, :, :width], kv.value[i : i + 1, :, :width]) for kv in cross]
        assert lines(write(model, short, **WAYS[way]), WAYS[way].get("samples", 1)) == [texts[i]]


def test_every_log_probability_is_the_model_s_own(model: BLIP) -> None:
    """Read whole, in one pass without cache, the texts have the log-probabilities that they were written with."""
    cross = looked_at(model)
    for way, changed in WAYS.items():
        texts = write(model, cross, **changed, min_length=6)
        samples = changed.get("samples", 1)
        for row, (ids, length) in enumerate(zip(texts.ids, texts.lengths.tolist(), strict=True)):
            layout = TextLayout.from_lengths([length])
            of_picture = [kv.select(torch.tensor([row // samples])) for kv in cross]
            with torch.no_grad():
                logits = model.med.lm_head(model.med.decode(ids[:length], layout, of_picture))
            told = logits.log_softmax(-1)[:-1].gather(1, ids[1:length, None])[len(PROMPT) - 1 :, 0]
            torch.testing.assert_close(texts.log_probs[row, : len(told)], told, msg=way)
            assert texts.log_probs[row, len(told) :].eq(0).all()
            assert texts.mean_log_prob[row] == pytest.approx(told.mean().item())


def test_one_beam_is_greedy(model: BLIP) -> None:
    cross = looked_at(model)
    for counts in ("all", "new"):
        one = write(model, cross, strategy="beam", length_counts=counts)
        assert lines(one, 1) == lines(write(model, cross), 1)


def test_the_best_beams_differ_and_come_in_order(model: BLIP) -> None:
    for counts in ("all", "new"):
        way: dict[str, Any] = {"strategy": "beam", "beams": 4, "samples": 4, "length_counts": counts}
        texts = write(model, looked_at(model), **way)
        for found, scores in zip(lines(texts, 4), texts.score.view(-1, 4), strict=True):
            assert len({tuple(text) for text in found}) == 4
            assert scores.sort(descending=True).values.equal(scores)


def test_beam_search_with_room_for_everything_finds_the_likeliest_text() -> None:
    """Two tokens to write, as many beams as pieces: the best of all pairs, each of which is a text."""
    model = small_model(encoder=False)
    med, cross = model.med, looked_at(model, 2)
    way: dict[str, Any] = {"strategy": "beam", "beams": 29, "max_length": 5, "length_penalty": 0.0, "min_length": 5}
    texts = write(model, cross, **way)
    pairs = torch.cartesian_prod(torch.arange(60), torch.arange(60))
    pairs = pairs[(pairs != END).all(1)]  # min_length bans the end
    ids = torch.cat([torch.tensor(PROMPT).expand(len(pairs), -1), pairs], 1)
    layout = TextLayout.from_mask(torch.ones_like(ids, dtype=torch.bool))
    for i in range(2):
        with torch.no_grad():
            states = med.decode(ids.flatten(), layout, [kv.select(torch.tensor([i])) for kv in cross])
            told = med.lm_head(states).log_softmax(-1).unflatten(0, ids.shape)
        sums = told[:, 2].gather(1, pairs[:, :1]) + told[:, 3].gather(1, pairs[:, 1:])
        assert texts.score[i] == pytest.approx(sums.max().item())
        assert texts.ids[i, 3:].tolist() == pairs[sums.argmax()].tolist()


def test_what_is_drawn_is_the_nucleus_of_the_model_s_distribution(model: BLIP) -> None:
    """Pearson's chi-square of 4,000 first tokens of one picture, over the tokens that its nucleus holds."""
    count = 4000
    cross = looked_at(model, 1)
    way: dict[str, Any] = {
        "strategy": "nucleus",
        "samples": count,
        "top_p": 0.9,
        "temperature": 0.7,
        "max_length": len(PROMPT) + 1,
    }
    tokens = write(model, cross, **way).ids[:, -1]
    layout = TextLayout.from_lengths([len(PROMPT)])
    with torch.no_grad():
        logits = model.med.lm_head(model.med.decode(torch.tensor(PROMPT), layout, cross))[-1]
    expected = count * reference_nucleus(logits / 0.7, 0.9)
    seen = torch.bincount(tokens, minlength=60).double()
    held = expected > 0
    assert seen[~held].sum() == 0
    freedom = int(held.sum()) - 1
    assert freedom > 5
    # The 0.999 quantile by Wilson and Hilferty.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert ((seen - expected)[held] ** 2 / expected[held]).sum() < limit


def test_samples_differ_and_are_the_first_of_more(model: BLIP) -> None:
    cross = looked_at(model)
    way: dict[str, Any] = {"strategy": "nucleus", "top_p": 1.0, "min_length": 9}
    three, two = (lines(write(model, cross, samples=n, **way), n) for n in (3, 2))
    assert [texts[:2] for texts in three] == two
    assert all(len({tuple(text) for text in texts}) == 3 for texts in three)
    assert lines(write(model, cross, seed=1, samples=2, **way), 2) != two


def test_what_cannot_be_written_is_refused(model: BLIP) -> None:
    cross = looked_at(model, 2)
    with pytest.raises(ValueError, match="must be more than the prompt's 3 ids, \\[DEC\\] among them, and at most 25"):
        write(model, cross, max_length=3)
    with pytest.raises(ValueError, match="at most 25"):
        write(model, cross, max_length=26)
    with pytest.raises(ValueError, match="beams=31 is more than half of the 60 pieces"):
        write(model, cross, strategy="beam", beams=31)
    how = Decoding(**PLAIN | {"strategy": "nucleus"})
    with pytest.raises(ValueError, match=r"numbers of shape \[2, 1, 9\], not \[\]"):
        generate(model.med, cross, PROMPT, how, END, PAD)


def test_the_last_place_of_the_model_is_used(model: BLIP) -> None:
    assert write(model, looked_at(model, 2), max_length=25, min_length=25).ids.shape == (2, 25)


# beside transformers ---------------------------------------------------------------------------------------------------

THEIRS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, long": {"min_length": 12},
    "greedy, penalty": {"repetition_penalty": 1.3},
    "greedy, bigrams": {"no_repeat_ngram_size": 2, "max_length": 24},
    "beam": {"num_beams": 3},
    "beam, three": {"num_beams": 3, "num_return_sequences": 3},
    "beam, long": {"num_beams": 3, "min_length": 10, "max_length": 24},
    "beam, short is better": {"num_beams": 4, "length_penalty": 0.3},
    "beam, long is better": {"num_beams": 4, "length_penalty": 2.0, "max_length": 18},
    "beam, no length": {"num_beams": 3, "length_penalty": 0.0},
    "beam, penalty": {"num_beams": 3, "repetition_penalty": 1.5, "num_return_sequences": 2},
    "beam, trigrams": {"num_beams": 5, "no_repeat_ngram_size": 3, "max_length": 24},
    "beam, early": {"num_beams": 3, "early_stopping": True, "num_return_sequences": 3},
    "beam, one token": {"num_beams": 3, "max_length": 4},
    "everything": {
        **{"num_beams": 4, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_length": 8, "max_length": 24},
        **{"length_penalty": 1.4, "num_return_sequences": 2},
    },
}
NAMES = {"num_beams": "beams", "no_repeat_ngram_size": "no_repeat_ngram", "num_return_sequences": "samples"}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, BLIP]:
    pytest.importorskip("transformers")
    from tests.modules.test_transformers_parity import ours, theirs

    their = theirs("BlipForConditionalGeneration")
    with torch.no_grad():  # so that texts end, and not all at once
        their.text_decoder.cls.predictions.bias[END] += 1.0
        their.text_decoder.cls.predictions.decoder.weight.mul_(4.0)
    return their.double(), ours(their, tmp_path_factory.mktemp("theirs"), encoder=False)


@pytest.mark.parametrize("name", THEIRS)
def test_texts_are_those_of_transformers(both: tuple[Any, BLIP], name: str) -> None:
    their, model = both
    kwargs: dict[str, Any] = {"max_length": 16, "min_length": 0} | THEIRS[name]
    image = pictures(6)
    prompt = torch.tensor([[*PROMPT, END]]).expand(6, -1).clone()  # they put [DEC] first and drop the last
    want = their.generate(
        pixel_values=image, input_ids=prompt, return_dict_in_generate=True, output_scores=True, **kwargs
    )
    changed = {NAMES.get(key, key): value for key, value in kwargs.items()}
    how = Decoding(
        **PLAIN | {"strategy": "beam" if "num_beams" in kwargs else "greedy", "length_counts": "new"} | changed
    )
    with torch.no_grad():
        cross = model.med.look(model.visual_encoder(image), decoder=True)
    got = generate(model.med, cross, PROMPT, how, END, PAD)
    assert got.ids.tolist() == want.sequences.tolist()
    if "num_beams" in kwargs:
        torch.testing.assert_close(got.score.float(), want.sequences_scores.float())

"""Retrieval in both directions: by ITC similarity, then the best k of each query re-ranked by ITM (paper section 5.1).

Score of a candidate: ITM's logit of "match" plus the cosine similarity, as released, or plus the similarity as ITC has it, divided
by the temperature: where ITM learnt from negatives drawn by ITC, it tells only what ITC does not. Candidates outside the best k
come after all others.

- every picture and text is encoded once, on the rank whose it is. Features and words travel; the states of a picture don't:
  its rank re-ranks all pairs that it is in, its keys and values projected once for all its candidate texts
- features, words, states and scores lie in files; in memory are `similarities_at_once` numbers at a time, and a few for each
  picture and text. A candidate is wanted where it is above its query's cut, one number, so no list of candidates is kept
- similarities are formed in float64, so that a pair has the same one in whatever block it stands, on any number of ranks
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from blip.evaluators.collect import from_all_ranks
from blip.evaluators.rows import Rows, of_all_ranks
from blip.layout import TextLayout
from blip.modules.blip import BLIP
from blip.text import Tokenizer

AT = (1, 5, 10)
FEATURES_AT_ONCE = 1024  # rows that are read or sent together
NOWHERE = float("-inf")


@dataclass(frozen=True)
class Side:
    """All pictures (by their ids) or all texts (by their pictures) of all ranks, told by their places from 0 on.

    features: [n, E]; shows [n]: the place of the picture that each shows or describes; mine: the places of this rank's own, in
    the order in which it met them.
    """

    features: Rows
    shows: Tensor
    mine: Tensor


@dataclass(frozen=True)
class Words:
    """Ids of all texts in file, [T, L], of which the first `lengths` [T] count."""

    ids: Rows
    lengths: Tensor


@dataclass(frozen=True)
class Cut:
    """Of each query the similarity of its k-th candidate, and the last place that counts among those that are equal to it."""

    lowest: Tensor
    last: Tensor

    @classmethod
    def room(cls, queries: int) -> Cut:
        return cls(torch.empty(queries), torch.empty(queries, dtype=torch.long))

    def fill(self, rows: Tensor | slice, similarity: Tensor, k: int) -> None:
        """From similarities [P, N] of some queries; of equal candidates the first come first."""
        k = min(k, similarity.shape[1])
        lowest = similarity.topk(k, dim=1).values[:, -1:]
        above = (similarity > lowest).sum(1, keepdim=True)
        self.lowest[rows] = lowest[:, 0]
        self.last[rows] = ((similarity == lowest).cumsum(1, dtype=torch.int32) < k - above).sum(1)

    def of_all_ranks(self, places: Tensor) -> Cut:
        """Those of all ranks, each at its place among all."""
        parts = from_all_ranks([(places, self)])
        everyone = Cut.room(sum(len(where) for where, _ in parts))
        for where, cut in parts:
            everyone.lowest[where], everyone.last[where] = cut.lowest, cut.last
        return everyone

    def rows(self, rows: slice) -> Cut:
        """Of some queries, to be held against [P, N] similarities."""
        return Cut(self.lowest[rows][:, None], self.last[rows][:, None])

    def admits(self, similarity: Tensor, place: Tensor) -> Tensor:
        """Whether candidates at their places are among the best k; all broadcast."""
        return (similarity > self.lowest) | ((similarity == self.lowest) & (place <= self.last))


class RetrievalEvaluator:
    """R@1, 5 and 10 in percent, `i2t_*` (texts of a picture) and `t2i_*` (the picture of a text), their mean, and median ranks.

    `..._itc` is by ITC alone. Batches are `Batch`es: pictures [B, 3, S, S], or clips [B, F, 3, S, S]. Each picture comes once,
    with all its texts, on one of the ranks; ValueError where one comes twice.

    top_k: how many candidates of each query ITM looks at; texts_at_once: how many texts go through ITM together at most.
    itc_scale: what the cosine is multiplied with before ITM's logit is added; None: 1 / temperature.
    names: of the two directions. similarities_at_once: how many may be in memory (a row of them at least).
    folder: where the temporary files lie; None: the system's folder for such.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        top_k: int,
        texts_at_once: int,
        itc_scale: float | None,
        names: Sequence[str] = ("i2t", "t2i"),
        similarities_at_once: int = 2**19,
        folder: str | None = None,
    ) -> None:
        self.top_k, self.texts_at_once, self.itc_scale = top_k, texts_at_once, itc_scale
        self.names, self.similarities_at_once, self.folder = tuple(names), similarities_at_once, folder
        self.reset()

    def reset(self) -> None:
        self.image_ids: list[int] = []
        self.images, self.states = Rows(self.folder), Rows(self.folder)
        self.owners: list[int] = []  # of each text its picture's id
        self.lengths: list[int] = []
        self.texts, self.words = Rows(self.folder), Rows(self.folder)

    @torch.no_grad()
    def update(self, model: BLIP, batch: Any) -> None:
        states = model.image_states(batch.image)
        ids = batch.image_ids.tolist()
        self.image_ids += ids
        self.images.append(model.image_features(states))
        self.states.append(states)
        self.owners += [ids[row] for row in batch.text_row.tolist()]
        self.lengths += batch.layout.mask.sum(1).tolist()
        self.texts.append(model.text_features(batch.input_ids, batch.layout))
        self.words.append(batch.input_ids.to(torch.int32))

    @torch.no_grad()
    def compute(self, model: BLIP) -> dict[str, float]:
        if not sum(from_all_ranks([len(self.owners)])):
            return {}
        pictures, texts, words = self.gathered()
        picture_cut, pictures_by_itc = self.first_stage(pictures, texts)
        text_cut, texts_by_itc = self.first_stage(texts, pictures)
        text_cut = text_cut.of_all_ranks(texts.mine)
        scale = 1 / model.temperature.item() if self.itc_scale is None else self.itc_scale
        by_both = self.second_stage(model, scale, pictures, texts, words, picture_cut, text_cut)
        results = {"chance_r1": 100.0 / len(pictures.shows)}
        for name, ahead in zip(self.names, by_both, strict=True):
            results |= {f"{name}_r{k}": rate for k, rate in recalls(ahead).items()}
            results[f"{name}_median_rank"] = 1 + ahead.double().quantile(0.5).item()
        results["mean"] = sum(results[f"{name}_r{k}"] for name in self.names for k in AT) / (len(AT) * len(self.names))
        for name, ahead in zip(self.names, (pictures_by_itc, texts_by_itc), strict=True):
            ahead = torch.cat(from_all_ranks([ahead]))
            results |= {f"{name}_r{k}_itc": rate for k, rate in recalls(ahead).items()}
        return results

    def gathered(self) -> tuple[Side, Side, Words]:
        """What the ranks hold, brought to every rank; ValueError where a picture came twice."""
        ids, owners, lengths = (torch.tensor(x, dtype=torch.long) for x in (self.image_ids, self.owners, self.lengths))
        all_ids, all_owners, all_lengths = (torch.cat(from_all_ranks([x])) for x in (ids, owners, lengths))
        known, twice = all_ids.unique(return_counts=True)  # ascending
        if twice.max() > 1:
            raise ValueError(
                f"picture {int(known[twice.argmax()])} came {int(twice.max())} times, which would count it as often: "
                "deal the set to the ranks without repeating any (EvaluationSampler)"
            )
        # A picture's texts follow each other, on the rank that has it: their places are its first text's and those behind.
        order = all_owners.argsort(stable=True)
        _, counts = owners.unique_consecutive(return_counts=True)
        behind = torch.arange(len(owners)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        mine = torch.searchsorted(all_owners[order], owners) + behind
        place = torch.searchsorted(known, ids)
        pictures = Side(self._all(self.images, place), torch.arange(len(known)), place)
        texts = Side(self._all(self.texts, mine), torch.searchsorted(known, all_owners[order]), mine)
        words = self._all(self.padded_words(int(all_lengths.max())), mine)
        return pictures, texts, Words(words, all_lengths[order])

    def padded_words(self, longest: int) -> Rows:
        """The ids of this rank's texts as rows of one length."""
        grid, starts = Rows(self.folder), [0, *accumulate(self.lengths)]
        for first in range(0, len(self.lengths), FEATURES_AT_ONCE):
            lengths = self.lengths[first : first + FEATURES_AT_ONCE]
            packed = self.words.read(starts[first], starts[first + len(lengths)]).split(lengths)
            rows = pad_sequence(packed, batch_first=True)
            grid.append(pad(rows, (0, longest - rows.shape[1])))
        return grid

    def _all(self, own: Rows, places: Tensor) -> Rows:
        return of_all_ranks(own, places.tolist(), FEATURES_AT_ONCE)

    def first_stage(self, queries: Side, candidates: Side) -> tuple[Cut, Tensor]:
        """By similarity alone, for this rank's queries: where the best k end, and how many are ahead of the best true one."""
        cut, ahead = Cut.room(len(queries.mine)), torch.empty(len(queries.mine), dtype=torch.long)
        for some in self._some(len(ahead), candidates):
            rows = queries.mine[some]
            similarity = similarities(queries.features.take(rows.tolist()), candidates.features)  # [P, N]
            cut.fill(some, similarity, self.top_k)
            ahead[some] = ahead_of(similarity, queries.shows[rows][:, None] == candidates.shows)
        return cut, ahead

    def _some(self, queries: int, candidates: Side) -> Iterator[slice]:
        """The queries, as many at a time as may have all their similarities in memory."""
        step = max(1, self.similarities_at_once // len(candidates.shows))
        return (slice(start, min(start + step, queries)) for start in range(0, queries, step))

    def second_stage(
        self, model: BLIP, scale: float, pictures: Side, texts: Side, words: Words, picture_cut: Cut, text_cut: Cut
    ) -> tuple[Tensor, Tensor]:
        """How many candidates are ahead of the best true one once the best k are re-ranked: of pictures [I], of texts [T].

        Each rank scores the pairs of its own pictures; what they mean for a text is put together from all ranks.
        """
        # What grows with the set has its place from the start: small things kept between large ones tear memory to pieces.
        of_pictures, others = torch.empty(len(pictures.mine), dtype=torch.long), Rows(self.folder)
        true_score = torch.full(texts.shows.shape, NOWHERE)  # of each text's own picture, where it is among the best k
        for own in self._some(len(of_pictures), texts):
            rows = pictures.mine[own]
            similarity = similarities(pictures.features.take(rows.tolist()), texts.features)  # [P, T]
            near_texts = picture_cut.rows(own).admits(similarity, torch.arange(len(texts.shows)))
            near_pictures = text_cut.admits(similarity, rows[:, None])
            logits = self.rerank(model, torch.arange(own.start, own.stop), words, near_texts | near_pictures)
            scores = (scale * similarity + logits).nan_to_num(nan=NOWHERE)
            truth = rows[:, None] == texts.shows
            of_pictures[own] = ahead_of(scores.masked_fill(~near_texts, NOWHERE), truth)
            row, text = (near_pictures & truth).nonzero(as_tuple=True)
            true_score[text] = scores[row, text]
            row, text = (near_pictures & ~truth).nonzero(as_tuple=True)
            others.append(torch.stack([text.int(), scores[row, text].view(torch.int32)], dim=1))
        true_score = torch.stack(from_all_ranks([true_score])).amax(0)
        count = torch.zeros(texts.shows.shape, dtype=torch.long)
        for _, block in others.blocks(FEATURES_AT_ONCE):
            text, score = block[:, 0].long(), block[:, 1].contiguous().view(torch.float32)
            text = text[score >= true_score[text]]
            count.index_add_(0, text, torch.ones_like(text))
        count = torch.stack(from_all_ranks([count])).sum(0)
        of_texts = torch.where(true_score > NOWHERE, count, len(pictures.shows) - 1)
        return torch.cat(from_all_ranks([of_pictures])), of_texts

    def rerank(self, model: BLIP, own: Tensor, words: Words, wanted: Tensor) -> Tensor:
        """ITM's logit of "match" for the wanted pairs [P, T] of this rank's own pictures [P], 0 elsewhere."""
        device = model.itm_head.weight.device
        logits = torch.zeros(wanted.shape)
        counts = wanted.sum(1)
        # Those with many texts first: one picture may be near to all texts, and must not make work for the others.
        order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
        while len(order):
            most = int(counts[order[0]])
            width = min(most, self.texts_at_once)
            together = self.texts_at_once // width
            rows, order = order[:together], order[together:]
            cross = model.med.look(self.states.take(own[rows].tolist()).to(device))
            # The wanted texts of each picture; a row is filled with its first one: [b, K]
            chosen = pad_sequence([wanted[r].nonzero().flatten() for r in rows], batch_first=True, padding_value=-1)
            chosen = torch.where(chosen < 0, chosen[:, :1], chosen)
            for texts in chosen.split(width, dim=1):
                lengths = words.lengths[texts.flatten()]
                ids = words.ids.take(texts.flatten().tolist()).long()
                packed = ids[torch.arange(ids.shape[1]) < lengths[:, None]].to(device)
                layout = TextLayout.from_lengths(lengths.tolist()).to(device)
                found = model.itm_logits(packed, layout, cross)[:, 1]
                logits[rows[:, None], texts] = found.float().cpu().view_as(texts)
        return logits


def similarities(queries: Tensor, candidates: Rows) -> Tensor:
    """Cosines [P, N] of unit vectors [P, E] with all candidates; what is no number is below all."""
    out = torch.empty(len(queries), len(candidates))
    for start, block in candidates.blocks(FEATURES_AT_ONCE):
        out[:, start : start + len(block)] = queries.double() @ block.double().T
    return out.nan_to_num_(nan=NOWHERE)


def ahead_of(scores: Tensor, truth: Tensor) -> Tensor:
    """How many false candidates stand before the best true one, [P] of [P, N]; equal scores count against the model."""
    highest = scores.masked_fill(~truth, NOWHERE).amax(1, keepdim=True)
    return ((scores >= highest) & ~truth).sum(1)


def recalls(ahead: Tensor) -> dict[int, float]:
    """Percent of queries with a true candidate among the first k."""
    return {k: 100.0 * (ahead < k).double().mean().item() for k in AT}

"""The sections of the report, each a function of what was counted: from what is kept to how the records were made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip.capfilt import page
from blip.capfilt.examples import Example
from blip.capfilt.page import bar, card, histogram, key, number, percent, said, table
from blip.capfilt.tally import BELOW, BINS, NOT_TAKEN, REASONS, Label, Tally
from blip.capfilt.words import LONGEST
from blip.datamodules.shapes_truth import TRUE
from blip.datamodules.views import View
from blip.metrics.rates import share

SHARES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)  # of the texts, that other thresholds keep
NEAR = 0.005  # of the texts, for a rounder threshold
Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class Told:
    """All that the page tells. complete: whether all shards have records; shown: (shard, record) -> picture; missing: why there is none."""

    title: str
    view: View
    described: Mapping[str, Any]
    complete: bool
    found: Tally
    labels: Mapping[str, Label]
    numbers: Numbers
    shown: Mapping[tuple[str, int], tuple[str, bool]]
    missing: str
    costs: Sequence[Mapping[str, Any]]

    def of(self, label: str, what: str) -> Any:
        return self.numbers.get(f"{label.replace(' ', '_')}/{what}")


def whole_page(told: Told) -> str:
    sections = [
        ("Kept and dropped", _kept(told)),
        ("Against the truth", _truth(told)),
        ("Scores", _scores(told)),
        ("Gallery", _gallery(told)),
        ("Beside the threshold", _beside(told)),
        ("Mistakes", _mistakes(told)),
        ("Length and vocabulary", _texts(told)),
        ("Words", _words(told)),
        ("Cost", _cost(told)),
        ("Broken samples", _broken(told)),
        ("How it was made", _made(told)),
    ]
    return page.page(told.title, _lead(told), sections)


def _lead(told: Told) -> str:
    texts, kept = told.of("all", "texts"), told.of("all", "kept")
    values = [
        (number(told.found.pictures), "pictures"),
        (number(texts), "texts"),
        (number(kept), "texts kept"),
        (percent(told.of("all", "noise_ratio")), "of all texts dropped"),
    ]
    if told.of("synthetic", "texts"):
        values.append((percent(told.of("synthetic", "noise_ratio")), "of the synthetic texts dropped"))
    if (recall := told.of("all", "truth/recall")) is not None:
        values.append((percent(recall), "of the noise found"))
    rule = f"<p class=lead>{_rule(told.view)}</p>{page.tiles(values)}"
    if not told.complete:
        of = len(told.described.get("shards", ())) or "an unknown number of"
        rule += f"<p class=soft>The pass is not finished: {number(told.found.shards)} of {of} shards have records.</p>"
    if told.missing:
        rule += f"<p class=soft>Without pictures: the shards cannot be read ({said(told.missing)}).</p>"
    return rule


def _rule(view: View) -> str:
    scores = " and ".join(map(_score, view.scores)) or "nothing"
    whole = {1: scores}.get(len(view.scores), f"the {'mean' if view.combine == 'mean' else 'least'} of {scores}")
    sources = " and ".join(view.sources)
    if not view.scores:
        return f"Every text of {sources} is kept."
    if view.share is not None:
        return f"Kept are the {100 * view.share:g} % of the texts of {sources} with the highest {whole}."
    return f"A text of {sources} is kept if {whole} is at least {view.threshold:g}."


def _score(column: str) -> str:
    """`itm_large` as `ITM large`."""
    name, _, scorer = column.partition("_")
    return said(f"{name.upper() if name in ('itm', 'itc') else name} {scorer}".strip())


def _label(name: str) -> str:
    return said(name[:1].upper() + name[1:])


def _kept(told: Told) -> str:
    reasons = [reason for reason in REASONS if any(label.dropped[reason] for label in told.labels.values())]
    names = [*told.labels, "all"]
    words = {BELOW: "below the cut" if told.view.share is not None else BELOW}
    rows, styles = [], []
    for name in names:
        dropped = [number(told.of(name, f"dropped/{reason.replace(' ', '_')}") or 0) for reason in reasons]
        ratio = told.of(name, "noise_ratio")
        shown = "" if ratio is None else bar(ratio / 100, style="d")
        counts = [number(told.of(name, what)) for what in ("texts", "kept")]
        rows.append([_label(name), *counts, *dropped, percent(ratio), shown])
        styles.append("total" if name == "all" else "part" if name.startswith("synthetic ") else "")
    head = ["Source", "#Texts", "#Kept", *(f"#{words.get(reason, reason).capitalize()}" for reason in reasons)]
    body = table([*head, "#Noise ratio", ""], rows, styles)
    bare = told.found.bare
    return (
        f"{body}<p class=soft>Noise ratio: the share that is dropped. The paper drops 25 % of the texts that its captioner wrote by "
        "nucleus sampling and 19 % of those by beam search (Table 2), 8 % where captioner and filter share their weights (Table 4); "
        f"of web texts it gives no number. Pictures that keep no text: {number(bare)}.</p>"
    )


def _truth(told: Told) -> str:
    judged = [name for name in [*told.labels, "all"] if told.of(name, "truth/noise_dropped") is not None]
    if not judged:
        return ""

    def rate(name: str, what: str) -> str:
        value, low, high = (told.of(name, f"truth/{what}{end}") for end in ("", "_low", "_high"))
        return f"{percent(value)} <span class=soft>[{number(low, 1)}, {number(high, 1)}]</span>"

    styles = ["total" if name == "all" else "part" if name.startswith("synthetic ") else "" for name in judged]
    rates = ["precision", "recall", "f1", "auc"]
    quality = table(
        ["Texts", "#Precision", "#Recall", "#F1", "#AUC"],
        [[_label(name), *(rate(name, what) for what in rates)] for name in judged],
        styles,
    )
    cells = ("noise_dropped", "true_dropped", "noise_kept", "true_kept")
    counts = table(
        ["Texts", "#Noise dropped", "#True dropped", "#Noise kept", "#True kept", "#Noise before", "#Noise after"],
        [
            [
                _label(name),
                *(number(told.of(name, f"truth/{cell}")) for cell in cells),
                *(percent(told.of(name, f"truth/noise_{when}")) for when in ("before", "after")),
            ]
            for name in judged
        ],
        styles,
    )
    kinds = "".join(f"<div>{_recall_of_kinds(told, name)}</div>" for name in judged if name != "all")
    attributes = [
        f"{_label(name)}: {percent(told.of(name, 'truth/attributes_before'))} of all, "
        f"{percent(told.of(name, 'truth/attributes_after'))} of those kept."
        for name in judged
        if name != "all" and told.of(name, "truth/attributes_before") is not None
    ]
    return (
        "<p>These pictures are drawn from scenes that are known, so every text is known to be true or noise. A synthetic text is true "
        "if it says all that the scene shows and nothing else. A positive is noise; in brackets 95 % intervals (Wilson; of AUC, DeLong)."
        f"</p>{quality}{counts}<h3>Recall of each kind of noise</h3><div class=words>{kinds}</div>"
        f"<h3>Attributes</h3><p>F1 of shapes, colours, sizes, textures, relations and background that the texts name. "
        f"{' '.join(attributes)}</p>"
    )


def _recall_of_kinds(told: Told, name: str) -> str:
    prefix = f"{name.replace(' ', '_')}/truth/texts/"
    kinds = [key.removeprefix(prefix) for key in told.numbers if key.startswith(prefix)]
    rows, styles = [], []
    for kind in kinds:
        value, low, high = (told.of(name, f"truth/recall/{kind}{end}") for end in ("", "_low", "_high"))
        interval = f"[{number(low, 1)}, {number(high, 1)}]"
        shown = bar(value / 100, (low / 100, high / 100))
        words = said(kind.rpartition("/")[2].replace("_", " "))
        rows.append([words, number(told.of(name, f"truth/texts/{kind}")), percent(value), interval, shown])
        styles.append("part" if "/" in kind else "")
    return table([f"{_label(name)}: kind of noise", "#Texts", "#Dropped", "#95 %", ""], rows, styles) if rows else ""


def _scores(told: Told) -> str:
    columns, decides = told.found.ranges, told.found.decides
    cut = told.view.threshold if told.view.share is None else told.found.least_kept
    rows = []
    for name, label in told.labels.items():
        charts = []
        for column, ends in columns.items():
            edges = np.linspace(*ends, BINS // 2 + 1)
            dropped, kept = label.scores[column].reshape(2, -1, 2).sum(2)
            if label.scores[column].any():
                title = f"{_label(name)}: {_score(column)}"
                charts.append(histogram(title, edges, {"d": dropped, "k": kept}, cut if column == decides else None))
        if label.kinds and decides:
            edges = np.linspace(*columns[decides], BINS // 2 + 1)
            true, score = np.array(label.kinds, object) == TRUE, np.array(label.deciding)
            layers = {style: np.histogram(score[mask], edges)[0] for style, mask in (("d", ~true), ("k", true))}
            charts.append(histogram(f"{_label(name)}: {_score(decides)} of noise and true texts", edges, layers, cut))
        rows.append(f"<div class=charts>{''.join(charts)}</div>" if charts else "")
    if not any(rows):
        return ""
    truth = any(label.kinds for label in told.labels.values())
    colours = key(kept=f"kept{' (or true)' * truth}", dropped=f"dropped{' (or noise)' * truth}")
    words = (
        "<p class=soft>Texts by score; heights grow with the square root of the count, so that few are seen beside many. "
        f"The dashed line is the threshold.</p>{colours}"
    )
    return words + "".join(rows) + _other_thresholds(told)


def _other_thresholds(told: Told) -> str:
    """What would be kept with another threshold, and the noise that would be dropped: no model is needed to know."""
    if not told.found.decides or told.view.share is not None:
        return ""
    found = [(name, told.labels.get(name, Label())) for name in told.view.sources]
    of = {name: label.texts - label.dropped[NOT_TAKEN] for name, label in found}
    reaching = sum((label.reaching for _, label in found), np.zeros(len(told.found.thresholds), np.int64))
    noise = np.array([kind != TRUE for _, label in found for kind in label.kinds], bool)
    deciding = np.array([score for _, label in found for score in label.deciding], np.float32)
    in_use = int(np.searchsorted(told.found.thresholds, np.float32(told.view.threshold)))
    rows, styles = [], []
    for place in _worth_showing(told.found.thresholds, reaching, in_use, sum(of.values())):
        threshold = told.found.thresholds[place]
        kept = {name: int(label.reaching[place]) for name, label in found if of[name]}
        row = [f"{threshold!s}, in use" if place == in_use else str(threshold)]
        row += [percent(100 * kept[name] / of[name]) if of[name] else "n/a" for name in of]
        row.append(number(int(reaching[place])))
        if len(noise):
            dropped = deciding < threshold
            hit = int((dropped & noise).sum())
            row += [percent(100 * share(hit, all_of).value) for all_of in (int(dropped.sum()), int(noise.sum()))]
        rows.append(row)
        styles.append("total" if place == in_use else "")
    truth = ["#Noise precision", "#Noise recall"] if len(noise) else []
    head = ["#Threshold", *(f"#{_label(name)} kept" for name in of), "#Texts kept", *truth]
    words = "Precision: how many of the dropped texts are noise. Recall: how much of the noise is dropped."
    meaning = f"<p class=soft>{words}</p>" if truth else ""
    return f"<h3>With another threshold</h3>{table(head, rows, styles)}{meaning}"


def _worth_showing(thresholds: NDArray[np.float32], reaching: NDArray[np.int64], in_use: int, texts: int) -> list[int]:
    """Places of the threshold in use and of those that keep nearly SHARES of all texts, ascending; no two keep the same.

    Of several that are near enough, the one of the fewest digits.
    """
    shown = {int(reaching[in_use]): in_use}
    for kept in SHARES:
        away = np.abs(reaching - kept * texts)
        near = np.flatnonzero(away <= max(NEAR * texts, away.min()))
        best = min(near.tolist(), key=lambda place: (len(str(thresholds[place])), away[place]))
        if reaching[best]:
            shown.setdefault(int(reaching[best]), best)
    return sorted(shown.values())


def _cards(told: Told, examples: Sequence[Example]) -> str:
    def texts(example: Example) -> list[tuple[str, str, bool, str]]:
        found = []
        for line in example.lines:
            source, _, captioner = line.label.partition(" ")
            who = f"T<sub>{said(source[:1])}</sub>" + (f" {said(captioner)}" if _several(told) and captioner else "")
            scores = [f"{_score(name)} {value:.3f}" for name, value in line.scores.items() if math.isfinite(value)]
            truth = [] if line.kind is None else ["true" if line.kind == TRUE else f"noise: {said(line.kind)}"]
            found.append((who, line.text, line.kept, "".join(f" · {each}" for each in [*scores, *truth])))
        return found

    cards = []
    for example in examples:
        picture, tiny = told.shown.get((example.shard, example.record), ("", False))
        cards.append(card(picture, tiny, f"{example.shard}: {example.key}", texts(example)))
    return f"<div class=cards>{''.join(cards)}</div>" if cards else ""


def _several(told: Told) -> bool:
    """Whether there are several captioners, which then are named."""
    return any(name.startswith("synthetic ") for name in told.labels)


def _gallery(told: Told) -> str:
    return (
        "<p class=soft>Pictures at random with the text of the web T<sub>w</sub> and the synthetic text T<sub>s</sub>, as in the "
        f"paper's Figure 4: green is kept, red is dropped.</p>{_cards(told, told.found.examples.gallery)}"
    )


def _beside(told: Told) -> str:
    body = ""
    for words, found in (("just kept", told.found.examples.kept), ("just dropped", told.found.examples.dropped)):
        for name, examples in sorted(found.items(), reverse=True):
            if examples:
                shown = _label(name if _several(told) else name.split()[0])
                body += f"<h3>{shown}, {words}</h3>{_cards(told, examples)}"
    return body


def _mistakes(told: Told) -> str:
    noise, lost = told.found.examples.noise, told.found.examples.lost
    body = f"<h3>Noise that is kept, the surest first</h3>{_cards(told, noise)}" if noise else ""
    return body + (f"<h3>True texts that are dropped, the surest first</h3>{_cards(told, lost)}" if lost else "")


def _texts(told: Told) -> str:
    columns = {"words_mean": ("#Words, mean", 2), "words_median": ("#Median", 0), "vocabulary": ("#Distinct words", 0)}
    columns |= {"word_entropy_bits": ("#Entropy of words, bits", 2), "distinct_texts": ("#Distinct texts, %", 1)}
    rows, charts = [], []
    for name, label in [*told.labels.items(), ("all", None)]:
        for when, words in (("before", "all"), ("after", "kept")):
            if told.of(name, f"{when}/words_mean") is None or (name == "all" and len(told.labels) == 1):
                continue
            cells = [number(told.of(name, f"{when}/{column}"), digits) for column, (_, digits) in columns.items()]
            rows.append([f"{_label('every source' if name == 'all' else name)}, {words}", *cells])
        if label is not None and label.before.count:
            longest = min(LONGEST, max(5, int(np.flatnonzero(label.before.lengths)[-1]))) + 1
            layers = {"m": label.before.lengths[:longest], "k": label.after.lengths[:longest]}
            charts.append(histogram(f"{_label(name)}: words of a text", np.arange(longest + 1), layers, digits=0))
    share = (
        f" Counted over {percent(100 * told.found.sampled)} of the texts, at random." if told.found.sampled < 1 else ""
    )
    return (
        f"{table(['Texts', *(head for head, _ in columns.values())], rows)}<p class=soft>The set before is the web; the set after is "
        f"what is kept of every source.{share}</p>{key(mark='all', kept='kept')}<div class=charts>{''.join(charts)}</div>"
    )


def _words(told: Told) -> str:
    body = ""
    for when, words in (("all", "All texts"), ("kept", "Kept texts")):
        sides = []
        for side in ("synthetic", "web"):
            shown = told.numbers.get(f"words/{when}/preferred_by_{side}") or []
            most = max((abs(each["z"]) for each in shown), default=1.0)
            rows = [
                [
                    f"<bdi>{said(each['word'], 30)}</bdi>",
                    number(each["first"], 2),
                    number(each["second"], 2),
                    number(abs(each["z"]), 1),
                    bar(abs(each["z"]) / most),
                ]
                for each in shown
            ]
            if rows:
                sides.append(table([f"Preferred by {side}", "#Synthetic", "#Web", "#z", ""], rows))
        if sides:
            body += f"<h3>{words}</h3><div class=words>{''.join(f'<div>{each}</div>' for each in sides)}</div>"
    if not body:
        return ""
    return (
        "<p class=soft>How often a thousand words have each, and the log-odds between the two in standard errors (Monroe et al., 2008): "
        f"what the captioner says too often, and what it does not know to say.</p>{body}"
    )


def _cost(told: Told) -> str:
    stages = [*told.costs]
    if told.found.seconds:
        own = {
            "stage": "this pass, all workers together",
            "seconds": told.found.seconds,
            "pictures": told.found.pictures,
        }
        stages.append(own)
    rows = []
    for stage in stages:
        seconds, seen = stage.get("seconds"), stage.get("pictures", stage.get("pairs"))
        rate = seen / seconds if seen and seconds else None
        rows.append([said(str(stage.get("stage", ""))), _time(seconds), number(seen), number(rate, 1)])
    return table(["Stage", "#Time", "#Pictures or pairs", "#A second"], rows) if rows else ""


def _time(seconds: float | None) -> str:
    if seconds is None:
        return number(None)
    minutes, rest = divmod(round(seconds), 60)
    return f"{seconds:.1f} s" if seconds < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _broken(told: Told) -> str:
    if not told.found.broken:
        return ""
    rows = []
    for reason, count in told.found.broken.most_common():
        names = told.found.broken_names[reason]
        more = f", and {number(count - len(names))} more" if count > len(names) else ""
        rows.append([said(reason), number(count), ", ".join(said(name, 80) for name in names) + more])
    return table(["Reason", "#Pictures", "Names"], rows)


def _made(told: Told) -> str:
    """The rule and the description of the pass, of the shards the number alone."""
    shards = told.described.get("shards")
    described = {name: value for name, value in told.described.items() if name != "shards"}
    if isinstance(shards, list):
        described["shards"] = len(shards)
    shown = json.dumps({"view": told.view.rule, "pass": described}, indent=1, ensure_ascii=False)
    return f"<details><summary>The rule, the models and how they decoded</summary><pre>{page.verbatim(shown)}</pre></details>"

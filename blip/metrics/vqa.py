"""VQA's accuracy: an answer is right in as far as three of the ten humans gave it, after both sides were normalised.

Written after the rules of the official evaluation (Antol et al., 2015; the code of VQA's authors is the measure), with its
habits, which are part of the number:

- where all humans gave the same string, nothing is normalised: "Yes" does not match ten times "yes";
- a mark beside a space anywhere in the answer is deleted at all its places, otherwise it becomes a space;
- full stops go unless a digit follows; numbers in words become digits up to ten; a, an, the go; contractions are mended.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from blip.metrics.files import read_json, write_json

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS_AT_MOST = 32  # the official call gives a flag where the count belongs
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(n) for n, word in enumerate(_NUMBERS.split())} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_MENDED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
    how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
    'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've
"""
# Each word with one of its apostrophes missing.
_CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in _MENDED.split() for i, c in enumerate(word) if c == "'"}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # so in the official table


def normalise(answer: str) -> str:
    """An answer as it is compared: marks, then digits, articles and contractions; lower case."""
    return _words(_without_marks(_one_line(answer)))


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _without_marks(answer: str) -> str:
    delete_all = _COMMA_IN_NUMBER.search(answer) is not None
    text = answer
    for mark in _MARKS:
        delete = delete_all or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if delete else " ")
    return _FULL_STOP.sub("", text, count=_FULL_STOPS_AT_MOST)


def _words(answer: str) -> str:
    words = [_DIGITS.get(word, word) for word in answer.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answers: Sequence[str], predicted: str) -> float:
    """Accuracy, 0 to 1, of an answer: over each human left out, min(1, how many of the others agree / 3), averaged."""
    if not answers:
        raise ValueError("a question without human answers has no accuracy")
    answers, predicted = [_one_line(answer) for answer in answers], _one_line(predicted)
    if len(set(answers)) > 1:
        answers, predicted = [normalise(answer) for answer in answers], normalise(predicted)
    agree = [answer == predicted for answer in answers]
    return sum(min(1.0, (sum(agree) - own) / 3) for own in agree) / len(agree)


def score_vqa(answers: Mapping[str, str], annotations: Sequence[Mapping]) -> dict:
    """{"overall", "perAnswerType", "perQuestionType", "per_question"} in percent, two digits, as the official code has them.

    answers: question id (as a string) -> predicted; annotations: the records of VQA's annotation files. Every question needs an
    answer, and every answer a question (ValueError naming some).
    """
    known = [str(annotation["question_id"]) for annotation in annotations]
    _same("answers", answers, "annotations", known)
    accuracy = {}
    groups: dict[str, dict[str, list[float]]] = {"perAnswerType": {}, "perQuestionType": {}}
    for question, annotation in zip(known, annotations, strict=True):
        accuracy[question] = vqa_accuracy([human["answer"] for human in annotation["answers"]], answers[question])
        for group, key in (("perAnswerType", "answer_type"), ("perQuestionType", "question_type")):
            if key in annotation:
                groups[group].setdefault(annotation[key], []).append(accuracy[question])
    return {
        "n": len(accuracy),
        "overall": _percent(accuracy.values()),
        **{
            group: {name: _percent(values) for name, values in sorted(types.items())} for group, types in groups.items()
        },
        "per_question": {question: _percent([value]) for question, value in accuracy.items()},
    }


def _percent(values: Iterable[float]) -> float:
    values = list(values)
    return round(100 * sum(values) / len(values), 2)


def score_vqa_files(questions: Path, annotations: Path, results: Path) -> dict:
    """`score_vqa` of files as VQA publishes them; results are those of the test server, [{"question_id", "answer"}]."""
    asked = [str(row["question_id"]) for row in _rows(questions, "questions", ("question_id",))]
    answers: dict[str, str] = {}
    for row in _rows(results, None, ("question_id", "answer")):
        question = str(row["question_id"])
        if question in answers:
            raise ValueError(f"{results}: question {question} is answered twice")
        answers[question] = str(row["answer"])
    known = _rows(annotations, "annotations", ("question_id", "answers"))
    _same(str(questions), asked, str(annotations), [str(row["question_id"]) for row in known])
    return score_vqa(answers, known)


def _rows(path: Path, key: str | None, needed: Sequence[str]) -> list[dict]:
    content = read_json(path)
    rows = content.get(key) if key and isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected {'a list' if key is None else f'an object with the list {key!r}'}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or any(name not in row for name in needed):
            raise ValueError(f"{path}: row {number} is {str(row)[:80]}; expected {' and '.join(map(repr, needed))}")
    return rows


def _same(one: str, ours: Iterable[str], other: str, theirs: Iterable[str]) -> None:
    """The official code refuses results that are not of exactly the questions of the annotations; so does this."""
    ours, theirs = list(ours), list(theirs)
    for name, only in ((other, set(theirs) - set(ours)), (one, set(ours) - set(theirs))):
        if only:
            some = ", ".join(sorted(only)[:5]) + ", ..." * (len(only) > 5)
            raise ValueError(f"{one} and {other} are not of the same questions; {len(only)} only in {name}: {some}")


def write_submission(path: Path, answers: Mapping[int, str]) -> None:
    """The file that VQA's test server takes, [{"question_id", "answer"}]: whole or not at all."""
    rows = [{"question_id": question, "answer": answer} for question, answer in answers.items()]
    write_json(path, rows)

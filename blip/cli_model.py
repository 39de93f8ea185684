"""Commands that use a model on pictures: `blip caption|answer|match|embed MODEL PICTURES...`, one JSON line a picture, and `blip search`.

Pictures are files, folders, patterns and tar shards. A file that gives no picture is told of at the end and hurts no other.
With --out a command that was stopped goes on where it was when it is started again: pictures that have a line are left alone, half a
line is taken away, and other settings than the file was begun with are refused.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from blip.api import Model

SECONDS = 1.0  # between two looks at the progress
NAMED = 20  # broken files named at the end
# what it says of pictures with these names
Say = Callable[["Model", "list[np.ndarray]", list[str]], list[dict[str, Any]]]


def add_model(commands: Any) -> None:
    """Adds the commands to the parser of `blip`."""
    caption = _command(commands, "caption", "write captions", caption_pictures)
    caption.add_argument("--prompt", help="words before every caption, not written (default: as the model was trained)")
    caption.add_argument(
        "--strategy", choices=("greedy", "beam", "nucleus"), help="default: as the model's run, or beam"
    )
    caption.add_argument("--beams", type=int)
    caption.add_argument("--top-p", type=float)
    caption.add_argument("--max-length", type=int, help="tokens with the prompt")
    caption.add_argument("--min-length", type=int)
    caption.add_argument("--samples", type=int, help="captions of each picture")
    caption.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")

    answer = _command(commands, "answer", "answer questions", answer_questions)
    asked = answer.add_mutually_exclusive_group(required=True)
    asked.add_argument("--question", action="append", help="a question of every picture; several times for several")
    asked.add_argument(
        "--questions", type=Path, help='JSON lines {"picture", "question"}: each picture gets its own, others none'
    )
    answer.add_argument(
        "--answers", type=Path, help="a JSON list of answers to choose from (default: they are written)"
    )

    match = _command(commands, "match", "tell how well texts fit", match_pictures)
    match.add_argument("--text", action="append", required=True, help="a text; give it several times for several texts")

    _command(commands, "embed", "give vectors to search with", embed_pictures)

    search = commands.add_parser("search", help="find pictures by words", description=search_pictures.__doc__)
    search.add_argument("model", metavar="MODEL", help="the model that `blip embed` was given")
    search.add_argument("vectors", type=Path, metavar="VECTORS", help="the file that `blip embed --out` wrote")
    search.add_argument("text", nargs="+", metavar="TEXT", help="what to look for")
    search.add_argument("--top", type=int, default=10, help="pictures for each text (default: %(default)s)")
    search.add_argument("--tokenizer", help="vocab.txt or tokenizer.json, where the checkpoint holds none")
    search.set_defaults(run=search_pictures)


def _command(commands: Any, name: str, help: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help, description=run.__doc__)
    command.add_argument(
        "model", metavar="MODEL", help="a checkpoint of ours, a released .pth or a folder of transformers"
    )
    command.add_argument("pictures", nargs="+", metavar="PICTURES", help="files, folders, patterns, .tar shards")
    command.add_argument("--out", type=Path, help="the file of JSON lines (default: the output stream)")
    command.add_argument("--tokenizer", help="vocab.txt or tokenizer.json, where the checkpoint holds none")
    command.add_argument("--batch-size", type=int, default=16, help="pictures at once (default: %(default)s)")
    command.add_argument("--device", help="cpu, cuda, ... (default: the GPU where there is one)")
    command.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    command.set_defaults(run=run)
    return command


def caption_pictures(options: argparse.Namespace) -> int:
    """Writes captions: {"picture", "captions": [{"text", "log_prob", "mean_log_prob", "token_log_probs"}]}."""
    names = ("strategy", "beams", "top_p", "max_length", "min_length", "samples")
    decoding = {name: value for name in names if (value := getattr(options, name)) is not None}

    def say(model: Model, pixels: list[np.ndarray], names: list[str]) -> list[dict[str, Any]]:
        from dataclasses import asdict

        found = model.caption(pixels, options.prompt, options.seed, **decoding)
        return [{"captions": [asdict(c) for c in (each if isinstance(each, list) else [each])]} for each in found]

    def settings(model: Model) -> dict[str, Any]:
        from dataclasses import asdict

        prompt = model.prompt if options.prompt is None else options.prompt
        return {"prompt": prompt, "seed": options.seed, **asdict(model.decoding(**decoding))}

    return _run(options, say, settings)


def answer_questions(options: argparse.Namespace) -> int:
    """Answers questions: {"picture", "answers": [{"question", "answer", "log_prob"}]}."""
    choices = None
    if options.answers is not None:
        choices = json.loads(options.answers.read_text(encoding="utf-8"))
        if not (isinstance(choices, list) and choices and all(isinstance(each, str) for each in choices)):
            raise ValueError(f"{options.answers}: no list of answers; `blip data answers` makes one")

    own = None if options.questions is None else _own_questions(options.questions, options.pictures)

    def say(model: Model, pixels: list[np.ndarray], names: list[str]) -> list[dict[str, Any]]:
        asked = [options.question if own is None else own[name] for name in names]
        return [
            {
                "answers": [
                    {"question": question, "answer": found.text, "log_prob": found.log_prob}
                    for question, found in zip(questions, row, strict=True)
                ]
            }
            for questions, row in zip(asked, model.answer(pixels, asked, choices), strict=True)
        ]

    questions = (
        options.question if own is None else hashlib.blake2b(json.dumps(own).encode(), digest_size=16).hexdigest()
    )
    return _run(options, say, lambda model: {"question": questions, "choices": choices}, own)


def _own_questions(file: Path, pictures: list[str]) -> dict[str, list[str]]:
    """{name of a picture: its questions} of JSON lines; there a picture may go by the end of its path, such as its file's name."""
    from blip.datamodules.files import find

    names: dict[str, list[str]] = {}
    for place in find(pictures):
        names.setdefault(os.path.basename(place.name), []).append(place.name)
    questions: dict[str, list[str]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            picture, question = str(row["picture"]), str(row["question"])
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f'{file}: line {number}: expected {{"picture": "NAME", "question": "..."}}, not {line[:80]}'
            ) from error
        found = [name for name in names.get(os.path.basename(picture), []) if f"/{name}".endswith(f"/{picture}")]
        if len(found) != 1:
            raise ValueError(
                f"{file}: line {number}: {len(found) or 'none'} of the pictures that were given is {picture}"
            )
        questions.setdefault(found[0], []).append(question)
    if not questions:
        raise ValueError(f"{file}: no questions there")
    return questions


def match_pictures(options: argparse.Namespace) -> int:
    """Tells how well texts fit pictures: {"picture", "matches": [{"text", "probability" (ITM), "cosine" (ITC)}]}."""

    def say(model: Model, pixels: list[np.ndarray], names: list[str]) -> list[dict[str, Any]]:
        rows = model.match(pixels, options.text)
        return [
            {
                "matches": [
                    {"text": text, "probability": found.probability, "cosine": found.cosine}
                    for text, found in zip(options.text, row, strict=True)
                ]
            }
            for row in rows
        ]

    return _run(options, say, lambda model: {"text": options.text})


def embed_pictures(options: argparse.Namespace) -> int:
    """Gives unit vectors in the space that pictures and texts share: {"picture", "embedding": [...]}."""

    def say(model: Model, pixels: list[np.ndarray], names: list[str]) -> list[dict[str, Any]]:
        return [{"embedding": [round(float(x), 6) for x in row]} for row in model.embed(pixels)]

    return _run(options, say, lambda model: {})


def search_pictures(options: argparse.Namespace) -> int:
    """Finds the pictures that fit a text best among those of `blip embed`: {"text", "found": [{"picture", "cosine"}]}."""
    import numpy as np

    from blip.api import load

    beside = _settings_of(options.vectors)
    if not (options.vectors.is_file() and beside.is_file()):
        raise ValueError(
            f"{options.vectors}: make it first, with `blip embed MODEL PICTURES... --out {options.vectors}`"
        )
    if options.top < 1:
        raise ValueError(f"--top {options.top}: at least 1")
    model = load(options.model, options.tokenizer)
    settings = json.loads(beside.read_text(encoding="utf-8"))
    if settings.get("command") != "embed":
        raise ValueError(f"{options.vectors}: written by `blip {settings.get('command')}`, not by `blip embed`")
    if settings.get("model") != model.fingerprint:
        raise ValueError(f"{options.vectors} was made by another model than {options.model}: embed the pictures anew")
    with open(options.vectors, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if not rows:
        raise ValueError(f"{options.vectors}: no picture there")
    cosines = np.array([row["embedding"] for row in rows], np.float32) @ model.embed_text(options.text).T  # [B, R]
    for text, cosine in zip(options.text, cosines.T, strict=True):
        best = np.argsort(-cosine, kind="stable")[: options.top]
        found = [{"picture": rows[i]["picture"], "cosine": round(float(cosine[i]), 6)} for i in best]
        sys.stdout.write(_line({"text": text, "found": found}))
    return 0


# the run over many pictures -------------------------------------------------------------------------------------------


def _run(
    options: argparse.Namespace,
    say: Say,
    settings: Callable[[Model], dict[str, Any]],
    only: Container[str] | None = None,
) -> int:
    """Status 0, or 1 where no picture could be read. only: the names of those of the pictures that are looked at."""
    from blip.api import load
    from blip.datamodules.files import Place, find

    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size}: at least 1")
    places = [place for place in find(options.pictures) if only is None or place.name in only]
    model = load(options.model, options.tokenizer, options.device, options.precision)
    began_with = {
        "command": options.run.__name__.split("_")[0],
        "model": model.fingerprint,
        "precision": options.precision,
        **settings(model),
    }
    broken: dict[str, str] = {}
    with _lines(options.out, began_with) as (file, done):
        left = [place for place in places if place.name not in done]
        told = _Progress(len(left), len(places) - len(left))
        for start in range(0, len(left), options.batch_size):
            read: list[tuple[Place, np.ndarray]] = []
            for place in left[start : start + options.batch_size]:
                try:
                    read.append((place, model.pixels(place)))
                except ValueError as error:
                    broken[place.name] = str(error).removeprefix(f"{place.name}: ")
            if read:
                names = [place.name for place, _ in read]
                for name, row in zip(names, say(model, [pixels for _, pixels in read], names), strict=True):
                    file.write(_line({"picture": name, **row}))
                file.flush()
            told.show(min(start + options.batch_size, len(left)))
    for name, why in list(broken.items())[:NAMED]:
        print(f"left out: {name}: {why}", file=sys.stderr)
    if len(broken) > NAMED:
        print(f"left out: {len(broken) - NAMED} more", file=sys.stderr)
    if options.out is not None:
        skipped = f", {len(places) - len(left)} were there" if len(left) < len(places) else ""
        print(f"{options.out}: {len(left) - len(broken)} pictures{skipped}, {len(broken)} left out", file=sys.stderr)
    return 1 if broken and len(broken) == len(places) else 0


@contextmanager
def _lines(out: Path | None, settings: dict[str, Any]) -> Iterator[tuple[IO[str], set[str]]]:
    """The file to write to and the pictures that it has; half a line at its end is taken away."""
    if out is None:
        yield sys.stdout, set()
        return
    beside = _settings_of(out)
    said = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a+b") as raw:
        try:
            fcntl.flock(raw, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{out}: another process writes it; wait for it, or choose another --out") from None
        before = beside.read_text(encoding="utf-8") if beside.is_file() else "{}"
        if out.stat().st_size and before != said:
            was = json.loads(before)
            changed = [key for key in {**was, **settings} if was.get(key) != settings.get(key)]
            raise ValueError(
                f"{out} was begun with other settings ({', '.join(changed)}): choose another --out, or delete it to begin anew"
            )
        beside.write_text(said, encoding="utf-8")
        done: set[str] = set()
        whole = 0
        raw.seek(0)
        for line in raw:
            if not line.endswith(b"\n"):
                break
            done.add(json.loads(line)["picture"])
            whole += len(line)
        raw.truncate(whole)
        with open(out, "a", encoding="utf-8") as file:
            yield file, done
            file.flush()
            os.fsync(file.fileno())


def _line(row: dict[str, Any]) -> str:
    """A JSON line. A name that is not UTF-8 comes as halves of surrogate pairs, which stand there as JSON's escapes."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def _settings_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.settings.json")


class _Progress:
    """Pictures done, rate and time left: on one line of a terminal, else nothing."""

    def __init__(self, total: int, before: int) -> None:
        self.total, self.before, self.began, self.shown = total, before, time.monotonic(), 0.0

    def show(self, done: int) -> None:
        now = time.monotonic()
        if not sys.stderr.isatty() or (now - self.shown < SECONDS and done < self.total):
            return
        self.shown = now
        rate = done / max(now - self.began, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime((self.total - done) / max(rate, 1e-9)))
        end = "\n" if done == self.total else ""
        print(
            f"\r{self.before + done}/{self.before + self.total} | {rate:.1f}/s | {left} left\033[K",
            end=end,
            file=sys.stderr,
            flush=True,
        )

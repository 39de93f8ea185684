"""Published files of annotations, read record by record: memory for one record, not for the file, and errors that name the place.

The files are some of the largest JSON there is (VisDial's training set has 120 million numbers), and they come from strangers:
every field is checked for its type where it is read, and whatever is not as published is a ValueError that names the file, the
record and the field.
"""

from __future__ import annotations

import csv
import json
import reprlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

CHUNK = 1 << 20  # characters read at once
MAX_RECORD = 50_000_000  # characters of one record
NAMED = 20  # names that an error shows
SPACE = " \t\r\n"


class Item(NamedTuple):
    """One element of a list in a JSON file (or a value beside the lists): the list's name, where it stands, the value."""

    name: str
    where: str
    value: Any


class Record:
    """An object of a file; its fields are had by their type."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is not a record but {_short(value)}")
        self.value, self.where = value, where

    def text(self, name: str) -> str:
        return self._get(name, "a text", str)

    def number(self, name: str) -> int:
        return self._get(name, "a whole number", int)

    def id(self, name: str) -> int | str:
        """A whole number or a text that is not empty."""
        found = self._get(name, "a whole number or a text", int, str)
        return found if found != "" else self._wrong(name, "a whole number or a text", found)

    def elements(self, name: str) -> list[Any]:
        return self._get(name, "a list", list)

    def texts(self, name: str) -> list[str]:
        """A list of texts, or the one text that stands in its place."""
        found = self._get(name, "a text or a list of texts", list, str)
        found = [found] if isinstance(found, str) else found
        return found if all(isinstance(text, str) for text in found) else self._wrong(name, "a list of texts", found)

    def records(self, name: str) -> list[Record]:
        return [Record(value, f"{self.where}: {name}[{number}]") for number, value in enumerate(self.elements(name))]

    def __contains__(self, name: str) -> bool:
        return self.value.get(name) is not None

    def _get(self, name: str, kind: str, *types: type) -> Any:
        found = self.value.get(name)
        if type(found) not in types:
            self._wrong(name, kind, found)
        return found

    def _wrong(self, name: str, kind: str, found: Any) -> NoReturn:
        if name in self.value:
            raise ValueError(f"{self.where}: {name} is to be {kind}, not {_short(found)}")
        raise ValueError(f"{self.where} has no {name} ({kind}); it has {_names(self.value) or 'nothing'}")


def items(path: Path, *names: str) -> Iterator[Item]:
    """The elements of the lists of a JSON file that are named, in the order of the file, and the values of other names.

    The name of a list in an object is `data.dialogs`, of a list that is the whole file `""`. ValueError where none of the names
    is there, and for what is not JSON.
    """
    opened = {name.rsplit(".", 1)[0] for name in names if "." in name}
    seen = False
    top: list[str] = []
    with _open(path) as file:
        stream = _Stream(file, path)
        try:
            for item in _walk(stream, "", set(names), opened, top):
                seen = True
                yield item
            stream.end()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    if not seen and not set(names) & set(top):
        found = f"an object of {_names(top)}" if top and top != [""] else "a list" if top else "an empty object"
        wanted = " and ".join(name or "a list of records" for name in names)
        raise ValueError(f"{path}: {wanted} expected, but it is {found}: a file of another layout?")


def _walk(stream: _Stream, prefix: str, names: set[str], opened: set[str], top: list[str]) -> Iterator[Item]:
    """The items of an object or list that begins here; `top` takes the names of all that was met."""
    mark = stream.peek()
    if mark == "[":
        top.append("")
        yield from _elements(stream, "", "" in names)
        return
    stream.take("{")
    while stream.peek() != "}":
        name = stream.value(f"in the fields of {prefix or 'the file'}")
        if not isinstance(name, str):
            stream.fail("a name is expected")
        stream.take(":")
        name = prefix + name
        if len(top) < NAMED or name in names:
            top.append(name)
        mark = stream.peek()
        if mark == "[":
            yield from _elements(stream, name, name in names)
        elif mark == "{" and name in opened:
            yield from _walk(stream, f"{name}.", names, opened, top)
        else:
            value = stream.value(f"in {name}")
            if name in names:
                yield Item(name, f"{stream.path}: {name}", value)
        if stream.peek() != "}":
            stream.take(",")
    stream.take("}")


def _elements(stream: _Stream, name: str, wanted: bool) -> Iterator[Item]:
    stream.take("[")
    number = 0
    while stream.peek() != "]":
        where = f"{name}[{number}]" if name else f"record {number}"
        value = stream.value(f"in {where}")
        if wanted:
            yield Item(name, f"{stream.path}: {where}", value)
        number += 1
        if stream.peek() != "]":
            stream.take(",")
    stream.take("]")


def lines(path: Path) -> Iterator[Item]:
    """The values of a file of JSON lines."""
    with _open(path) as file:
        number = 0
        try:
            while line := file.readline(MAX_RECORD + 1):
                number += 1
                if len(line) > MAX_RECORD:
                    raise ValueError(f"{path}: line {number} is longer than {MAX_RECORD} characters")
                if line.strip():
                    try:
                        yield Item("", f"{path}: line {number}", DECODER.decode(line))
                    except (ValueError, RecursionError) as error:
                        raise ValueError(f"{path}: line {number} is not JSON: {error}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: line {number + 1} is not UTF-8 ({error.reason})") from error


def rows(path: Path) -> Iterator[Record]:
    """The rows of a CSV with a header."""
    with _open(path) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{path}: line {reader.line_num} has not as many fields as the header")
                yield Record(row, f"{path}: line {reader.line_num}")
        except csv.Error as error:
            raise ValueError(f"{path}: line {reader.line_num} is not CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error.reason})") from error


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, line) of a text file, without empty lines and those that begin with #."""
    with _open(path) as file:
        number = 0
        try:
            while line := file.readline(MAX_RECORD):
                number += 1
                if line.strip() and not line.startswith("#"):
                    yield f"{path}: line {number}", line.strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: line {number + 1} is not UTF-8 ({error.reason})") from error


def _open(path: Path) -> TextIO:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of annotations")
    return path.open(encoding="utf-8-sig", newline="")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


class _Stream:
    """A JSON file as a row of marks and whole values, of which only a window is in memory."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file, self.path, self.text, self.at, self.ended = file, path, "", 0, False

    def peek(self) -> str:
        """The next character that is no space; none at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in SPACE:
                    return self.text[self.at]
                self.at += 1
            if self.ended:
                return ""
            self._more()

    def take(self, mark: str) -> None:
        if self.peek() != mark:
            self.fail(f"{mark!r} is expected")
        self.at += 1

    def value(self, where: str) -> Any:
        """The value that begins here, whole."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # a number may go on after the window
                    self.at = end
                    return value
            except RecursionError:
                self.fail(f"nested too deep {where}")
            except ValueError as error:
                if self.ended:
                    self.fail(f"{where}: {error.msg if isinstance(error, json.JSONDecodeError) else error}")
            if len(self.text) - self.at > MAX_RECORD:
                self.fail(f"{where}: no end of the value within {MAX_RECORD} characters")
            self._more()

    def end(self) -> None:
        if self.peek():
            self.fail("something follows the end; are these JSON lines?")

    def fail(self, what: str) -> NoReturn:
        rest = self.text[self.at : self.at + 30]
        raise ValueError(f"{self.path}: not JSON as published: {what}; found {rest!r}") from None

    def _more(self) -> None:
        rest = self.text[self.at :]
        chunk = self.file.read(max(CHUNK, len(rest)))  # twice as much each time: a long value is not tried too often
        self.text, self.at, self.ended = rest + chunk, 0, not chunk


def _names(found: Iterable[str]) -> str:
    return ", ".join(_short(name) for name in islice(found, NAMED))


def _short(value: Any) -> str:
    shown = reprlib.repr(value)  # of a deep or long value only its beginning
    return shown if len(shown) <= 60 else f"{shown[:57]}..."

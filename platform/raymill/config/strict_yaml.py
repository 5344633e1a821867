"""Strict YAML: text -> plain values, the line of each, and everything about the text that is not strict.

What a plain word means follows the core schema of YAML 1.2, so `1e-4` and `1e3` are floats, only true and false are
booleans, and `yes`, `on`, `12:30`, `1_000` and `2024-01-01` are strings. Refused, with the field and the reason:
duplicate keys, keys that are not text, tags, anchors and aliases, directives, a second document, byte order marks,
numbers that JSON cannot hold, whole numbers with a leading zero (`010` is 8 in YAML 1.1 and 10 in 1.2), and texts with what no
file name or message can hold (`"\\0"`, halves of surrogate pairs).

Values are built from the stream of parser events, so nothing is ever constructed by tag, and a file that nests or
repeats without end stops at the first event that goes too far.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from raymill.errors import Problem

MAX_BYTES = 64 * 1024
MAX_DEPTH = 32
MAX_INTEGER_BITS = 64

_NO_CHARACTER = re.compile(r"[\0\ud800-\udfff]")
_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")


@dataclass(frozen=True)
class Document:
    """What a text says.

    Attributes:
        value: plain values: None, bool, int, float, str, list, dict; None when the text could not be parsed.
        lines: dotted field path -> line, counted from 1; "" is the document, or where parsing stopped.
        problems: what is not strict; `where` holds the field path.
        unreadable: fields whose value is only a stand-in, because a problem says what is wrong with it.
    """

    value: Any
    lines: dict[str, int]
    problems: tuple[Problem, ...]
    unreadable: frozenset[str]


def parse(content: bytes) -> Document:
    """Read one YAML document. Never raises for what the content is; `problems` says it."""
    if len(content) > MAX_BYTES:
        return _stopped(1, f"more than {MAX_BYTES} bytes", "a smaller file", "Keep data out of the job file.")
    if content.startswith(b"\xef\xbb\xbf"):
        return _stopped(1, "a byte order mark", "plain UTF-8", "Save the file as UTF-8 without a byte order mark.")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return _stopped(line, f"the byte 0x{content[error.start]:02x}", "UTF-8 text", "Save the file as UTF-8.")
    builder = _Builder()
    try:
        value = builder.document(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        found = f"{error.problem or error.context} (column {column})"
        fix = "Indent with spaces, not with tabs." if "\\t" in found else "Correct the YAML there."
        return _stopped(line, found, "strict YAML", fix, builder)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return _stopped(line, f"the character {text[error.position]!r}", "printable text", "Remove it.", builder)
    return Document(value, builder.lines, tuple(builder.problems), frozenset(builder.unreadable))


def _stopped(line: int, found: str, expected: str, fix: str, before: _Builder | None = None) -> Document:
    lines, problems = (before.lines, before.problems) if before else ({}, [])
    stop = Problem("", found, expected, fix)
    return Document(None, {**lines, "": line}, (*problems, stop), frozenset({""}))


class _Builder:
    """Values from parser events. Notes a problem and goes on where it can, raises a YAML error where it cannot."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.problems: list[Problem] = []
        self.unreadable: set[str] = set()

    def document(self, events: Iterator[Any]) -> Any:
        value: Any = None
        num_documents = 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                num_documents += 1
                if num_documents > 1:
                    raise _refusal("a second document", event)
                if event.version or event.tags:
                    raise _refusal("a directive (%YAML or %TAG)", event)
                value = self.value(next(events), events, "", 1)
        return value

    def value(self, event: Any, events: Iterator[Any], field: str, depth: int) -> Any:
        """Build the value that begins with `event`, taking the events that belong to it."""
        if depth > MAX_DEPTH:
            raise _refusal(f"more than {MAX_DEPTH} levels", event)
        self.lines.setdefault(field, event.start_mark.line + 1)
        if isinstance(event, yaml.AliasEvent):
            self.refuse(field, f"the alias *{event.anchor}", "a value", "Write the value out.")
            return None
        if event.anchor is not None:
            self.note(field, f"the anchor &{event.anchor}", "a value", "Remove the anchor.")
        if event.tag is not None:
            self.refuse(field, f"the tag {event.tag}", "a plain value", "Remove the tag; a job file holds only values.")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event, field)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(events, field, depth)
        return self.mapping(events, field, depth)

    def sequence(self, events: Iterator[Any], field: str, depth: int) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(self.value(event, events, _join(field, str(len(items))), depth + 1))
        return items

    def mapping(self, events: Iterator[Any], field: str, depth: int) -> dict[str, Any]:
        items: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            line = event.start_mark.line + 1
            if not isinstance(event, yaml.ScalarEvent) or event.tag is not None or event.anchor is not None:
                raise _refusal("a key that is not plain text", event)
            if _NO_CHARACTER.search(event.value):
                raise _refusal("a key with NUL or half a character", event)
            key, path = event.value, _join(field, event.value)
            if key in items:
                found = f"the key {key!r} twice, on lines {first_lines[key]} and {line}"
                self.note(path, found, "each key once", "Remove one of the two.")
            elif event.style is None and not isinstance(_plain(key), str):
                self.note(path, f"the key {key}", "text as a key", f"Write it in quotes: '{key}'.")
            self.lines.setdefault(path, line)
            first_lines.setdefault(key, line)
            value = self.value(next(events), events, path, depth + 1)
            items.setdefault(key, value)
        return items

    def scalar(self, event: Any, field: str) -> Any:
        if _NO_CHARACTER.search(event.value):
            self.refuse(field, _short(repr(event.value)), "text without NUL or half a character", "Remove it.")
            return ""
        if event.style is not None or event.tag is not None:
            return event.value
        value = _plain(event.value)
        if isinstance(value, Problem):
            self.refuse(field, value.found, value.expected, value.fix)
            return event.value
        return value

    def note(self, field: str, found: str, expected: str, fix: str) -> None:
        """Record a problem that leaves the value as meant."""
        self.problems.append(Problem(field, found, expected, fix))

    def refuse(self, field: str, found: str, expected: str, fix: str) -> None:
        """Record a problem that leaves no value to judge."""
        self.note(field, found, expected, fix)
        self.unreadable.add(field)


def _join(field: str, key: str) -> str:
    return f"{field}.{key}" if field else key


def _refusal(found: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=found, problem_mark=event.start_mark)


def _plain(text: str) -> Any:
    """The value of an unquoted word, or a Problem for a number that is refused."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _LEADING_ZERO.fullmatch(text):
        fix = "Remove the leading zeros, begin an octal number with 0o, or put a text in quotes."
        return Problem("", f"{_short(text)}, with a leading zero", "a number that can be read in one way only", fix)
    if _INTEGER.fullmatch(text):
        # The length is looked at first: Python refuses to convert thousands of digits.
        number = int(text, 0) if len(text) <= MAX_INTEGER_BITS + 2 else None
        if number is None or number.bit_length() >= MAX_INTEGER_BITS:
            return Problem("", _short(text), f"a whole number below 2**{MAX_INTEGER_BITS - 1}", "Use a smaller number.")
        return number
    if _NOT_FINITE.fullmatch(text) or (_FLOAT.fullmatch(text) and not math.isfinite(float(text))):
        return Problem("", _short(text), "a finite number", "Use a large finite number, or null to leave it out.")
    return float(text) if _FLOAT.fullmatch(text) else text


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."

"""Reads a YAML file that anybody may have written, and remembers on which line each key stands.

Scalars follow YAML 1.2: in YAML 1.1, which PyYAML constructs, nobelium (`No`) is false, `1e-3` is text and a
time limit of `1:00:00` is the number 3600. The tree is built here from PyYAML's parser events, so no tag can
construct an object, no alias can multiply, and every refusal knows its line.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hpcft.errors import UserError

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_DIGITS = 40

KeyPath = tuple[str | int, ...]

_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_OCTAL_OR_HEX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Document:
    """A YAML file's content as plain dicts, lists and scalars, and where each key and list item stands."""

    data: dict[str, Any]
    lines: Mapping[KeyPath, int]

    def line_of(self, key_path: KeyPath) -> int | None:
        """The line (from 1) of this key or list item, None if it is not in the file; `()` is the document."""
        return self.lines.get(key_path)


def load_yaml(path: Path) -> Document:
    """The mapping in the file; a UserError with file and line for all that is not plain, bounded YAML."""
    text = _read_text(path)
    try:
        reader = _Reader(path, text)
        return Document(reader.root(), reader.lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {_syntax_problem(error)}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"the control character {error.character:#04x} is not allowed in YAML; delete it"
        raise UserError(f"{path}:{line}: not valid YAML: {problem}") from error


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Text that `load_yaml` reads back as equal data: keys in their order, no anchors, quoted as needed."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read_text(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"{path}: is a directory; name the YAML file in it")
        if not stat.S_ISREG(mode):
            raise UserError(f"{path}: is not a regular file (a pipe or a device?); name a YAML file")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check its name (you are in {Path.cwd()})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if len(raw) > MAX_BYTES:
        raise UserError(f"{path}: is larger than {MAX_BYTES} bytes, so no configuration; name the right file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8 text; save it as UTF-8") from error


def _syntax_problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "it cannot be parsed"
    if "'\\t'" in problem:
        return f"{problem}; YAML is indented with spaces only, so replace the tab"
    if error.context and error.context_mark:
        problem += f" ({error.context} that starts on line {error.context_mark.line + 1})"
    return f"{problem}; check indentation, quotes and brackets here"


class _Reader:
    """Builds plain data from the parser's events, one after the other."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.lines: dict[KeyPath, int] = {}
        self.events = yaml.parse(text, Loader=yaml.SafeLoader)

    def root(self) -> dict[str, Any]:
        next(self.events)  # start of the stream
        start = next(self.events)
        if isinstance(start, yaml.StreamEndEvent):
            raise self._refusal(start, "the file holds nothing; write keys and values (`name: quickstart`)")
        first = next(self.events)
        self._check_plain(first)
        if not isinstance(first, yaml.MappingStartEvent):
            raise self._refusal(first, "the top level must be keys and values; write `name: quickstart` etc.")
        self.lines[()] = _line(first)
        data = self._mapping(())
        next(self.events)  # end of the document
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise self._refusal(after, "a second document starts here; keep one in a file")
        return data

    def _value(self, event: yaml.Event, key_path: KeyPath) -> Any:
        self._check_plain(event)
        if len(key_path) > MAX_DEPTH:
            raise self._refusal(event, f"nested more than {MAX_DEPTH} levels deep; no setting is")
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(key_path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(key_path)
        assert isinstance(event, yaml.ScalarEvent)
        return self._scalar(event)

    def _mapping(self, key_path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self._key(event)
            if key in data:
                first_line = self.lines[*key_path, key]
                problem = f"the key {key!r} is already on line {first_line}; delete one of the two"
                raise self._refusal(event, problem)
            self.lines[*key_path, key] = _line(event)
            data[key] = self._value(next(self.events), (*key_path, key))
        return data

    def _sequence(self, key_path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            item_path = (*key_path, len(items))
            self.lines[item_path] = _line(event)
            items.append(self._value(event, item_path))
        return items

    def _key(self, event: yaml.Event) -> str:
        self._check_plain(event)
        key = self._scalar(event) if isinstance(event, yaml.ScalarEvent) else None
        if not isinstance(key, str):
            raise self._refusal(event, "a key must be text; put quotes around it")
        return key

    def _scalar(self, event: yaml.ScalarEvent) -> str | int | float | bool | None:
        text: str = event.value
        is_quoted = not event.implicit[0]
        if is_quoted:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _DECIMAL.fullmatch(text) or _OCTAL_OR_HEX.fullmatch(text):
            if len(text) > MAX_DIGITS:
                raise self._refusal(event, f"a number of {len(text)} digits; if it is text, quote it")
            return int(text) if _DECIMAL.fullmatch(text) else int(text, 0)
        if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
            return float(text)
        if _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text):
            raise self._refusal(event, "not a finite number; write a finite one, or leave the key out")
        return text

    def _check_plain(self, event: yaml.Event) -> None:
        """Refuses what could run code or blow up: tags, and anchors with their aliases."""
        tag, anchor = getattr(event, "tag", None), getattr(event, "anchor", None)
        if tag is not None:
            raise self._refusal(event, f"the tag {tag!r} is not allowed; write the plain value")
        if anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            problem = f"anchors and aliases ({sign}{anchor}) are not allowed"
            raise self._refusal(event, f"{problem}; write the value out wherever it is needed")

    def _refusal(self, event: yaml.Event, problem: str) -> UserError:
        return UserError(f"{self.path}:{_line(event)}: {problem}")


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None  # set for everything that was parsed from text
    return event.start_mark.line + 1


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or our YAML 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Only double quotes keep every character: PyYAML folds U+0085 and its like as line breaks otherwise.
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)
for _pattern, _kind in ((_DECIMAL, "int"), (_OCTAL_OR_HEX, "int"), (_FLOAT, "float")):
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _whole, list("-+.0123456789"))

"""What the sections of a configuration have in common, and validation whose messages name file, line and key.

It is strict: only whole numbers are converted, to floats, so `rounds: true` and `steps: "100"` are errors.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import isclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    Strict,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from hpcft.config.yaml_file import Document, KeyPath
from hpcft.errors import UserError


class Section(BaseModel):
    """A frozen part of a configuration, without unknown keys; the docstring below a field describes it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    def _problems(self) -> Iterator[tuple[KeyPath, str]]:
        """What is wrong across several keys, each with the key (from this section) to report it at."""
        yield from ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        details = [
            InitErrorDetails(
                type=PydanticCustomError("hpcft", "{text}", {"text": text}), loc=key_path, input=None
            )
            for key_path, text in self._problems()
        ]
        if details:
            raise ValidationError.from_exception_data(type(self).__name__, details)
        return self


@dataclass(frozen=True)
class Unit:
    """Marks a field with the unit that its error messages show: `Annotated[Positive, Unit("fs")]`."""

    name: str


def matching(pattern: str, rule: str) -> AfterValidator:
    """Lets through only text that matches the whole pattern; otherwise the message says the rule in words."""
    allowed = re.compile(pattern)

    def check(text: str) -> str:
        if not allowed.fullmatch(text):
            raise ValueError(f"{shown(text)} is not allowed: {rule}")
        return text

    return AfterValidator(check)


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{shown(text)} is not allowed: it must be one line without control characters")
    return text


def _input_file(path: Path, info: ValidationInfo) -> Path:
    """The absolute path; where the folder of the YAML file is known, the file must exist.

    The last component is not resolved: a link into a store of models would lose the suffix, and the format.
    """
    if not str(path).isprintable():
        raise ValueError(f"{shown(str(path))} is not a file name: it has control characters")
    if info.context is None:
        return path
    try:
        found: Path = info.context["folder"] / path.expanduser()
        found = found.parent.resolve() / found.name
        if found.is_dir():
            raise ValueError(f"{found} is a folder; name a file")
        if not found.is_file():
            raise ValueError(f"there is no file {found}; correct the path (from the YAML file's folder)")
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be looked up ({error}); correct it or its permissions") from error
    return found


def _folder(path: Path, info: ValidationInfo) -> Path:
    """The absolute path of what is or may become a folder."""
    if not str(path).isprintable():
        raise ValueError(f"{shown(str(path))} is not a folder name: it has control characters")
    if info.context is None:
        return path
    try:
        found: Path = (info.context["folder"] / path.expanduser()).resolve()
        if found.exists() and not found.is_dir():
            raise ValueError(f"{found} is a file; name a folder")
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be looked up ({error}); correct it or its permissions") from error
    return found


_MOST = 1e100  # a number that a float can hold


def _scheduled(value: Any, least: float, what: str) -> float | tuple[tuple[float, float], ...]:
    """A number, or [[epoch, value], ...] with epochs that increase."""
    if _is_number(value):
        if value < least:
            raise ValueError(f"must be at least {shown(least)}, but is {shown(value)}")
        if what == "a whole number":
            if value != int(value):
                raise ValueError(f"must be a whole number, but is {shown(value)}")
            return int(value)
        return float(value)
    points = value if isinstance(value, list | tuple) else ()
    if not points or not all(
        isinstance(point, list | tuple) and len(point) == 2 and all(map(_is_number, point))
        for point in points
    ):
        raise ValueError(
            f"must be {what}, or a schedule such as [[0, 0.0], [5, 1.0]] with an epoch and a value at each point, but is "
            f"{shown(value)}"
        )
    epochs = [float(epoch) for epoch, _ in points]
    if epochs[0] < 0 or any(later <= earlier for earlier, later in pairwise(epochs)):
        raise ValueError(f"the epochs of a schedule must increase from 0 on; they are {epochs}")
    if min(at for _, at in points) < least:
        raise ValueError(f"the values of a schedule must be at least {shown(least)}")
    return tuple((float(epoch), float(at)) for epoch, at in points)


def always_zero(scheduled: float | tuple[tuple[float, float], ...]) -> bool:
    """Whether a number or a schedule is 0 at all times."""
    return all(value == 0 for _, value in scheduled) if isinstance(scheduled, tuple) else scheduled == 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST


Count = Annotated[int, Field(ge=1)]


def _scheduled_from(least: float, what: str) -> Any:
    """A validator, and the way back to plain data (pydantic cannot tell by itself which half of the union it has)."""
    return PlainValidator(lambda value: _scheduled(value, least, what))


_AS_WRITTEN = PlainSerializer(
    lambda value: value if isinstance(value, int | float) else [list(point) for point in value]
)
Scheduled = Annotated[float | tuple[tuple[float, float], ...], _scheduled_from(0.0, "a number"), _AS_WRITTEN]
"""A number of at least 0, or [[epoch, value], ...]: linear between the points, constant before and after them."""
ScheduledCount = Annotated[
    float | tuple[tuple[float, float], ...], _scheduled_from(1.0, "a whole number"), _AS_WRITTEN
]
"""A whole number of at least 1, or [[epoch, number], ...], rounded."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
OneLine = Annotated[str, AfterValidator(_one_line)]
InputFile = Annotated[Path, Strict(False), AfterValidator(_input_file)]
"""A file that is read: absolute after loading, relative to the folder of the YAML file when written."""
Folder = Annotated[Path, Strict(False), AfterValidator(_folder)]
"""A folder that need not exist yet: absolute after loading, relative to the folder of the YAML file when written."""
Name = Annotated[
    str,
    matching(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}",
        "use at most 64 of A-Z a-z 0-9 . _ - and begin with a letter or digit",
    ),
]


_Model = TypeVar("_Model", bound=BaseModel)


def validate(model_cls: type[_Model], document: Document, path: Path) -> _Model:
    """The model that the document describes, or a UserError with every problem as `file:line: key: problem`.

    `path` is the file that the document was read from; input files are relative to its folder.
    """
    try:
        return model_cls.model_validate(document.data, context={"folder": path.parent.absolute()})
    except ValidationError as failure:
        errors = failure.errors(include_url=False)
    found = [_Problem.of(model_cls, error) for error in errors]
    # A misspelt key is one mistake, not an unknown key and a missing one.
    meant = {problem.meant for problem in found if problem.meant}
    told = [problem for problem in found if not (problem.is_missing and problem.key_path in meant)]
    told.sort(key=lambda problem: _nearest_line(document, problem.key_path))
    raise UserError("\n".join(problem.located(document, path) for problem in told))


def names_input_file(field: FieldInfo) -> bool:
    """Whether a key is of the kind InputFile, or may be."""
    return any(isinstance(mark, AfterValidator) and mark.func is _input_file for mark in _marks(field))


def shown(value: object) -> str:
    """A value as the user wrote it, or nearly: shortened, with control characters escaped."""
    if value is None:
        return "empty (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"{value:.12g}" if isinstance(value, float) else str(value)
    if isinstance(value, dict):
        return "a mapping of keys to values"
    if isinstance(value, list | tuple):
        return "a list"
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = 80


@dataclass(frozen=True)
class _Problem:
    """One of pydantic's errors in our words; `meant` is what an unknown key was probably meant to be."""

    key_path: KeyPath
    text: str
    is_missing: bool = False
    meant: KeyPath | None = None

    def located(self, document: Document, path: Path) -> str:
        return f"{path}:{_nearest_line(document, self.key_path)}: {_dotted(self.key_path)}: {self.text}"

    @classmethod
    def of(cls, model_cls: type[BaseModel], error: ErrorDetails) -> _Problem:
        key_path = tuple(key for key in error["loc"] if key != "[key]")
        if error["type"] == "extra_forbidden":
            return cls._unknown_key(model_cls, key_path)
        _, field = _place(model_cls, key_path)
        if error["type"] == "missing":
            description = f": {_first_sentence(field.description)}" if field and field.description else ""
            return cls(key_path, f"this key is missing; add it{description}", is_missing=True)
        return cls(key_path, _in_words(error, field))

    @classmethod
    def _unknown_key(cls, model_cls: type[BaseModel], key_path: KeyPath) -> _Problem:
        section, _ = _place(model_cls, key_path[:-1])
        known = list(section.model_fields) if section else []
        guess = _nearest(str(key_path[-1]), known)
        if guess:
            return cls(key_path, f"unknown key; did you mean {guess!r}?", meant=(*key_path[:-1], guess))
        return cls(key_path, f"unknown key; the keys known here are {', '.join(known)}")


_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a file name",
    "tuple_type": "a list, such as [a, b]",
    "dict_type": "a mapping of keys to values",
    "model_type": "a section of keys and values",
}


def _in_words(error: ErrorDetails, field: FieldInfo | None) -> str:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind in _BOUNDS:
        bound, relation = _BOUNDS[kind]
        return f"must be {relation} {shown(context[bound])}{_unit(field)}, but is {shown(value)}"
    if kind in _TYPES:
        return f"must be {_TYPES[kind]}, but is {shown(value)}{_type_hint(kind, value, field)}"
    if kind == "literal_error":
        guess = _nearest(str(value), re.findall(r"'([^']*)'", context["expected"]))
        hint = f"; did you mean {guess!r}?" if guess else ""
        return f"must be {context['expected']}, but is {shown(value)}{hint}"
    if kind == "value_error":
        return str(context["error"])
    return error["msg"]


def _type_hint(kind: str, value: object, field: FieldInfo | None) -> str:
    if value is None:
        has_default = field is not None and not field.is_required()
        return "; write a value" + (", or leave the key out to have its default" if has_default else "")
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "; put quotes around it"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        return "; write the bare number" if re.search(r"\d", value) else "; write it in digits, such as 4"
    return ""


def _place(model_cls: type[BaseModel], key_path: KeyPath) -> tuple[type[BaseModel] | None, FieldInfo | None]:
    """The section that a key path leads into and the last field before; keys of dictionaries are skipped."""
    section: type[BaseModel] | None = model_cls
    field = None
    for key in key_path:
        if section and key in section.model_fields:
            field = section.model_fields[str(key)]
            section = next(_sections_in(field.annotation), None)
    return section, field


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)


def _unit(field: FieldInfo | None) -> str:
    """The unit with a space before it, or nothing."""
    if field is None:
        return ""
    return next((f" {part.name}" for part in _marks(field) if isinstance(part, Unit)), "")


def _marks(field: FieldInfo) -> list[Any]:
    """What its annotation says beside the type, also where None is allowed as well."""
    return [*field.metadata, *(part for member in get_args(field.annotation) for part in get_args(member))]


def _nearest_line(document: Document, key_path: KeyPath) -> int:
    """The line of the key, or of the nearest section around it that stands in the file."""
    for length in range(len(key_path), -1, -1):
        line = document.line_of(key_path[:length])
        if line is not None:
            return line
    return 1


def _nearest(word: str, candidates: list[str]) -> str | None:
    by_lower_case = {candidate.lower(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(word[:80].lower(), by_lower_case, n=1)
    return by_lower_case[matches[0]] if matches else None


def _dotted(key_path: KeyPath) -> str:
    """`train.replay.file`, `elements[0]`; a key with odd characters is quoted, or it could fake a message."""
    text = ""
    for key in key_path:
        if isinstance(key, int):
            text += f"[{key}]"
            continue
        is_plain = re.fullmatch(r"[\w-]{1,80}", key)
        text += f".{key if is_plain else shown(key)}"
    return text.removeprefix(".") or "the file"


def _first_sentence(description: str) -> str:
    sentence = re.split(r"\.\s", " ".join(description.split()), maxsplit=1)[0]
    return sentence.removesuffix(".")

"""Writes docs/keys.md, every key that a campaign, a site or a recipe may have: python docs/make_keys.py

The text comes from the docstrings of the configuration's fields, so it says what the code says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from hpcft.config.campaign import Campaign
from hpcft.config.label_run import ReferenceFile
from hpcft.config.pretrain import Recipe
from hpcft.config.site import Site
from hpcft.config.training import TrainingRun

TITLES: tuple[tuple[str, type[BaseModel]], ...] = (
    ("Campaign", Campaign),
    ("Site", Site),
    ("Recipe of a foundation model", Recipe),
    ("A training without a campaign (`hpcft train --config`)", TrainingRun),
    ("Labels without a campaign (`hpcft label --reference`)", ReferenceFile),
)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, looking through `X | None` and `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (section_of(argument) for argument in get_args(annotation))
    return next((section for section in found if section is not None), None)


def choices_of(annotation: Any) -> list[str]:
    """The words that a field may hold, looking through `X | None` and `tuple[X, ...]`."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [choice for argument in get_args(annotation) for choice in choices_of(argument)]


def rows(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        default = "required" if field.default is PydanticUndefined and field.default_factory is None else ""
        if not default and section is None and field.default_factory is None:
            default = "–" if field.default is None else f"`{field.default}`"
        text = (field.description or "").replace("\n", " ").replace("|", "\\|")
        choices = [] if section is not None else choices_of(field.annotation)
        # Many texts explain each of the words.
        if any(choice.lower() not in text.lower() for choice in choices):
            text += f" Allowed: {', '.join(f'`{choice}`' for choice in choices)}."
        found.append(f"| `{prefix}{name}` | {default} | {text} |")
        if section is not None and name != "resources":
            inner = f"{prefix}{name}.STAGE." if "dict" in str(field.annotation) else f"{prefix}{name}."
            found += rows(section, inner)
        elif name == "resources" and section is not None and prefix == "explore.":
            found += rows(section, f"{prefix}{name}.")
    return found


def text() -> str:
    parts = [
        "# Every key\n\nWritten by `python docs/make_keys.py`. Units are eV, Å, amu, fs and K unless a key names another."
    ]
    for title, model in TITLES:
        parts.append(f"## {title}\n\n| key | default | meaning |\n|---|---|---|\n" + "\n".join(rows(model)))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("keys.md").write_text(text())

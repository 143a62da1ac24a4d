"""Stages by name, imported when asked for: the command line must not load torch to print a status."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from hpcft.stages.context import Stage

_MODULES = {
    "explore": "hpcft.stages.explore",
    "select": "hpcft.stages.select",
    "label": "hpcft.stages.label",
    "train": "hpcft.stages.train",
    "probe": "hpcft.stages.probe",
    "reference": "hpcft.stages.reference",
    "evaluate": "hpcft.stages.evaluate",
}


def stage_named(name: str) -> Stage:
    return cast(Stage, import_module(_MODULES[name]))

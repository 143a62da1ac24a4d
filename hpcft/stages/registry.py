"""Stages by name, imported when asked for: the command line must not load torch to print a status."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from hpcft.stages.context import Stage
from hpcft.storage.campaign_folder import Kind

_MODULES_OF_LABELS = {"label": "hpcft.stages.label_file"}
_MODULES = {
    "explore": "hpcft.stages.explore",
    "select": "hpcft.stages.select",
    "label": "hpcft.stages.label",
    "train": "hpcft.stages.train",
    "probe": "hpcft.stages.probe",
    "reference": "hpcft.stages.reference",
    "evaluate": "hpcft.stages.evaluate",
}


def stage_named(name: str, kind: Kind = "campaign") -> Stage:
    return cast(Stage, import_module((_MODULES_OF_LABELS if kind == "label" else _MODULES)[name]))

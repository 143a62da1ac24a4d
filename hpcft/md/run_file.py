"""What a folder of molecular dynamics says of its run (run.json): whether it is the one that is asked for, in a user's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcft.config.fingerprint import differences

RUN_FILE = "run.json"
_PARTS = ("dynamics", "guards", "stretch")
_START = ("copies", "rattle", "strain", "seed")
# Where more than underscores tells a name from that of the option.
_OPTIONS = {
    "temperature_K": "temperature",
    "pressure_GPa": "pressure-GPa",
    "max_temperature_K": "max-temperature",
    "max_force_spread": "max-spread",
    "batch": "batch-atoms",
    "world_size": "ranks",
}
_DIGEST = "_sha256"


def differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """A line `option: old -> new` for all that differs between two contents of run.json; empty if they are one run."""
    if all(ours.get(name) == theirs.get(name) for name in {**ours, **theirs}):
        return []
    if not {*_PARTS, "start"} <= theirs.keys():
        return ["of another kind"]
    # Digits that words leave out may be all that differs.
    return differences(_in_words(theirs), _in_words(ours)) or [f"see {RUN_FILE}"]


def _in_words(run: Mapping[str, Any]) -> dict[str, Any]:
    """By the names of the command's options, with numbers and files as a user knows them."""
    words = {name: value for name, value in run.items() if name not in (*_PARTS, "start", "every")}
    for part in _PARTS:
        words |= run[part]
    words |= dict(zip(_START, run["start"], strict=True))
    words |= {f"{name}_every": steps for name, steps in run.get("every", {}).items()}
    words |= {f"max_{name}": limit for name, limit in words.pop("max_observed", {}).items()}
    return {_OPTIONS.get(name, _option(name)): _told(name, value) for name, value in words.items()}


def _option(name: str) -> str:
    return name.removesuffix(_DIGEST).replace("_", "-")


def _told(name: str, value: Any) -> Any:
    if name.endswith(_DIGEST):
        return "sha256:" + (value if isinstance(value, str) else ", ".join(value))
    if isinstance(value, dict):  # a ramp
        return f"{value['start']:g}:{value['end']:g}"
    return int(value) if isinstance(value, float) and value.is_integer() else value

"""When two sets of settings mean the same work: their content, with files by SHA-256, but for resources and patience."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpcft.config.reference import DATA_SET_VARIABLES
from hpcft.config.validate import Section, names_input_file
from hpcft.config.yaml_file import KeyPath
from hpcft.errors import UserError

# What says only how patiently and with what resources a campaign is computed: it may change while one goes on.
PATIENCE_KEYS = frozenset(
    {
        "max_attempts",
        "max_interruptions",
        "tolerated_failures",
        "time_limit_s",
        "memory_limit_GB",
        "time_min",
        "memory_GB",
        "cpus_per_rank",
        "command",
        "environment",
        "ladder",
        "workers",
        "ranks_per_calculation",
        "store",
        "quarantine",
    }
)


def files_of(section: Section) -> dict[KeyPath, Path]:
    """Every file that a key at any depth names, by the key path."""
    return dict(_files(section, ()))


def normalised(section: Section) -> dict[str, Any]:
    """The content as plain JSON data: all defaults written out, and each file replaced by its SHA-256.

    Two files of settings that mean the same, in whatever folder, have equal normalised content.
    """
    content = section.model_dump(mode="json")
    for (*sections, key), path in files_of(section).items():
        inner = content
        for name in sections:
            inner = inner[str(name)]
        inner[str(key)] = f"sha256:{_sha256(path)}"
    return content


def fingerprint(content: dict[str, Any]) -> str:
    """SHA-256 of what decides the results in normalised content: equal for the same work, wherever its files are.

    Time limits, memory, attempts and tolerance are left out: they may change while it goes on.
    """
    canonical = json.dumps(_decisive(content), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line `key.path: old -> new` for each key in which two normalised contents differ; empty if equal."""
    return [f"{key}: {text}" for key, text in _differences(old, new, "")]


def _decisive(content: dict[str, Any]) -> dict[str, Any]:
    """Normalised content without the keys that only say how patiently and with what resources it is computed.

    Of an environment what names data sets stays, as other potentials make other labels.
    """
    decisive = {
        key: _decisive(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if key not in PATIENCE_KEYS
    }
    environment = content.get("environment")
    if isinstance(environment, dict) and (names := DATA_SET_VARIABLES & environment.keys()):
        decisive["environment"] = {name: environment[name] for name in names}
    return decisive


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key in sorted(old.keys() | new.keys()):
        if key not in new:
            yield prefix + key, f"{_brief(old[key])} -> not there"
        elif key not in old:
            yield prefix + key, f"not there -> {_brief(new[key])}"
        elif isinstance(old[key], dict) and isinstance(new[key], dict):
            yield from _differences(old[key], new[key], f"{prefix}{key}.")
        elif _is_file(old[key]) and _is_file(new[key]) and old[key] != new[key]:
            yield prefix + key, f"the file's content has changed ({old[key][:15]}… -> {new[key][:15]}…)"
        elif old[key] != new[key]:
            yield prefix + key, f"{_brief(old[key])} -> {_brief(new[key])}"


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:99]}…"


def _is_file(value: object) -> bool:
    return isinstance(value, str) and value.startswith("sha256:")


def _files(section: Section, prefix: KeyPath) -> Iterator[tuple[KeyPath, Path]]:
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, Path) and names_input_file(field):
            yield (*prefix, key), value
        elif isinstance(value, Section):
            yield from _files(value, (*prefix, key))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); the campaign needs it, so put it back"
        ) from error

"""A new folder for a campaign or for labels alone: checked first, filled then, and sealed with campaign.json as the last file."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ase import Atoms

from hpcft import __version__
from hpcft.campaign.lease import holder, lease
from hpcft.config.fingerprint import differences
from hpcft.config.settings import Settings
from hpcft.errors import UserError
from hpcft.storage.atomic import write_bytes, write_json
from hpcft.storage.campaign_folder import FORMAT, CampaignFolder
from hpcft.storage.structures import write_structures

CAMPAIGN_COPY, REFERENCE_COPY = "campaign.yaml", "reference.yaml"
"""The user's file as it was, beside campaign.json."""


@dataclass(frozen=True)
class Contents:
    """What a new folder starts from."""

    files: Mapping[str, Path]
    """Files to copy, by their path in the folder."""
    structures: Mapping[str, Sequence[Atoms]]
    """For inputs/NAME.h5."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """More for campaign.json."""


def made_or_found(
    settings: Settings,
    source: Path,
    root: Path,
    read: Callable[[], Contents],
    *,
    take_over: bool = False,
) -> CampaignFolder:
    """The folder at `root`, made now from what `read` gives, or found from an earlier run with the very same settings.

    Raises UserError before anything is written: a folder of other settings, a folder that others can write, and whatever
    `read` refuses. Raises LeaseHeld while another process makes the same folder; for `take_over` see `lease`.
    """
    folder = CampaignFolder(root.absolute())
    refuse_hostile_name(folder.root)
    if folder.identity.exists():
        return _opened(folder, settings, source)
    if folder.root.exists() and not folder.root.is_dir():
        raise UserError(f"{root} is a file; name a folder with --dir")
    if folder.root.exists() and not _is_unfinished(folder):
        raise UserError(f"{root} exists and is not a campaign folder; name another with --dir, or empty it")
    contents = read()
    _make_root(folder.root)
    with lease(folder.leases, take_over=take_over):
        if folder.identity.exists():  # by another process, while we read the inputs
            return _opened(folder, settings, source)
        _fill(folder, settings, source, contents)
    return folder


def _opened(folder: CampaignFolder, settings: Settings, source: Path) -> CampaignFolder:
    refuse_other_settings(folder, settings, source)
    refuse_shared(folder.root)
    identity = folder.read_identity()
    wanted = settings.model_dump(mode="json")
    if identity["config"] != wanted and holder(folder.leases) is None:
        # Time limits, memory, attempts, tolerance: what may change while a campaign goes on.
        write_json(folder.identity, {**identity, "config": wanted})
    return folder


def _is_unfinished(folder: CampaignFolder) -> bool:
    """Empty, or a creation that was killed half-way: it left inputs and no identity, and is done again."""
    names = {path.name for path in folder.root.iterdir() if not path.name.startswith(".tmp-")}
    # The lease is the first thing that a creation makes: without one these are somebody's own files.
    return not names or ("leases" in names and names <= {"inputs", CAMPAIGN_COPY, REFERENCE_COPY, "leases"})


def refuse_other_settings(folder: CampaignFolder, settings: Settings, source: Path) -> None:
    """Raises UserError for settings that mean other work than what is in the folder."""
    identity = folder.read_identity()
    if identity["fingerprint"] == settings.fingerprint():
        return
    changes = differences(identity["normalised"], settings.normalised())
    raise UserError(
        f"{folder.root} belongs to another campaign than {source} describes now:\n  "
        + "\n  ".join(changes[:10])
        + "\nGo on with the old one by `hpcft resume DIR`, or give the new one a folder of its own with --dir."
    )


def refuse_hostile_name(root: Path) -> None:
    """Raises UserError for a path that Slurm or submitit would not take as it is written: it stands in batch scripts."""
    if not str(root).isprintable() or {"%", "\\"} & set(str(root)):
        raise UserError(
            f"the campaign folder {str(root)!r} has a control character, % or a backslash in its path, which Slurm "
            "would read as something else; name another with --dir"
        )


def refuse_shared(root: Path) -> None:
    """Raises UserError for a folder that others can write: jobs load pickles from it, and a pickle is code."""
    status = root.stat()
    if status.st_uid != os.getuid():
        raise UserError(f"{root} belongs to another user; run your own copy of the campaign")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(f"{root} can be written by others, who could run code as you; do: chmod go-w {root}")


def _make_root(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        root.chmod(root.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))
    except OSError as error:
        raise UserError(
            f"the campaign folder {root} cannot be made ({error.strerror}); name another with --dir"
        ) from error


def _fill(folder: CampaignFolder, settings: Settings, source: Path, contents: Contents) -> None:
    folder.inputs.mkdir(exist_ok=True)
    for name, path in contents.files.items():
        write_bytes(folder.root / name, path.read_bytes())
    for name, group in contents.structures.items():
        write_structures(folder.inputs / f"{name}.h5", group)
    normalised = settings.normalised()
    write_json(
        folder.identity,
        {
            "format": FORMAT,
            "kind": settings.kind,
            "name": settings.name,
            "id": _new_id(folder, normalised),
            "created": time.time(),
            "hpcft_version": __version__,
            "rounds": settings.rounds,
            "source": str(source.absolute()),
            "fingerprint": settings.fingerprint(),
            "normalised": normalised,
            "config": settings.model_dump(mode="json"),
            **contents.about,
        },
    )


def _new_id(folder: CampaignFolder, normalised: dict[str, Any]) -> str:
    """Eight characters that tell this folder's jobs from those of every other one."""
    return hashlib.sha256(f"{folder.root}{normalised}{time.time_ns()}".encode()).hexdigest()[:8]

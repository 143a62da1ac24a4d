"""Whether a campaign's folder is whole: every file what was written, every finished stage complete. No torch here.

Nothing is changed and nothing is locked: it may be asked of a campaign at work and of a folder that is read-only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hpcft.campaign.archive import list_entries
from hpcft.campaign.settings import settings_of, site_of
from hpcft.config.campaign import Campaign
from hpcft.errors import UserError
from hpcft.storage.atomic import read_json
from hpcft.storage.campaign_folder import CampaignFolder
from hpcft.storage.inspection import verify_file

_RESTORE = "restore it from a backup"


@dataclass(frozen=True)
class Problem:
    """`text` goes on where `file`, named from the campaign's folder, ends: what is wrong and what to do."""

    file: str
    text: str


@dataclass(frozen=True)
class Verified:
    num_files: int
    num_bytes: int
    num_stages: int
    """Finished stages."""
    num_left_out: int
    problems: tuple[Problem, ...]


@dataclass
class Findings:
    """What has been seen so far: of each file only the first problem, for others follow from it."""

    num_files: int = 0
    num_bytes: int = 0
    num_stages: int = 0
    num_left_out: int = 0
    _problems: dict[str, str] = field(default_factory=dict)

    def count(self, num_bytes: int) -> None:
        self.num_files += 1
        self.num_bytes += num_bytes

    def add(self, file: str, text: str) -> None:
        self._problems.setdefault(file, text)

    def has(self, file: str) -> bool:
        return file in self._problems

    def verified(self) -> Verified:
        problems = tuple(Problem(file, text) for file, text in self._problems.items())
        return Verified(self.num_files, self.num_bytes, self.num_stages, self.num_left_out, problems)


def verify_campaign(folder: CampaignFolder) -> Verified:
    """Read everything in the folder; UserError if it is no campaign's."""
    if not folder.identity.exists():
        folder.read_identity()
    from hpcft.campaign.verify_stages import check_stages

    findings = Findings()
    _check_files(folder, findings)
    if not findings.has(folder.identity.name):
        with naming(findings, folder, folder.identity):
            settings_of(folder)
            with naming(findings, folder, folder.site):
                site_of(folder)
            check_inputs(folder, findings)
            check_stages(folder, findings)
    return findings.verified()


@contextlib.contextmanager
def naming(findings: Findings, folder: CampaignFolder, path: Path) -> Iterator[None]:
    """Count what reading meets as a problem of `path`, unless the file is gone meanwhile, in a campaign at work."""
    name = path.relative_to(folder.root).as_posix()
    try:
        yield
    except UserError as error:
        if os.path.lexists(path):
            findings.add(name, str(error).removeprefix(str(path)).lstrip(" ,"))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        findings.add(name, f"is not what hpcft wrote there ({type(error).__name__}: {error}); {_RESTORE}")
    except OSError as error:
        if os.path.lexists(error.filename or path):
            findings.add(name, f"cannot be read ({error.strerror or error}); {_RESTORE}, or mend the disk")


def _check_files(folder: CampaignFolder, findings: Findings) -> None:
    for name, path in list_entries(folder):
        if path.is_dir():
            continue
        with naming(findings, folder, path):
            findings.count(path.stat().st_size)
            if _is_ours(name):
                _check_content(path)


def _is_ours(name: str) -> bool:
    """A user may keep whatever else beside it."""
    first = name.partition("/")[0]
    return first.startswith("round-") or first in (
        "campaign.json", "site.json", "inputs", "label-store", "resumes", "aside"
    )  # fmt: skip


def _check_content(path: Path) -> None:
    if path.suffix == ".h5":
        verify_file(path)
    elif path.suffix == ".json":
        read_json(path)
    elif path.suffix == ".jsonl":
        _check_lines(path)
    elif path.suffix == ".zip" or (path.suffix == ".pt" and path.parent.name != "inputs"):
        _check_zip(path)


def _check_lines(path: Path) -> None:
    if path.name.startswith("journal-"):
        from hpcft.labelling.journal import read_journal

        if num_damaged := read_journal(path)[1]:
            raise UserError(
                f"{path} has {num_damaged} damaged lines; {_RESTORE}, or let their labels be computed again"
            )
        return
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} is damaged in line {number} ({error}); {_RESTORE}") from error


def _check_zip(path: Path) -> None:
    """History and PyTorch's files, whose members have a CRC-32 each."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); {_RESTORE}") from error
    if member is not None:
        raise UserError(f"{path} is damaged: the checksum of {member} in it is wrong; {_RESTORE}")


def check_inputs(folder: CampaignFolder, findings: Findings) -> None:
    """The campaign's own copies of what it started from; the files that it was given may be gone."""
    settings = settings_of(folder)
    wanted = {f"{name}.h5": source for name, source in settings.structure_files().items()}
    if isinstance(settings, Campaign):
        identity = folder.read_identity()
        foundation = folder.inputs / str(identity["foundation_file"])
        wanted[foundation.name] = settings.foundation
        if foundation.exists() and f"sha256:{sha256_of(foundation)}" != identity["normalised"]["foundation"]:
            findings.add(
                f"inputs/{foundation.name}",
                f"is not the file whose SHA-256 campaign.json has; {_RESTORE}, or from {settings.foundation}",
            )
    for name, source in wanted.items():
        if not (folder.inputs / name).exists():
            findings.add(f"inputs/{name}", f"is missing; {_RESTORE}, or from what it was made of: {source}")


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

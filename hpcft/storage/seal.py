"""The seal of our HDF5 files: kind, length and SHA-256 of all behind it, in HDF5's user block of 512 bytes.

It is written last, so it is the commit record, and it is compared before HDF5 sees the file: a checksum inside
would come too late, because HDF5 2.0 loops for ever on some files with a flipped bit (seen). Other readers skip
the block.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from hpcft.errors import UserError

SEAL_BYTES = 512
FORMAT_VERSION = 1

_PATTERN = re.compile(rb"hpcft ([a-z]+) format (\d+) bytes (\d+) sha256 ([0-9a-f]{64})\n")
_REMEDY = "Restore it from a backup, or set it aside and let hpcft write it again."


class DamagedFile(UserError):
    """A file's content is torn or altered: not what was once written there."""


@dataclass(frozen=True)
class Seal:
    kind: str
    format_version: int
    num_bytes: int
    sha256: str

    def has_length_of(self, path: Path) -> bool:
        return path.stat().st_size == self.num_bytes


def write_seal(path: Path, kind: str) -> None:
    """Seal a finished file, whose first 512 bytes must be free for it."""
    digest = _digest(path)
    text = f"hpcft {kind} format {FORMAT_VERSION} bytes {path.stat().st_size} sha256 {digest}\n"
    with path.open("r+b") as file:
        file.write(text.encode().ljust(SEAL_BYTES, b"\n"))


def read_seal(path: Path) -> Seal | None:
    """The seal of a file, None if it has none; UserError if there is no such file or it has a newer format."""
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file; check the name.")
    with path.open("rb") as file:
        found = _PATTERN.match(file.read(SEAL_BYTES))
    if found is None:
        return None
    kind, version, num_bytes, digest = (part.decode() for part in found.groups())
    if int(version) > FORMAT_VERSION:
        raise UserError(f"{path} was written by a newer hpcft (format {version}); update hpcft to read it.")
    return Seal(kind, int(version), int(num_bytes), digest)


def expect_seal(path: Path) -> Seal:
    """The seal of a file that must have one; DamagedFile if it has none, or another length than was written."""
    seal = read_seal(path)
    if seal is None:
        raise DamagedFile(f"{path} is not a file of hpcft, or its first bytes are damaged. {_REMEDY}")
    if not seal.has_length_of(path):
        raise DamagedFile(
            f"{path} is damaged: it has {path.stat().st_size} bytes, but {seal.num_bytes} were written. {_REMEDY}"
        )
    return seal


def check_seal(path: Path) -> Seal:
    """The seal, if the whole file is what was sealed; DamagedFile if not."""
    seal = expect_seal(path)
    if _digest(path) != seal.sha256:
        raise DamagedFile(
            f"{path} is damaged: its SHA-256 is not the one that was written into it. {_REMEDY}"
        )
    return seal


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(SEAL_BYTES)
        return hashlib.file_digest(file, "sha256").hexdigest()

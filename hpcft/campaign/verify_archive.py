"""Whether an archive holds what its manifest lists, all of it, and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from pathlib import Path
from typing import BinaryIO

from hpcft.campaign.archive import ABOUT, MANIFEST
from hpcft.campaign.verify import Findings, Verified

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_PRODUCT = re.compile(r"round-\d+/[a-z]+/product\.json")
_CHUNK = 2**20
_COPY = "copy the archive again from where it came from"


def verify_archive(path: Path) -> Verified:
    """Compare every member with the manifest; whether the campaign is whole, the unpacked folder has to say."""
    findings = Findings()
    with path.open("rb") as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                _compare(tar, stream, path, findings)
        except tarfile.TarError as error:
            findings.add(str(path), f"is cut off, damaged, compressed, or no tar archive ({error}); {_COPY}")
    return findings.verified()


def _compare(tar: tarfile.TarFile, stream: BinaryIO, path: Path, findings: Findings) -> None:
    first = tar.next()
    if first is None or not first.isreg() or first.name.rpartition("/")[2] != MANIFEST:
        findings.add(
            str(path), f"does not begin with {MANIFEST}: it is no archive of hpcft's, or was packed anew"
        )
        return
    expected = _read_manifest(tar, first, findings)
    seen = _compare_members(tar, first.name.removesuffix(MANIFEST), expected, findings)
    missing = sorted(expected.keys() - seen)
    stream.seek(tar.offset)
    if any(stream.read(tarfile.BLOCKSIZE)):  # an archive ends with zeros
        findings.add(
            str(path), f"is damaged at byte {tar.offset}: {len(missing)} files cannot be read; {_COPY}"
        )
        return
    for name in missing:
        findings.add(name, f"is missing, although {MANIFEST} lists it; {_COPY}")


def _compare_members(
    tar: tarfile.TarFile, top: str, expected: dict[str, str], findings: Findings
) -> set[str]:
    seen: set[str] = set()
    while (member := tar.next()) is not None:
        name = member.name.removeprefix(top)
        if member.isdir() and f"{member.name}/".startswith(top):
            continue
        if not member.isreg() or not member.name.startswith(top) or name not in expected or name in seen:
            findings.add(member.name, f"is not in {MANIFEST}: somebody has added it to the archive")
            continue
        seen.add(name)
        findings.count(member.size)
        findings.num_stages += bool(_PRODUCT.fullmatch(name))
        if _digest(tar, member) != expected[name]:
            findings.add(name, f"is damaged: its SHA-256 is not the one in {MANIFEST}; {_COPY}")
        elif name == ABOUT:
            findings.num_left_out = len(json.loads(_content(tar, member))["left_out"])
    return seen


def _read_manifest(tar: tarfile.TarFile, member: tarfile.TarInfo, findings: Findings) -> dict[str, str]:
    """SHA-256 by name."""
    expected = {}
    for number, line in enumerate(_content(tar, member).decode(errors="replace").splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None:
            findings.add(MANIFEST, f"is damaged in line {number}; {_COPY}")
        else:
            expected[match[2]] = match[1]
    return expected


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    assert stream is not None  # it is a regular file
    return stream.read()


def _digest(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    stream = tar.extractfile(member)
    assert stream is not None
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()

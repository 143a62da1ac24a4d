"""A new trajectory of what is sound in a damaged one, or in a folder of segments."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft import __version__
from hpcft.errors import UserError
from hpcft.storage.atomic import publish_once
from hpcft.storage.consolidation import consolidate
from hpcft.storage.salvage import Salvaged, salvage
from hpcft.storage.seal import DamagedFile
from hpcft.storage.segments import list_proven_segments, segment_files, segment_path, write_segment
from hpcft.storage.soundness import check_file
from hpcft.storage.trajectory import Trajectory

_SILENCE_S = 60.0


@dataclass(frozen=True)
class Repaired:
    num_frames: int
    """In the new file."""
    about: Mapping[str, Any]
    """What its provenance says under `repaired`: from which file, and what was lost."""


def repair(source: Path, out: Path, *, silence_s: float = _SILENCE_S) -> Repaired:
    """Write `out` from the sound prefix of a damaged trajectory, or from the committed segments in a folder.

    `source` is only read. A frame counts as sound if SHA-256 proves every bit of it; what HDF5 reads from a damaged
    file is read in a child process, which may be silent for `silence_s`. Raises UserError if there is nothing to
    repair or `out` exists, DamagedFile if nothing can be proven, OSError on a full disk.
    """
    _check_target(source, out)
    with tempfile.TemporaryDirectory(prefix=f".{out.name[:100]}-repair-", dir=out.parent) as work:
        if source.is_dir():
            about, segments, provenance = _from_segments(source)
        else:
            about, segments, provenance = _from_trajectory(source, Path(work), silence_s)
        about = {"from": str(source.resolve()), "hpcft_version": __version__, **about}
        new = Path(work) / "repaired.h5"
        consolidate(segments, new, {**provenance, "repaired": about})
        with Trajectory(new) as trajectory:
            num_frames = sum(trajectory.num_frames(replica) for replica in trajectory)
        if not publish_once(new, out):
            raise UserError(f"{out} has come to be meanwhile; name a new file.")
    return Repaired(num_frames, about)


def _check_target(source: Path, out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already, and a repair replaces nothing; name a new file.")
    if not out.parent.is_dir():
        raise UserError(f"There is no folder {out.parent} for {out.name}; make it, or name another file.")
    if source.is_dir() and out.parent.resolve() == source.resolve():
        raise UserError(
            f"{out} would stand among the segments of {source}, and a run that finds a trajectory there takes "
            "itself for finished; name a file in another folder."
        )


_Sources = tuple[dict[str, Any], Sequence[Path], dict[str, Any]]


def _from_segments(folder: Path) -> _Sources:
    segments, files = list_proven_segments(folder), segment_files(folder)
    if not segments:
        raise DamagedFile(f"{folder}: no segment is committed there, so there is nothing to make a file of.")
    lost = [path.name for path in files if path not in segments]
    about = {"segments_kept": len(segments), "segments_lost": lost, "frames_lost": None if lost else 0}
    return about, segments, {}


def _from_trajectory(damaged: Path, work: Path, silence_s: float) -> _Sources:
    _check_is_damaged_trajectory(damaged)
    try:
        found = salvage(damaged, work, silence_s)
    except DamagedFile as error:
        raise DamagedFile(f"{error}{_other_way(damaged)}") from error
    if not any(found.num_kept.values()):
        why = next(iter(found.lost.values()), "it had none")
        raise DamagedFile(f"{damaged}: no frame can be given back ({why}).{_other_way(damaged)}")
    lost = {f"{replica:04d}": _num_lost(found, replica) for replica in found.replicas}
    # It is the state after the last frame, so it fits only if no frame is lost.
    keeps_checkpoint = found.checkpoint is not None and not any(num != 0 for num in lost.values())
    if keeps_checkpoint:
        write_segment(segment_path(work, len(segment_files(work))), [], found.checkpoint or {})
    about = {
        "frames_lost": lost,
        "checkpoint": "kept" if keeps_checkpoint else "lost",
        "provenance": "lost" if found.provenance is None else "kept",
    }
    return about, segment_files(work), found.provenance or {}


def _check_is_damaged_trajectory(path: Path) -> None:
    found = check_file(path)
    if not found.problems:
        raise UserError(f"{path} is bit for bit what was written, so there is nothing to repair.")
    if found.kind not in ("trajectory", "unknown"):
        raise UserError(
            f"{path} is damaged, and as a file of kind {found.kind} it has one checksum for all of it, so nothing in "
            "it can be proven. Only a trajectory can be repaired, or a folder of segments."
        )


def _num_lost(found: Salvaged, replica: int) -> int | None:
    """None if it cannot be known how many there were."""
    if replica not in found.num_frames:
        return None
    return found.num_frames[replica] - found.num_kept[replica]


def _other_way(damaged: Path) -> str:
    folder = damaged.parent
    if not segment_files(folder):
        return " Restore it from a backup."
    return (
        f" But the segments that it was made of are still in its folder: hpcft verify {folder} --repair OUT makes "
        "a file of them."
    )

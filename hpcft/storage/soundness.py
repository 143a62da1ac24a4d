"""Whether one HDF5 file of hpcft's, or a folder of them such as a run's segments, is what was written; and what it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpcft.errors import UserError
from hpcft.storage.hdf5 import kind_of
from hpcft.storage.seal import SEAL_BYTES, DamagedFile, check_seal, read_seal
from hpcft.storage.segments import list_proven_segments, segment_files, segment_path, steps_in_segment
from hpcft.storage.structures import count_structures
from hpcft.storage.trajectory import Trajectory

_SIGNATURE = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class Counts:
    """None where it has no meaning or cannot be known."""

    num_replicas: int | None = None
    num_frames: int | None = None
    """Of all replicas together; the structures in a file of structures."""
    last_step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Soundness:
    """Of one file, or of all segments in a folder."""

    path: Path
    kind: str
    """What `kind_of` says, `unknown` if the seal is gone, or `segments` for a folder of them."""
    num_bytes: int
    num_segments: int | None = None
    """Of a folder: how many are committed, 0, 1, ... without a gap and unbroken; `counts` are of these."""
    counts: Counts = Counts()
    problems: Mapping[str, str] = field(default_factory=dict)
    """By file; the text goes on where its name ends: what is wrong and what to do."""


def is_hdf5(path: Path) -> bool:
    """Whether a file is meant to be HDF5, sound or not, by its name or its first bytes."""
    if path.suffix in (".h5", ".hdf5", ".h5md"):
        return True
    return read_seal(path) is not None or any(_has_signature(path, offset) for offset in (0, SEAL_BYTES))


def hdf5_files(folder: Path) -> list[Path]:
    """Those that stand in a folder; what killed writers left there is hidden."""
    return sorted(path for path in folder.glob("*.h5") if not path.name.startswith("."))


def check_file(path: Path) -> Soundness:
    """Compare the whole file with its seal; UserError if it is missing or no file of hpcft's at all."""
    if read_seal(path) is None and _has_signature(path, 0):
        raise UserError(
            f"{path} is an HDF5 file, but none of hpcft's, so nothing says what it should hold; "
            f"what it does hold is shown by: hpcft inspect {path}"
        )
    size = path.stat().st_size
    kind = "unknown" if read_seal(path) is None else kind_of(path)
    try:
        check_seal(path)
        return Soundness(path=path, kind=kind, num_bytes=size, counts=_count(path, kind))
    except DamagedFile as error:
        text = text_of(error, path)
        if kind == "trajectory":
            text += f" hpcft verify {path} --repair OUT writes a new file of the frames that can be proven."
        return Soundness(path=path, kind=kind, num_bytes=size, problems={str(path): text})


def check_folder(folder: Path) -> list[Soundness]:
    """All HDF5 files that stand in a folder, one by one, but its segments together; it may be a run's at work."""
    segments = segment_files(folder)
    try:
        found = [_check_segments(folder, segments)] if segments else []
    except (UserError, FileNotFoundError):
        if all(path.exists() for path in segments):
            raise
        return check_folder(folder)  # the run has ended meanwhile, and deleted them
    others = [path for path in hdf5_files(folder) if path not in segments]
    return found + [check_file(path) for path in others if path.exists()]


def text_of(error: UserError, path: Path) -> str:
    """The message without the file's name at its head."""
    return str(error).removeprefix(str(path)).lstrip(" ,")


def _check_segments(folder: Path, files: Sequence[Path]) -> Soundness:
    prefix = list_proven_segments(folder)
    first_lost = segment_path(folder, len(prefix))
    problems: dict[str, str] = {}
    for path in files:
        if path in prefix:
            continue
        try:
            kind = check_seal(path).kind
            what = "is damaged or missing" if path != first_lost else f"is of kind {kind}"
            problems[str(path)] = f"is sound, but of no use: {first_lost.name} {what}."
        except DamagedFile as error:
            problems[str(path)] = text_of(error, path)
    if problems:
        last = next(reversed(problems))
        problems[last] += (
            f" A run that is started again goes on after the {len(prefix)} segments before; or hpcft verify "
            f"{folder} --repair OUT makes one file of them."
        )
    return Soundness(
        path=folder,
        kind="segments",
        num_bytes=sum(path.stat().st_size for path in files),
        num_segments=len(prefix),
        problems=problems,
        counts=_count_segments(prefix),
    )


def _count(path: Path, kind: str) -> Counts:
    if kind == "structures":
        return Counts(num_frames=count_structures(path))
    if kind == "segment":
        return _count_segments([path])
    return _count_trajectory(path) if kind == "trajectory" else Counts()


def _count_trajectory(path: Path) -> Counts:
    with Trajectory(path) as trajectory:
        num_frames = sum(trajectory.num_frames(replica) for replica in trajectory)
        steps = [trajectory.array(replica, "step", slice(-1, None)) for replica in trajectory]
        last_step = max((int(step[-1]) for step in steps), default=None)
        return Counts(len(trajectory.replicas), num_frames, last_step)


def _count_segments(paths: Sequence[Path]) -> Counts:
    replicas: set[int] = set()
    num_frames, last_step = 0, None
    for path in paths:
        for replica, step in steps_in_segment(path).items():
            replicas.add(replica)
            num_frames += len(step)
            if len(step):
                last_step = max(last_step or 0, int(step[-1]))
    return Counts(len(replicas), num_frames, last_step)


def _has_signature(path: Path, offset: int) -> bool:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(len(_SIGNATURE)) == _SIGNATURE

"""A campaign as one portable file: an uncompressed tar whose first member lists the SHA-256 of all others.

Whoever has unpacked it checks it with `sha256sum -c MANIFEST.sha256`, without hpcft. Left out is what belongs to a
machine or to a moment: leases, locks, temporary files, jobs' pickles. The same campaign gives the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hpcft import __version__
from hpcft.campaign.lease import lease
from hpcft.campaign.records import Records, read_records
from hpcft.errors import LeaseHeld, SchedulerUnavailable, UserError
from hpcft.storage.atomic import TEMPORARY_PREFIX, errors_naming, publish_once, read_json, temporary_beside
from hpcft.storage.campaign_folder import CampaignFolder

MANIFEST = "MANIFEST.sha256"
ABOUT = "archive.json"
TRAJECTORY = "trajectory.h5"
FORMAT = 1

_CHUNK = 2**20


@dataclass(frozen=True)
class Archived:
    path: Path
    num_files: int
    num_bytes: int
    left_out: tuple[str, ...]


def create_archive(folder: CampaignFolder, out: Path, *, without_trajectories: bool = False) -> Archived:
    """Write the campaign into the new file `out`, which appears whole or not at all.

    Raises LeaseHeld while a manager or a task is at work, SchedulerUnavailable when nobody can say whether one is, UserError
    for an `out` that exists or cannot be, OSError on a full disk.
    """
    folder.read_identity()
    _refuse_target(folder, out)
    _refuse_controller(folder)  # before the lease, too: a controller that starts and finds it taken gives up
    with _lease(folder):
        _refuse_controller(folder)
        records = read_records(folder)
        _refuse_tasks(folder, records)
        if without_trajectories and records.current is not None:
            raise UserError(
                f"{folder.root} is not finished and needs its trajectories to go on; archive it with them, or when it is done"
            )
        left_out = set(left_out_before(folder))
        entries = list_entries(folder)
        if without_trajectories:
            left_out |= {name for name, path in entries if path.name == TRAJECTORY}
            entries = [entry for entry in entries if entry[1].name != TRAJECTORY]
        about = {
            "format": FORMAT,
            "campaign": folder.read_identity()["name"],
            "finished": records.current is None,
            "left_out": sorted(left_out),
            "hpcft_version": __version__,
        }
        text = json.dumps(about, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
        num_files, num_bytes = _publish(out, folder.root.resolve().name, entries, text.encode())
    return Archived(out, num_files, num_bytes, tuple(sorted(left_out)))


def list_entries(folder: CampaignFolder) -> list[tuple[str, Path]]:
    """Folders and files that make the campaign up, by their name in it, each folder before what is in it.

    A link counts as what it leads to. Raises UserError for one that leads in a circle.
    """
    of_this_machine = {
        folder.leases,
        folder.controllers,
        folder.observed,
        folder.root / MANIFEST,
        folder.root / ABOUT,
    }
    found = _walk(folder.root, frozenset(), lambda path: path not in of_this_machine and _is_kept(path))
    return [(path.relative_to(folder.root).as_posix(), path) for path in found]


def left_out_before(folder: CampaignFolder) -> list[str]:
    """What an archive from which this folder was unpacked did not hold."""
    path = folder.root / ABOUT
    return list(read_json(path)["left_out"]) if path.exists() else []


def manifest_line(digest: str, name: str) -> bytes:
    """As `sha256sum` writes it."""
    return f"{digest}  {name}\n".encode()


def _walk(folder: Path, above: frozenset[Path], is_kept: Callable[[Path], bool]) -> Iterator[Path]:
    above |= {folder.resolve()}
    for path in sorted(filter(is_kept, folder.iterdir()), key=lambda path: path.name):
        if path.is_dir():
            if path.resolve() in above:
                raise UserError(
                    f"{path} is a link to a folder that it is in itself; remove the link and try again"
                )
            yield path
            yield from _walk(path, above, is_kept)
        elif path.is_file() or path.is_symlink():
            yield path


def _is_kept(path: Path) -> bool:
    if path.is_symlink() and path.parent.name.endswith("-jobs"):  # submitit's, to a batch script beside it
        return False
    is_short_lived = path.name == "lock" or path.name.startswith((TEMPORARY_PREFIX, "rendezvous-"))
    return not is_short_lived and path.suffix != ".pkl"


def _refuse_target(folder: CampaignFolder, out: Path) -> None:
    if out.is_dir():
        raise UserError(f"{out} is a folder; name the file itself: --out {out / folder.root.name}.tar")
    if out.exists() or out.is_symlink():
        raise UserError(_exists(out))
    if not out.parent.is_dir():
        raise UserError(
            f"there is no folder {out.parent} for {out.name}; make it, or name another with --out"
        )
    if out.parent.resolve().is_relative_to(folder.root.resolve()):
        raise UserError(f"{out} would be inside the campaign that it holds; name a file elsewhere with --out")


def _exists(out: Path) -> str:
    return f"{out} exists already and stays as it is; name another file with --out, or move that one away"


@contextlib.contextmanager
def _lease(folder: CampaignFolder) -> Iterator[None]:
    from hpcft.campaign.settings import site_of
    from hpcft.cluster.slurm import job_is_over

    is_slurm = site_of(folder).executor == "slurm"
    with lease(folder.leases, job_is_over=job_is_over if is_slurm else lambda job_id: False):
        yield


def _refuse_controller(folder: CampaignFolder) -> None:
    from hpcft.campaign.controllers import lost_controller, newest_controller

    controller = newest_controller(folder)
    if controller is not None and controller.over is None and lost_controller(folder) is None:
        raise LeaseHeld(
            f"the controller job {controller.job_id or controller.job_name} of this detached campaign waits or runs; archive it "
            f"when it is finished, or end its jobs first with: hpcft cancel {folder.root}"
        )


def _refuse_tasks(folder: CampaignFolder, records: Records) -> None:
    """While a task is at work, what is read of it would not fit together. Its scheduler is asked only if there may be one."""
    from hpcft.campaign.decide import is_open

    stage = records.current
    if stage is None or not any(is_open(stage, task) for task in stage.missing):
        return
    from hpcft.campaign.scheduler import Scheduler
    from hpcft.campaign.settings import settings_of, site_of

    seen = Scheduler(folder, settings_of(folder), site_of(folder)).observe(records)
    where = f"round {stage.round}, stage {stage.name} of {folder.root}"
    if not seen.known:
        raise SchedulerUnavailable(
            f"Slurm does not say whether tasks of {where} are at work; archive it when it answers again, on the cluster where "
            "the campaign ran last"
        )
    if seen.alive or seen.found:
        raise LeaseHeld(
            f"{max(len(seen.alive), 1)} tasks of {where} wait or run; let them end, or end them with: hpcft cancel {folder.root}"
        )


def _publish(out: Path, top: str, entries: Collection[tuple[str, Path]], about: bytes) -> tuple[int, int]:
    _refuse_entries([(top, out.parent), *entries])
    _remove_leftovers(out)
    temporary = temporary_beside(out)
    try:
        with errors_naming(out), temporary.open("x+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            counts = _write(stream, top, entries, about)
        if not publish_once(temporary, out):
            raise UserError(_exists(out))
    finally:
        temporary.unlink(missing_ok=True)
    return counts


def _refuse_entries(entries: Collection[tuple[str, Path]]) -> None:
    for name, path in entries:
        if not name.isprintable() or "\\" in name:
            raise UserError(
                f"{name!r} has a control character or a backslash in its name, which a list of checksums cannot hold; rename it"
            )
        if not path.exists():
            raise UserError(
                f"{path} is a link to {path.readlink()}, where nothing is; put the file back, or remove the link"
            )


def _remove_leftovers(out: Path) -> None:
    """What a killed writer of the same archive has left: it may be as large as the campaign."""
    from hpcft.cluster.local import lock_is_held

    token, _, name = temporary_beside(out).name.removeprefix(TEMPORARY_PREFIX).partition("-")
    ours = re.compile(re.escape(TEMPORARY_PREFIX) + rf"[0-9a-f]{{{len(token)}}}-{re.escape(name)}")
    for path in out.parent.iterdir():
        if ours.fullmatch(path.name) and not lock_is_held(path):
            path.unlink(missing_ok=True)


def _write(
    stream: BinaryIO, top: str, entries: Collection[tuple[str, Path]], about: bytes
) -> tuple[int, int]:
    """The whole tar in one pass over the data: the manifest's place is kept free, for its length is known beforehand."""
    names = [ABOUT, *(name for name, path in entries if not path.is_dir())]
    size = sum(len(manifest_line("0" * 64, name)) for name in names)
    newest = max((_mtime(path) for _, path in entries), default=0)
    lines = []
    with tarfile.TarFile(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, copybufsize=_CHUNK) as tar:
        tar.addfile(_member(f"{top}/{MANIFEST}", newest, size), io.BytesIO(bytes(size)))
        start = stream.tell() - -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        tar.addfile(_member(top, newest))
        tar.addfile(_member(f"{top}/{ABOUT}", newest, len(about)), io.BytesIO(about))
        lines.append(manifest_line(hashlib.sha256(about).hexdigest(), ABOUT))
        num_bytes = len(about)
        for name, path in entries:
            if path.is_dir():
                tar.addfile(_member(f"{top}/{name}", _mtime(path)))
            else:
                length, digest = _add(tar, f"{top}/{name}", path)
                lines.append(manifest_line(digest, name))
                num_bytes += length
    stream.seek(start)
    stream.write(b"".join(lines))
    return len(lines), num_bytes


def _add(tar: tarfile.TarFile, name: str, path: Path) -> tuple[int, str]:
    """Length and SHA-256 of what went into the archive, whatever became of the file since."""
    with path.open("rb") as stream:
        reader = _Hashing(stream, path)
        length = path.stat().st_size
        tar.addfile(_member(name, _mtime(path), length), reader)
    return length, reader.digest.hexdigest()


class _Hashing:
    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path = stream, path
        self.digest = hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        try:
            chunk = self._stream.read(size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if len(chunk) < size:
            raise UserError(
                f"{self._path} became shorter while it was read; see what writes it, and try again"
            )
        self.digest.update(chunk)
        return chunk


def _member(name: str, mtime: int, size: int | None = None) -> tarfile.TarInfo:
    """A file, or without a size a folder; nobody's, and writable for whoever unpacks it alone."""
    member = tarfile.TarInfo(name)
    member.mtime = mtime
    member.type = tarfile.DIRTYPE if size is None else tarfile.REGTYPE
    member.mode = 0o755 if size is None else 0o644
    member.size = size or 0
    return member


def _mtime(path: Path) -> int:
    return max(0, int(path.stat().st_mtime))

"""Durable writes: they survive a crash, and a kill leaves the old file or the new one, never half of one."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hpcft.errors import UserError

TEMPORARY_PREFIX = ".tmp-"

# What file systems without hard links, or without fsync on a folder, answer.
_UNSUPPORTED = {errno.EPERM, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}

_STALE_TRIES, _STALE_PAUSE_S = 5, 0.1

_Result = TypeVar("_Result")


def reopening(action: Callable[[], _Result]) -> _Result:
    """What `action` gives; tried again, within bounds, when NFS calls one of its handles stale.

    The file has been replaced on the server meanwhile, so `action` must begin at the path, and may be repeated.
    """
    for _ in range(_STALE_TRIES - 1):
        try:
            return action()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        time.sleep(_STALE_PAUSE_S)
    return action()


def temporary_beside(path: Path) -> Path:
    """A name that nobody else uses, in the folder of `path`; hidden, and recognisable as a leftover."""
    return path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}-{path.name[:100]}")


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete what killed writers left in `folder`; for its sole writer, as a live one's file would go too."""
    leftovers = sorted(folder.glob(f"{TEMPORARY_PREFIX}*"))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return leftovers


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step."""
    temporary = _filled(path, data)
    try:
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) in one step."""
    write_bytes(path, text.encode())


def write_json(path: Path, obj: Any) -> None:
    """Replace `path` by `obj` as JSON with sorted keys in one step."""
    write_bytes(path, _as_json(obj))


def create_json_once(path: Path, obj: Any) -> bool:
    """Write `obj` as JSON unless `path` exists; of many writers exactly one, whose file it is, gets True."""
    return publish_once(_filled(path, _as_json(obj)), path)


def read_json(path: Path) -> Any:
    """The content of a JSON file; UserError if it is damaged, FileNotFoundError if there is none."""
    data = reopening(path.read_bytes)
    try:
        return json.loads(data)
    except ValueError as error:
        what = f"is not valid JSON ({error})" if data.strip() else "is empty"
        raise UserError(
            f"{path} {what}, so it was damaged or edited by hand; hpcft replaces such files in one step. "
            "Restore it from a backup, or delete it to have the work behind it done again."
        ) from error


def publish(temporary: Path, final: Path) -> None:
    """Make a finished temporary file the durable content of `final`, in place of what was there."""
    with errors_naming(final):
        _sync(temporary)
        ours = reopening(temporary.stat)
        reopening(lambda: _replace(temporary, final, ours))
        sync_folder(final.parent)


def publish_once(temporary: Path, final: Path) -> bool:
    """As `publish`, but False, with `final` left alone, if it exists already. Always removes `temporary`."""
    try:
        with errors_naming(final):
            _sync(temporary)
            published = reopening(lambda: _link(temporary, final))
            sync_folder(final.parent)  # also when another published: it may have died before it came to this
        return published
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Give the OSError of a write that knows no file name, such as on a full disk, the name of its target."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        reason = f"{error.strerror}; nothing of this file was kept, older files are as they were"
        raise OSError(error.errno, reason, str(path)) from error


def _filled(final: Path, data: bytes) -> Path:
    """A temporary file for `final` with this content."""
    return reopening(lambda: _fill(temporary_beside(final), data, final))


def _fill(temporary: Path, data: bytes, final: Path) -> Path:
    try:
        with errors_naming(final), temporary.open("xb") as file:
            file.write(data)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _as_json(obj: Any) -> bytes:
    return (json.dumps(obj, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def _replace(temporary: Path, final: Path, ours: os.stat_result) -> None:
    try:
        temporary.replace(final)
    except FileNotFoundError:
        # As in `_link`: the first request had been served, though its answer was lost.
        if not final.exists() or not os.path.samestat(final.stat(), ours):
            raise


def _link(temporary: Path, final: Path) -> bool:
    try:
        os.link(temporary, final)
    except FileExistsError:
        # NFS repeats a request whose answer was lost; the second try then meets our own link.
        return final.exists() and temporary.samefile(final)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return _copy_exclusively(temporary, final)
    return True


def _copy_exclusively(temporary: Path, final: Path) -> bool:
    """For file systems without hard links. A kill in mid-copy leaves a torn `final`: readers check it."""
    try:
        target = final.open("xb")
    except FileExistsError:
        return False
    try:
        with target, temporary.open("rb") as source:
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())
    except BaseException:
        final.unlink(missing_ok=True)
        raise
    return True


def _sync(path: Path) -> None:
    reopening(lambda: _sync_once(path))


def _sync_once(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where its file system can."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise

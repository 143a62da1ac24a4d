"""An archive is there whole or not at all: after kill -9, on a full disk, at a limit of file sizes.

Run as a script this file archives a campaign and stops for good in the middle of it.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from round_zero import make_round_zero

from hpcft.campaign import archive
from hpcft.campaign.verify_archive import verify_archive
from hpcft.storage.campaign_folder import CampaignFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> CampaignFolder:
    folder = make_round_zero(tmp_path_factory.mktemp("made"))
    (folder.root / "zz-large").write_bytes(bytes(3 * 2**20))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def archive_until_killed(folder: CampaignFolder, out: Path) -> None:
    with subprocess.Popen(
        [sys.executable, __file__, str(folder.root), str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        writer.kill()


def test_a_kill_in_the_middle_leaves_no_archive_and_the_next_one_clears_up(
    folder: CampaignFolder, tmp_path: Path
) -> None:
    out = tmp_path / "tiny.tar"
    archive_until_killed(folder, out)
    [leftover] = names(tmp_path)
    assert leftover.startswith(".tmp-")
    assert (tmp_path / leftover).stat().st_size > 0
    archive.create_archive(folder, out)
    assert names(tmp_path) == ["tiny.tar"]
    assert verify_archive(out).problems == ()


def test_what_somebody_else_is_writing_there_is_not_cleared_up(
    folder: CampaignFolder, tmp_path: Path
) -> None:
    other = tmp_path / ".tmp-0123456789abcdef-tiny.tar"
    unlike = tmp_path / ".tmp-0123456789abcdef-not-tiny.tar"
    unlike.write_text("another archive")
    with other.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        archive.create_archive(folder, tmp_path / "tiny.tar")
    assert names(tmp_path) == sorted([other.name, unlike.name, "tiny.tar"])


def archive_command(folder: CampaignFolder, out: Path, limit: int | None = None) -> Any:
    """`hpcft archive`, if need be without the right to write a larger file."""
    code = "import sys; from hpcft.cli.main import main; "
    if limit is not None:
        code += f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1)); "
    argv = [sys.executable, "-c", code + "main()", "archive", str(folder.root), "--out", str(out)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("limit", [3000, 100_000, 2_000_000])
def test_an_archive_that_does_not_fit_is_told_with_its_name_and_leaves_nothing(
    limit: int, folder: CampaignFolder, tmp_path: Path
) -> None:
    out = tmp_path / "tiny.tar"
    done = archive_command(folder, out, limit)
    assert (done.returncode, done.stdout) == (1, "")
    assert "File too large; nothing of this file was kept" in done.stderr
    assert str(out) in done.stderr
    assert "Traceback" not in done.stderr
    assert names(tmp_path) == []
    assert archive_command(folder, out).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "hpcft-test", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs root and the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_on_a_full_disk_the_archive_is_told_and_the_campaign_stays_as_it_is(
    folder: CampaignFolder, small_disk: Path
) -> None:
    done = archive_command(folder, small_disk / "tiny.tar")
    assert (done.returncode, done.stdout) == (1, "")
    assert "No space left on device; nothing of this file was kept" in done.stderr
    assert names(small_disk) == []


def stop_in_the_middle(root: Path, out: Path) -> None:
    real, members = archive._add, iter(range(10))

    def add(*arguments: Any) -> Any:
        if next(members, None) is None:
            print("half", flush=True)
            sys.stdin.read()
        return real(*arguments)

    archive._add = add
    archive.create_archive(CampaignFolder(root), out)


if __name__ == "__main__":
    stop_in_the_middle(Path(sys.argv[1]), Path(sys.argv[2]))

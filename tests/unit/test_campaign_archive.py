from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))

from round_zero import make_round_zero

from hpcft.campaign import archive
from hpcft.campaign.archive import ABOUT, MANIFEST, create_archive
from hpcft.campaign.lease import lease
from hpcft.campaign.verify_archive import verify_archive
from hpcft.cli.main import app
from hpcft.errors import LeaseHeld, SchedulerUnavailable, UserError
from hpcft.storage.atomic import read_json, write_json
from hpcft.storage.campaign_folder import CampaignFolder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> CampaignFolder:
    return make_round_zero(tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made: CampaignFolder, tmp_path: Path) -> CampaignFolder:
    return CampaignFolder(shutil.copytree(made.root, tmp_path / "runs" / "tiny"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "tiny.tar"


def write(path: Path, content: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def files_below(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def unpack(out: Path, where: Path) -> Path:
    where.mkdir()
    subprocess.run(["tar", "xf", out, "-C", where], check=True)
    [root] = where.iterdir()
    return root


def members(out: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(out) as tar:
        return tar.getmembers()


def test_unpacked_by_tar_and_checked_by_sha256sum_it_is_the_campaign_and_says_what_it_is(
    folder: CampaignFolder, out: Path, tmp_path: Path
) -> None:
    write(folder.root / "notes" / "mine.txt")
    before = files_below(folder.root)
    done = create_archive(folder, out)
    root = unpack(out, tmp_path / "here")
    checked = subprocess.run(
        ["sha256sum", "-c", MANIFEST], cwd=root, check=True, capture_output=True, text=True
    )
    assert len(checked.stdout.splitlines()) == done.num_files == len(files_below(root)) - 1
    found = files_below(root)
    about = read_json(root / ABOUT)
    assert (about["campaign"], about["finished"], about["left_out"]) == ("tiny", False, [])
    assert {n: c for n, c in found.items() if n not in (MANIFEST, ABOUT)} == {
        n: c for n, c in before.items() if not n.startswith("leases/")
    }


def test_what_belongs_to_a_machine_or_a_moment_is_left_out(folder: CampaignFolder, out: Path) -> None:
    task = folder.stage(1, "train").task(0).path
    jobs = folder.stage(1, "train").logs(1)
    for path in (
        folder.leases / "000001.json",
        folder.leases / "000001.released",
        folder.controllers / "0001-over.json",
        folder.observed,
        task / "lock",
        task / ".tmp-0123456789abcdef-model.pt",
        task / "rendezvous-3.json",
        jobs / "17_0_task.pkl",
    ):
        write(path, "{}")
    write(jobs / "17_0_log.out")
    (jobs / "submission.sh").symlink_to("nowhere")
    write(folder.aside / "0001" / "round-001" / "select" / "plan.json", "{}")
    create_archive(folder, out)
    names = [member.name for member in members(out)]
    assert "tiny/round-001/train/attempts/0001-jobs/17_0_log.out" in names
    assert "tiny/aside/0001/round-001/select/plan.json" in names
    hidden = ("leases", "controllers", "observed", "lock", ".tmp", "rendezvous", ".pkl", "submission")
    assert not [name for name in names if any(part in name for part in hidden)]


def test_the_manifest_comes_first_and_members_are_nobodys_relative_and_in_order(
    folder: CampaignFolder, out: Path
) -> None:
    create_archive(folder, out)
    found = members(out)
    assert [member.name for member in found[:3]] == [f"tiny/{MANIFEST}", "tiny", f"tiny/{ABOUT}"]
    names = [member.name.split("/") for member in found[3:]]
    assert names == sorted(names)
    assert {(m.uid, m.gid, m.uname, m.gname) for m in found} == {(0, 0, "", "")}
    assert {m.mode for m in found if m.isdir()} == {0o755}
    assert {m.mode for m in found if not m.isdir()} == {0o644}
    assert all(member.isdir() or member.isreg() for member in found)


def test_the_same_campaign_gives_the_same_bytes_also_where_it_was_unpacked(
    folder: CampaignFolder, out: Path, tmp_path: Path
) -> None:
    create_archive(folder, out)
    again = CampaignFolder(unpack(out, tmp_path / "here"))
    create_archive(again, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == out.read_bytes()


def test_folders_that_a_resumed_campaign_needs_are_there_though_empty_and_closed_to_others(
    folder: CampaignFolder, out: Path, tmp_path: Path
) -> None:
    folder.stage(1, "explore").attempts.mkdir(parents=True)
    create_archive(folder, out)
    before = os.umask(0)
    try:
        root = unpack(out, tmp_path / "here")
    finally:
        os.umask(before)
    assert CampaignFolder(root).stage(1, "explore").attempts.is_dir()
    assert {path.stat().st_mode & 0o022 for path in (root, *root.rglob("*"))} == {0}


def test_a_file_that_exists_is_refused_and_stays_as_it_is(folder: CampaignFolder, out: Path) -> None:
    out.write_text("precious")
    with pytest.raises(UserError, match=r"tiny\.tar exists already and stays as it is"):
        create_archive(folder, out)
    assert out.read_text() == "precious"


def test_of_two_that_write_the_same_file_the_second_is_refused(
    folder: CampaignFolder, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = archive._write

    def meanwhile(*arguments: object) -> object:
        out.write_text("another's")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(archive, "_write", meanwhile)
    with pytest.raises(UserError, match="exists already"):
        create_archive(folder, out)
    assert out.read_text() == "another's"
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".tmp")] == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("runs/tiny/a.tar", "inside the campaign"), ("runs", "is a folder"), ("no/a.tar", "there is no folder")],
)
def test_a_place_where_no_archive_can_be_is_refused(
    name: str, words: str, folder: CampaignFolder, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        create_archive(folder, tmp_path / name)


def test_while_a_manager_is_at_work_nothing_is_archived(folder: CampaignFolder, out: Path) -> None:
    with lease(folder.leases), pytest.raises(LeaseHeld, match="drives this campaign already"):
        create_archive(folder, out)
    assert not out.exists()
    create_archive(folder, out)


def begin_task(folder: CampaignFolder) -> Path:
    """Submit the only task of round 1's explore, for all that the records say."""
    stage = folder.stage(1, "explore")
    stage.outcomes.mkdir(parents=True)
    stage.attempts.mkdir()
    write_json(stage.plan, {"tasks": [{}]})
    intent = {"attempt": 1, "tasks": [0], "job_name": "hpcft-x-r1-explore-1", "at": 1.0}
    write_json(stage.intent(1), intent)
    write_json(stage.submitted(1), {"job_ids": {"0": "17_0"}, "at": 1.0})
    return write(stage.task(0).lock)


def test_while_a_task_is_at_work_nothing_is_archived(folder: CampaignFolder, out: Path) -> None:
    with begin_task(folder).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LeaseHeld, match=r"1 tasks of round 1, stage explore .* hpcft cancel"):
            create_archive(folder, out)
    create_archive(folder, out)


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Let Slurm's commands be a script."""
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")

    def answer(script: str) -> None:
        for name in ("squeue", "sacct", "scontrol", "scancel", "sbatch", "srun"):
            write(tools / name, f"#!/bin/sh\n{script if name == 'squeue' else 'exit 1'}\n").chmod(0o755)

    yield answer


SLURM = {"name": "there", "executor": "slurm", "slurm": {"partition": "p"}}


def test_while_slurm_does_not_say_whether_a_task_is_at_work_nothing_is_archived(
    folder: CampaignFolder, out: Path, squeue: Callable[[str], None]
) -> None:
    begin_task(folder)
    write_json(folder.site, SLURM)
    squeue("echo down >&2; exit 1")
    with pytest.raises(
        SchedulerUnavailable, match="Slurm does not say whether tasks of round 1, stage explore"
    ):
        create_archive(folder, out)
    squeue("true")
    create_archive(folder, out)


def test_while_a_controller_of_a_detached_campaign_waits_nothing_is_archived(
    folder: CampaignFolder, out: Path, squeue: Callable[[str], None]
) -> None:
    write_json(folder.site, SLURM)
    folder.controllers.mkdir()
    write_json(folder.controllers / "0001-intent.json", {"job_name": "hpcft-x-controller-1", "at": 1.0})
    write_json(folder.controllers / "0001-submitted.json", {"job_id": "18", "at": 1.0})
    squeue("echo '18|hpcft-x-controller-1|PENDING|Dependency|'")
    before = files_below(folder.leases)
    with pytest.raises(LeaseHeld, match=r"controller job 18 .* hpcft cancel"):
        create_archive(folder, out)
    assert files_below(folder.leases) == before  # a controller that started meanwhile must not find it taken
    write_json(folder.controllers / "0001-over.json", {"why": "cancelled", "at": 2.0})
    create_archive(folder, out)


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a\x1b[2J"])
def test_a_name_that_a_list_of_checksums_cannot_hold_is_refused(
    name: str, folder: CampaignFolder, out: Path
) -> None:
    write(folder.root / name)
    with pytest.raises(UserError, match="control character or a backslash"):
        create_archive(folder, out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["größe Å.txt", "-c", "*", " x ", "l" * 240, "  "])
def test_names_that_are_only_odd_are_kept_and_checked(
    name: str, folder: CampaignFolder, out: Path, tmp_path: Path
) -> None:
    write(folder.root / name, "odd")
    create_archive(folder, out)
    root = unpack(out, tmp_path / "here")
    assert (root / name).read_text() == "odd"
    subprocess.run(["sha256sum", "-c", "--strict", "--quiet", MANIFEST], cwd=root, check=True)
    assert verify_archive(out).problems == ()


def test_a_part_that_lies_elsewhere_behind_a_link_is_in_the_archive_itself(
    folder: CampaignFolder, out: Path, tmp_path: Path
) -> None:
    expected = files_below(folder.root / "round-000")
    (folder.root / "round-000").rename(tmp_path / "elsewhere")
    (folder.root / "round-000").symlink_to(tmp_path / "elsewhere")
    create_archive(folder, out)
    root = unpack(out, tmp_path / "here")
    assert files_below(root / "round-000") == expected
    assert not (root / "round-000").is_symlink()


def test_links_in_a_circle_or_to_nowhere_are_refused(folder: CampaignFolder, out: Path) -> None:
    (folder.root / "round-000" / "up").symlink_to(folder.root)
    with pytest.raises(UserError, match="up is a link to a folder that it is in itself"):
        create_archive(folder, out)
    (folder.root / "round-000" / "up").unlink()
    (folder.root / "gone").symlink_to("nowhere")
    with pytest.raises(UserError, match="gone is a link to nowhere, where nothing is"):
        create_archive(folder, out)


def test_a_campaign_that_goes_on_keeps_its_trajectories(folder: CampaignFolder, out: Path) -> None:
    with pytest.raises(UserError, match="is not finished and needs its trajectories"):
        create_archive(folder, out, without_trajectories=True)


def test_what_is_no_campaign_is_refused_and_not_touched(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a campaign folder"):
        create_archive(CampaignFolder(tmp_path), tmp_path.parent / "x.tar")
    assert list(tmp_path.iterdir()) == []


# What verify says of an archive


@pytest.fixture
def packed(folder: CampaignFolder, out: Path) -> Path:
    create_archive(folder, out)
    return out


def test_a_whole_archive_has_no_problem_and_is_counted(packed: Path) -> None:
    found = verify_archive(packed)
    sizes = [m.size for m in members(packed)[1:] if m.isreg()]
    assert (found.problems, found.num_stages) == ((), 3)
    assert (found.num_files, found.num_bytes) == (len(sizes), sum(sizes))


def test_a_flipped_bit_in_any_member_is_found_with_its_name(packed: Path) -> None:
    content = packed.read_bytes()
    with tarfile.open(packed) as tar:
        places = {m.name: (m.offset_data, m.size) for m in tar if m.isreg() and m.size}
    assert len(places) > 20
    for name, (start, size) in places.items():
        place = start + size // 2
        packed.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        problems = verify_archive(packed).problems
        if name.endswith(MANIFEST):
            assert problems, place
        else:
            assert [problem.file for problem in problems] == [name.removeprefix("tiny/")]
            assert "damaged" in problems[0].text


def test_a_flipped_bit_in_any_header_is_found(packed: Path) -> None:
    content = packed.read_bytes()
    for member in members(packed):
        for place in (member.offset + 3, member.offset + 126, member.offset + 150):
            packed.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert verify_archive(packed).problems, (member.name, place)


def test_an_archive_that_was_cut_off_is_found_wherever_that_was(packed: Path) -> None:
    content = packed.read_bytes()
    end = max(member.offset_data + member.size for member in members(packed))
    for length in {0, 1, 511, 512, 1000, *range(1024, end, 7000), end - 1}:
        packed.write_bytes(content[:length])
        assert verify_archive(packed).problems, length


def repacked(packed: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> list[str]:
    """The problems of the archive after somebody has packed it anew."""
    with tarfile.open(packed) as tar:
        content = [(m, tar.extractfile(m).read() if m.isreg() else b"") for m in tar]  # type: ignore[union-attr]
    change(content)
    with tarfile.open(packed, "w") as tar:
        for member, data in content:
            tar.addfile(member, io.BytesIO(data))
    return [f"{problem.file} {problem.text}" for problem in verify_archive(packed).problems]


def test_a_member_that_is_missing_added_doubled_or_outside_is_told(packed: Path) -> None:
    def named(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
        member = tarfile.TarInfo(name)
        member.type = kind
        return member

    def change(content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        gone = next(entry for entry in content if entry[0].name == "tiny/campaign.yaml")
        twice = next(entry for entry in content if entry[0].name == "tiny/site.json")
        content.remove(gone)
        content += [twice, (named("tiny/added.txt"), b""), (named("../outside"), b"")]
        content += [(named("tiny/link", tarfile.SYMTYPE), b"")]

    problems = repacked(packed, change)
    added = f"is not in {MANIFEST}: somebody has added it to the archive"
    assert problems[:4] == [
        f"{name} {added}" for name in ("tiny/site.json", "tiny/added.txt", "../outside", "tiny/link")
    ]
    [missing] = problems[4:]
    assert missing.startswith(
        f"campaign.yaml is missing, although {MANIFEST} lists it; copy the archive again"
    )


def test_a_tar_of_somebody_else_and_what_is_no_tar_are_told(packed: Path, tmp_path: Path) -> None:
    assert "does not begin with MANIFEST.sha256" in repacked(packed, lambda content: content.reverse())[0]
    other = write(tmp_path / "other.tar", "no tar " * 1000)
    assert "no tar archive" in verify_archive(other).problems[0].text


# The commands


def test_the_commands_say_in_one_line_what_they_did_and_found(
    folder: CampaignFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.root.parent)
    run = CliRunner().invoke
    done = run(app, ["archive", "tiny"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("tiny.tar: ")
    assert done.stdout.endswith("hpcft verify tiny.tar\n")
    for path in ("tiny.tar", "tiny"):
        found = run(app, ["verify", path])
        assert found.exit_code == 0, found.output
        assert found.stdout.startswith(f"{path}: all is well (")
        assert found.stdout.endswith(", 3 finished stages)\n")
    content = Path("tiny.tar").read_bytes()
    Path("tiny.tar").write_bytes(content.replace(b'"fingerprint"', b'"fingerprimt"'))
    found = run(app, ["verify", "tiny.tar"])
    assert found.exit_code == 1
    problem, summary = found.stdout.splitlines()
    assert problem.startswith("campaign.json is damaged: its SHA-256 is not the one in MANIFEST.sha256; copy")
    assert summary.startswith("tiny.tar: 1 problem (")
    as_json = json.loads(run(app, ["verify", "tiny.tar", "--json"]).stdout)
    assert [problem["file"] for problem in as_json["problems"]] == ["campaign.json"]
    assert run(app, ["verify", "gone.tar"]).exit_code != 0


def test_the_checksum_of_a_file_that_grew_since_is_that_of_what_went_into_the_archive(
    folder: CampaignFolder, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write(folder.root / "notes.log", "before")
    real = archive._member

    def grow(name: str, *rest: int) -> tarfile.TarInfo:
        if name.endswith("notes.log"):
            log.write_text("before and after")
        return real(name, *rest)

    monkeypatch.setattr(archive, "_member", grow)
    create_archive(folder, out)
    assert verify_archive(out).problems == ()
    with tarfile.open(out) as tar:
        stream = tar.extractfile("tiny/notes.log")
        assert stream is not None
        assert stream.read() == b"before"

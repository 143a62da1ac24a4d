"""A campaign that was archived in the middle goes on elsewhere: its folder and the files that it was made of are gone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import assert_same_results, hpcft, hpcft_to_end, kill, processes_of, write_campaign

from hpcft.labelling.store import LabelStore

CHANGES = {"rounds": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished campaign whose inputs are gone."""
    base = tmp_path_factory.mktemp("finished")
    hpcft_to_end("run", write_campaign(base / "in", CHANGES), "--dir", base / "tiny", cwd=base)
    shutil.rmtree(base / "in")
    return base / "tiny"


def unpacked(archive: Path, where: Path) -> Path:
    where.mkdir()
    subprocess.run(["tar", "xf", archive, "-C", where], check=True)
    [root] = where.iterdir()
    subprocess.run(["sha256sum", "-c", "--quiet", "MANIFEST.sha256"], cwd=root, check=True)
    return root


def has_begun_to_label(root: Path) -> bool:
    return any(path.stat().st_size for path in root.glob("round-001/label/tasks/*/journal-*.jsonl"))


def has_begun_to_train(root: Path) -> bool:
    return any(root.glob("round-001/train/tasks/*/checkpoint-*.pt"))


@pytest.mark.parametrize(
    "moment",
    [pytest.param(moment, marks=pytest.mark.nightly) for moment in (has_begun_to_label, has_begun_to_train)],
)
def test_a_campaign_archived_in_the_middle_of_a_stage_ends_elsewhere_as_if_it_had_never_moved(
    moment: Callable[[Path], bool], finished: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    campaign = write_campaign(there / "in", CHANGES)
    with (tmp_path / "log").open("w") as log:
        manager = hpcft("run", campaign, "--dir", there / "tiny", cwd=there, output=log)
    while not moment(there / "tiny"):
        assert manager.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    kill([manager.pid, *processes_of(there / "tiny")])
    manager.wait()
    while processes_of(there / "tiny"):
        time.sleep(0.02)
    archive = tmp_path / "moving.tar"
    hpcft_to_end("archive", there / "tiny", "--out", archive, cwd=tmp_path)
    products = sorted(path.relative_to(there / "tiny") for path in there.glob("tiny/*/*/product.json"))
    shutil.rmtree(there)

    root = unpacked(archive, tmp_path / "here")
    assert f"{len(products)} finished stages" in hpcft_to_end("verify", archive, cwd=tmp_path)
    assert f"{len(products)} finished stages" in hpcft_to_end("verify", root, cwd=tmp_path)
    assert "tiny: idle, round 1 of 1" in hpcft_to_end("status", root, cwd=tmp_path)
    assert "foundation" in hpcft_to_end("report", root, cwd=tmp_path)
    before = {path: (root / path).read_bytes() for path in products}
    hpcft_to_end("resume", root, cwd=tmp_path)
    assert {path: (root / path).read_bytes() for path in products} == before
    assert_same_results(finished, root)
    assert "all is well" in hpcft_to_end("verify", root, cwd=tmp_path)


def test_what_a_finished_campaign_holds_can_be_read_where_its_archive_was_unpacked(
    finished: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "tiny.tar"
    copy = shutil.copytree(finished, tmp_path / "copy" / "tiny")
    hpcft_to_end("archive", copy, "--out", archive, cwd=tmp_path)
    table = hpcft_to_end("report", copy, cwd=tmp_path).splitlines()[:-1]
    shutil.rmtree(copy)
    root = unpacked(archive, tmp_path / "here")
    assert "tiny: finished" in hpcft_to_end("status", root, cwd=tmp_path)
    assert hpcft_to_end("report", root, cwd=tmp_path).splitlines()[:-1] == table
    for path in sorted(root.glob("round-*/*/tasks/*/*.h5")):
        assert str(path) in hpcft_to_end("inspect", path, cwd=tmp_path).replace("\n", "")
        break  # each takes a second, and verify has read them all
    model = root / "round-001/train/tasks/0000/model.pt"
    assert "morse" in hpcft_to_end("model", "info", model, cwd=tmp_path)
    store = LabelStore(root / "label-store")
    keys = set().union(*store.listed().values())
    assert keys
    assert store.find(keys).keys() == keys
    hpcft_to_end("resume", root, cwd=tmp_path)
    assert_same_results(finished, root)


def test_without_its_trajectories_a_finished_campaign_is_small_and_still_whole(
    finished: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "small.tar"
    said = hpcft_to_end("archive", finished, "--out", archive, "--without", "trajectories", cwd=tmp_path)
    left_out = len(list(finished.glob("round-*/*/tasks/*/trajectory.h5")))
    assert f"{left_out} trajectories left out" in said
    root = unpacked(archive, tmp_path / "here")
    assert not list(root.rglob("trajectory.h5"))
    for what in (archive, root):
        assert f"{left_out} trajectories left out" in hpcft_to_end("verify", what, cwd=tmp_path)
    assert "tiny: finished" in hpcft_to_end("status", root, cwd=tmp_path)


def kinds_of_files(root: Path) -> dict[str, Path]:
    """One sealed, packed or parsed file of every kind that a campaign has."""
    return {
        f"{path.parent.name if path.parent.name == 'inputs' else ''}{path.name}": path
        for path in sorted(root.rglob("*"))
        if path.suffix in (".h5", ".pt", ".zip") and path.is_file()
    }


def test_one_flipped_bit_in_a_file_of_any_kind_is_found_with_its_name(finished: Path, tmp_path: Path) -> None:
    from hpcft.campaign.verify import verify_campaign
    from hpcft.storage.campaign_folder import CampaignFolder

    root = shutil.copytree(finished, tmp_path / "tiny")
    folder = CampaignFolder(root)
    assert not verify_campaign(folder).problems
    files = kinds_of_files(root)
    assert {"model.pt", "labels.h5", "history.zip", "inputsfoundation.pt"} < files.keys()
    for path in files.values():
        content = path.read_bytes()
        for place in (len(content) // 3, len(content) // 2, len(content) - len(content) // 7):
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            damaged = {problem.file for problem in verify_campaign(folder).problems}
            if (
                path.suffix != ".zip"
            ):  # whose directory may have a bit that says nothing, such as a file's time
                assert damaged == {path.relative_to(root).as_posix()}, (path, place)
        path.write_bytes(content)
    assert not verify_campaign(folder).problems

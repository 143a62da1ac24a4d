"""A campaign folder that others can write is refused: jobs load submitit's pickles from it, and a pickle is code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcft.campaign.create import open_or_create
from hpcft.campaign.new_folder import refuse_shared
from hpcft.config.campaign import load_campaign
from hpcft.errors import UserError
from hpcft.storage.campaign_folder import CampaignFolder

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import write_campaign

HPCFT = str(Path(sys.executable).with_name("hpcft"))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_campaign(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def folder(file: Path, tmp_path: Path) -> CampaignFolder:
    return open_or_create(load_campaign(file), file, tmp_path / "tiny")


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o720, 0o702, 0o1777])
def test_a_folder_that_group_or_others_can_write_is_refused_with_the_remedy(
    mode: int, file: Path, folder: CampaignFolder
) -> None:
    folder.root.chmod(mode)
    with pytest.raises(UserError, match="can be written by others") as caught:
        open_or_create(load_campaign(file), file, folder.root)
    remedy = str(caught.value).split("do: ")[1]
    subprocess.run(remedy.split(), check=True)
    assert open_or_create(load_campaign(file), file, folder.root) == folder


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o750, 0o711])
def test_a_folder_that_others_can_only_read_is_taken(mode: int, folder: CampaignFolder) -> None:
    folder.root.chmod(mode)
    refuse_shared(folder.root)


def test_a_link_is_judged_by_the_folder_that_it_leads_to(
    file: Path, folder: CampaignFolder, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder.root)
    open_or_create(load_campaign(file), file, link)
    folder.root.chmod(0o777)
    with pytest.raises(UserError, match="can be written by others"):
        open_or_create(load_campaign(file), file, link)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(file: Path, folder: CampaignFolder) -> None:
    os.chown(folder.root, 65534, -1)
    with pytest.raises(UserError, match="belongs to another user"):
        open_or_create(load_campaign(file), file, folder.root)


def test_a_new_folder_is_closed_to_others_before_anything_is_in_it(file: Path, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    before = os.umask(0)
    try:
        for name in ("open", "new"):
            folder = open_or_create(load_campaign(file), file, tmp_path / name)
            assert folder.root.stat().st_mode & 0o7777 == 0o755
    finally:
        os.umask(before)


@pytest.mark.parametrize("command", ["resume", "run"])
def test_the_command_line_refuses_a_shared_folder_and_touches_nothing(
    command: str, file: Path, folder: CampaignFolder
) -> None:
    folder.root.chmod(0o777)
    before = sorted(folder.root.rglob("*"))
    arguments = [folder.root] if command == "resume" else [file, "--dir", folder.root]
    done = subprocess.run([HPCFT, command, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"hpcft: {folder.root} can be written by others, who could run code as you; do: chmod go-w {folder.root}\n"
    )
    assert sorted(folder.root.rglob("*")) == before

"""The commands that drive a campaign and those that look at one, as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
from ase.build import bulk

from hpcft.campaign.decide import Collect, Observation
from hpcft.campaign.manager import Turn
from hpcft.campaign.records import read_records
from hpcft.cli.progress import Progress
from hpcft.storage.atomic import write_json
from hpcft.storage.campaign_folder import CampaignFolder, stages_of
from hpcft.storage.structures import write_structures

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import processes_of, write_campaign

HPCFT = str(Path(sys.executable).with_name("hpcft"))
METRICS = {
    "energy_bias_meV_per_atom": {"value": -12.5, "low": -20.0, "high": -5.0},
    "delta_q": {"value": 1.5, "low": float("nan"), "high": float("nan")},
}
PRODUCTS: dict[str, Any] = {
    "label": {"items": 10, "done": 9, "failed": 1, "relaxations": 2, "frames_done": 7},
    "reference": {"items": 4, "done": 4, "failed": 0, "relaxations": 0, "frames_done": 4},
    "probe": {"frames": 4, "stopped": {"3": "exploded"}},
    "evaluate": {"metrics": METRICS},
}


def hpcft(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HPCFT, *map(str, arguments)], capture_output=True, text=True, check=False, **options
    )


def strict_json(text: str) -> Any:
    """As any parser reads it: NaN and Infinity are not JSON."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> CampaignFolder:
    """A campaign of which round 0 is evaluated."""
    folder = CampaignFolder(tmp_path_factory.mktemp("measured") / "small")
    folder.root.mkdir()
    config = {"evaluate": {"confidence": 0.9}}
    write_json(folder.identity, {"name": "small", "rounds": 1, "config": config})
    for name in stages_of(0):
        folder.stage(0, name).path.mkdir(parents=True)
        write_json(folder.stage(0, name).plan, {"tasks": [{}]})
        write_json(folder.stage(0, name).product, {**PRODUCTS[name], "tasks": 1})
    return folder


def test_status_shows_where_a_campaign_stands_and_its_results(measured: CampaignFolder) -> None:
    done = hpcft("status", measured.root)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == (
        "small: idle, round 1 of 1, stage explore, not planned yet; no manager is at work here: "
        f"hpcft resume {measured.root}"
    )
    [row] = [line for line in lines if "foundation" in line]
    assert "-12.5 [-20.0, -5.0]" in row
    assert " 1.50 " in row
    assert "0 + 4" in row
    assert "90% confidence interval" in done.stdout


def test_status_as_json_is_one_strict_object(measured: CampaignFolder) -> None:
    done = hpcft("status", "small", "--json", cwd=measured.root.parent)
    assert (done.returncode, done.stderr) == (0, "")
    state = strict_json(done.stdout)
    assert (state["name"], state["state"], state["round"], state["stage"]) == ("small", "idle", 1, "explore")
    assert state["folder"] == str(measured.root)
    [result] = state["results"]
    assert result["metrics"]["delta_q"] == {"value": 1.5, "low": None, "high": None}


LOADED = """
import atexit, sys
heavy = {"torch", "ase", "h5py", "numpy", "matplotlib", "mace", "e3nn", "submitit", "scipy", "yaml"}
atexit.register(lambda: print(*sorted(heavy & sys.modules.keys()), file=sys.stderr))
from hpcft.cli.main import main
main()
"""


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_status_loads_nothing_heavy(options: list[str], measured: CampaignFolder) -> None:
    argv = [sys.executable, "-c", LOADED, "status", str(measured.root), *options]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == "\n"


def test_a_round_that_is_evaluated_is_shown_alone_and_by_its_name(
    measured: CampaignFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(round_: int) -> str:
        turn = Turn(read_records(measured), Observation(), (Collect(round_, "evaluate"),))
        Progress(measured).show(turn)
        return capsys.readouterr().out

    assert "foundation: energy bias -12.5 [-20.0, -5.0] meV/atom" in shown(0)
    assert "foundation" not in shown(1)


def test_a_rewind_to_a_round_that_does_not_exist_is_refused_before_it_asks(measured: CampaignFolder) -> None:
    done = hpcft("rewind", measured.root, "--round", 7, "--stage", "train", stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "hpcft: round 7 has no stage train; the last round is 1\n"


def test_report_writes_the_figure_of_the_rounds_so_far(measured: CampaignFolder) -> None:
    done = hpcft("report", "small", cwd=measured.root.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert "foundation" in done.stdout
    assert done.stdout.splitlines()[-1] == "figure: small/report/bias.png"
    assert (measured.report / "bias.png").read_bytes().startswith(b"\x89PNG")


def test_status_of_a_finished_campaign_names_its_model_and_figure(
    measured: CampaignFolder, tmp_path: Path
) -> None:
    folder = CampaignFolder(tmp_path / "small")
    shutil.copytree(measured.root, folder.root)
    assert "model:" not in hpcft("status", "small", cwd=tmp_path).stdout
    for name in stages_of(1):
        folder.stage(1, name).path.mkdir(parents=True)
        write_json(folder.stage(1, name).plan, {"tasks": [{}]})
        write_json(folder.stage(1, name).product, {**PRODUCTS.get(name, {}), "tasks": 1})
    hpcft("report", "small", cwd=tmp_path)
    said = hpcft("status", "small", cwd=tmp_path).stdout.splitlines()
    assert said[-2:] == [
        "figure: small/report/bias.png",
        "model:  small/round-001/train/tasks/0000/model.pt",
    ]


def test_inspect_as_json_is_one_strict_object(tmp_path: Path) -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.info["REF_energy"] = float("nan")
    write_structures(tmp_path / "labels.h5", [atoms], {"campaign": "small"})
    done = hpcft("inspect", "labels.h5", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report = strict_json(done.stdout)
    assert (report["path"], report["kind"]) == ("labels.h5", "structures")
    assert report["provenance"] == {"campaign": "small"}
    assert report["structures"]["elements"] == ["Cu"]


def test_a_reader_that_goes_away_leaves_no_traceback(measured: CampaignFolder) -> None:
    argv = [HPCFT, "status", str(measured.root), "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def interrupt(base: Path, end: Callable[[int], None]) -> subprocess.CompletedProcess[str]:
    """A campaign that was started with a lax umask in `base`/tiny, and ended by `end(pid)` while its first tasks ran."""
    file = write_campaign(base / "inputs")
    stage = CampaignFolder(base / "tiny").stage(0, "probe")
    argv, pipe = [HPCFT, "run", str(file), "--dir", "tiny"], subprocess.PIPE
    with subprocess.Popen(
        argv, cwd=base, stdout=pipe, stderr=pipe, text=True, umask=0, start_new_session=True
    ) as process:
        while process.poll() is None and not (stage.submitted(1).exists() and stage.task(0).lock.exists()):
            time.sleep(0.02)
        end(process.pid)
        output, complaint = process.communicate()
    return subprocess.CompletedProcess(argv, process.returncode, output, complaint)


def end_processes_of(folder: CampaignFolder) -> None:
    for pid in processes_of(folder.root):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def interrupted(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[CampaignFolder, subprocess.CompletedProcess[str]]]:
    """A campaign that was stopped with Ctrl-C while its first tasks ran."""
    base = tmp_path_factory.mktemp("interrupted")
    done = interrupt(base, lambda pid: os.killpg(pid, signal.SIGINT))  # as a terminal does
    yield CampaignFolder(base / "tiny"), done
    end_processes_of(CampaignFolder(base / "tiny"))


Interrupted = tuple[CampaignFolder, subprocess.CompletedProcess[str]]


def living(folder: CampaignFolder) -> list[int]:
    pids = processes_of(folder.root)
    return [pid for pid in pids if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_ctrl_c_ends_the_tasks_of_this_machine_and_says_how_to_go_on(interrupted: Interrupted) -> None:
    folder, done = interrupted
    assert done.returncode == 130
    assert done.stderr.strip() == "Interrupted; everything finished is kept. Go on with: hpcft resume tiny"
    assert done.stdout.startswith("campaign tiny in ")
    assert living(folder) == []
    results = [folder.stage(0, "probe").task(task).result for task in (0, 1)]
    assert not any(result.exists() for result in results), "the tasks have come to their end instead"


def test_sigterm_ends_a_run_as_ctrl_c_does(tmp_path: Path) -> None:
    folder = CampaignFolder(tmp_path / "tiny")
    try:
        done = interrupt(tmp_path, lambda pid: os.kill(pid, signal.SIGTERM))
        assert done.returncode == 143
        assert (
            done.stderr.strip() == "Interrupted; everything finished is kept. Go on with: hpcft resume tiny"
        )
        assert living(folder) == []
        stage = read_records(folder).current
        assert stage is not None
        assert stage.resumed_after == stage.attempts[-1].number
    finally:
        end_processes_of(folder)


def test_what_ctrl_c_has_ended_is_no_failed_attempt(interrupted: Interrupted) -> None:
    folder, _ = interrupted
    stage = read_records(folder).current
    assert stage is not None
    assert [attempt.tasks for attempt in stage.attempts] == [(0, 1)]
    assert stage.resumed_after == stage.attempts[-1].number
    assert strict_json(hpcft("status", folder.root, "--json").stdout)["state"] == "idle"


def test_nobody_else_may_write_what_a_campaign_makes_whatever_the_umask(interrupted: Interrupted) -> None:
    """Jobs load pickles from below the folder (fault 29): closing its root would not do with a lax umask."""
    folder, _ = interrupted
    made = [folder.root, *folder.root.rglob("*")]
    assert [path for path in made if path.name.endswith("-jobs")]
    assert [path for path in made if path.suffix == ".pkl"]
    lax = [path for path in made if path.lstat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)]
    assert lax == []


def test_cancel_refuses_while_a_manager_would_submit_the_tasks_again(interrupted: Interrupted) -> None:
    folder, _ = interrupted
    hold = (
        "import sys; from pathlib import Path; from hpcft.campaign.lease import lease\n"
        "with lease(Path(sys.argv[1])): print('held', flush=True); input()"
    )
    argv, pipe = [sys.executable, "-c", hold, str(folder.leases)], subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as manager:
        assert manager.stdout is not None
        assert manager.stdout.readline() == "held\n"
        done = hpcft("cancel", folder.root)
        manager.communicate("\n")
    assert done.returncode == 3
    assert done.stderr.startswith(f"hpcft: process {manager.pid} on ")
    assert done.stderr.count("\n") == 1
    done = hpcft("cancel", folder.root)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"0 jobs cancelled. Go on with: hpcft resume {folder.root}\n"

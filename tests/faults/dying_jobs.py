"""A campaign's first stages on a real Slurm, whose jobs die in many ways while a manager inside the test drives them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from slurm_campaign import command
from tiny import arrays_of, write_campaign

TESTS = Path(__file__).parents[1]
DEADLINE_S = 300
NUM_SEGMENTS = 6  # of the probe of round 0
NUM_LABELS = 8  # of the reference stage of round 0

# Its probe runs for a second in six segments of five frames, its reference labels 8 frames.
CHANGES: dict[str, Any] = {
    "rounds": 1,
    "reference": {"calculator": "calculators.ObedientEMT", "time_limit_s": 3600},
    "label": {"shards": 1, "resources": {"time_min": 5}},
    "relaxations": {},
    "train": {"epochs": 1, "batch_size": 2},
    "probe": {"tasks": 1, "steps": 300, "frames": 2, "resources": {"time_min": 5}},
    "explore": {
        "temperature_K": 600,
        "timestep": 1,
        "steps": 10,
        "frame_every": 10,
        "segment_frames": 5,
    },
    "max_attempts": 1,
}


@dataclass
class Disturbed:
    """A campaign in the stage that a test disturbs, and the manager that drives it. `orders` is what ObedientEMT obeys."""

    root: Path
    stage: str
    orders: Path
    calls: Path
    site: Any
    manager: Any = None

    @property
    def folder(self) -> Any:
        from hpcft.storage.campaign_folder import CampaignFolder

        return CampaignFolder(self.root)

    @property
    def here(self) -> Any:
        return self.folder.stage(0, self.stage)

    def order(self, text: str) -> None:
        """In one go, for the calculator reads it all the time."""
        new = self.orders.with_suffix(".new")
        new.write_text(text)
        new.replace(self.orders)

    def labels_paid(self) -> list[str]:
        """Energies of all finished calculations, in the order in which they were paid for."""
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    @contextlib.contextmanager
    def managed(self) -> Iterator[None]:
        """The lease and a manager, as `hpcft resume` would have them."""
        from hpcft.cli.drive import managing

        with managing(self.folder, self.site, False, resumed=False) as manager:
            self.manager = manager
            yield

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Turn after turn of the manager, until the condition holds; the deadline is one that only a hang reaches."""
        end = time.monotonic() + DEADLINE_S
        while not condition():
            self.manager.step()
            if time.monotonic() > end:
                queue, history = command("squeue", "-l"), command("sacct", "-D")
                pytest.fail(f"not so after {DEADLINE_S} s: {what}\n{queue}\n{history}")
            time.sleep(0.2)

    def until_finished(self) -> None:
        self.until(self.here.product.exists, f"stage {self.stage} is finished")

    def until_labels_wait(self, count: int) -> None:
        """The reference's task has `count` labels in its journal and is at work on the next one, which waits."""
        self.until(lambda: self.is_running() and len(self.journal()) >= count, f"{count} labels are done")

    def until_stopped_in_md(self) -> int:
        """The probe's process stands still between two segments, or within one, after at least two; returns its pid.

        A process that SIGSTOP has stopped is one that the fault hits in mid-run, however quick the machine is.
        """
        self.until(self.runs, "the probe has begun")
        pid = int(self.mark(1)["pid"])
        end = time.monotonic() + DEADLINE_S
        while len(self.segments()) < 2:
            assert time.monotonic() < end and not has_ended(pid), "the probe has committed no segment"
            time.sleep(0.005)
        os.kill(pid, signal.SIGSTOP)
        assert not self.here.task(0).result.exists() and len(self.segments()) < NUM_SEGMENTS
        return pid

    def segments(self) -> dict[str, tuple[int, int]]:
        """Committed segments of task 0, and what would change were one written again: inode and time."""
        found = {}
        for path in sorted(self.here.task(0).path.glob("segment-*.h5")):
            with contextlib.suppress(FileNotFoundError):
                found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
        return found

    def journal(self, task: int = 0) -> dict[int, Any]:
        """What a label task has finished, by item."""
        from hpcft.labelling.journal import read_journals

        path = self.here.task(task).path
        return read_journals(path) if path.exists() else {}

    def job(self, attempt: int = 1, task: int = 0) -> str:
        """Id of the job that Slurm was given for an attempt, once it is recorded."""
        return str(json.loads(self.here.submitted(attempt).read_text())["job_ids"][str(task)])

    def job_state(self, attempt: int = 1) -> str:
        return command("squeue", "-h", "--states=all", "-o", "%T", "-j", self.job(attempt))

    def is_running(self) -> bool:
        newest = len(self.here.intents())
        return self.here.submitted(newest).exists() and self.job_state(newest) == "RUNNING"

    def mark(self, execution: int, task: int = 0) -> dict[str, Any]:
        """What an execution of a task has said of itself when it began."""
        return dict(json.loads(self.here.task(task).run(execution).read_text()))

    def ends(self, task: int = 0) -> list[dict[str, Any]]:
        """Recorded endings of attempts at a task, oldest first."""
        found = [record["tasks"].get(str(task)) for record in self._all(".json", "ended-")]
        return [ending for ending in found if ending is not None]

    def intents(self) -> list[dict[str, Any]]:
        """What each attempt wanted, oldest first."""
        return self._all("-intent.json")

    def runs(self, task: int = 0) -> list[dict[str, Any]]:
        """The marks of all executions of a task."""
        return self._all(".json", f"{task:04d}.run-")

    def result(self, task: int = 0) -> dict[str, Any]:
        return dict(self.here.read_results()[task])

    def _all(self, end: str, start: str = "") -> list[dict[str, Any]]:
        found: dict[str, Any] = {}
        for folder in (self.here.attempts, self.here.outcomes):
            for path in folder.glob(f"{start}*{end}") if folder.exists() else ():
                found[path.name] = json.loads(path.read_text())
        if self.here.history.exists():
            with zipfile.ZipFile(self.here.history) as archive:
                for name in map(Path, archive.namelist()):
                    if name.name.startswith(start) and name.name.endswith(end):
                        found.setdefault(name.name, json.loads(archive.read(str(name))))
        return [found[name] for name in sorted(found)]


def assert_same_data(a: Path, b: Path, stage: str, *, but_for: str = "-") -> None:
    """Same trajectories, frames and labels in round 0's `stage` of two campaign folders, bit for bit."""
    where = Path("round-000") / stage / "tasks"
    files = sorted(path.relative_to(a) for path in (a / where).glob("*/*.h5"))
    assert files and files == sorted(path.relative_to(b) for path in (b / where).glob("*/*.h5"))
    for name in files:
        left, right = arrays_of(a / name), arrays_of(b / name)
        assert left.keys() == right.keys(), name
        for key, value in left.items():
            if key.endswith(but_for):
                continue
            equal = np.array_equal(value, right[key], equal_nan=value.dtype.kind == "f")
            assert equal, f"{name}: {key} differs"


def hpcft(*arguments: object) -> str:
    """The output of a command that must succeed."""
    from typer.testing import CliRunner

    from hpcft.cli.main import app

    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (arguments, done.output, done.exception)
    return done.output


def has_ended(pid: int) -> bool:
    """Whether a process runs no more; a zombie has stopped running."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The campaign as it stands before each stage of round 0 (and at its `end`), with nothing gone wrong."""
    return _run_undisturbed(tmp_path_factory.mktemp("undisturbed"), CHANGES)


@pytest.fixture(scope="session")
def undisturbed_in_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same with two tasks in each stage."""
    changes = {name: {**CHANGES[name], key: 2} for name, key in (("probe", "tasks"), ("label", "shards"))}
    return _run_undisturbed(tmp_path_factory.mktemp("undisturbed"), {**CHANGES, **changes})


def _run_undisturbed(base: Path, changes: Mapping[str, Any]) -> dict[str, Path]:
    from hpcft.campaign.create import open_or_create
    from hpcft.config.campaign import load_campaign

    file = write_campaign(base / "inputs", changes)
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("HPCFT_TEST_CALLS", str(base / "calls"))
        patch.setenv("HPCFT_TEST_ORDERS", str(base / "orders"))
        (base / "orders").write_text("go")
        folder = open_or_create(load_campaign(file), file, base / "campaign")
        stages: dict[str, Path] = {}
        for stage in ("probe", "reference"):
            stages[stage] = base / f"before-{stage}"
            shutil.copytree(folder.root, stages[stage])
            _run_here(folder, stage)
    return {**stages, "end": folder.root}


def _run_here(folder: Any, stage: str) -> None:
    """Plan, run and collect a stage of round 0 in this process."""
    from hpcft.campaign.worker import run_task
    from hpcft.cli.drive import managing
    from hpcft.config.site import default_site

    with managing(folder, default_site(), False, resumed=False) as manager:
        manager.step()
        where = folder.stage(0, stage)
        tasks = list(range(len(json.loads(where.plan.read_text())["tasks"])))
        intent = {"attempt": 1, "tasks": tasks, "job_name": "none", "at": 0.0, "needs": {}}
        where.intent(1).write_text(json.dumps({**intent, "tasks_per_job": 1}))
        for task in tasks:
            assert run_task(str(folder.root), 0, stage, task, 1) == "done"
        manager.step()
        assert where.product.exists()


@pytest.fixture
def disturb(
    slurm_cluster: Any, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Disturbed]]:
    """Make a copy of the campaign as it stands before a stage of round 0, on the session's cluster."""
    yield from disturbing(slurm_cluster, request, tmp_path, monkeypatch)


def disturbing(
    cluster: Any, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Disturbed]]:
    """As `disturb`, on any cluster. What is left of the jobs is cancelled in the end."""
    for name, value in cluster.environment().items():
        monkeypatch.setenv(name, value)
    # On one host a result is there before its job is gone.
    monkeypatch.setattr("hpcft.campaign.decide.GONE_S", 0.0)
    made: list[Disturbed] = []

    def make(
        stage: str,
        *,
        tasks: int = 1,
        config: Mapping[str, Any] | None = None,
        site: Mapping[str, Any] | None = None,
        **slurm: Any,
    ) -> Disturbed:
        before = request.getfixturevalue("undisturbed" if tasks == 1 else "undisturbed_in_two")
        root = tmp_path / f"campaign-{len(made)}"
        shutil.copytree(before[stage], root)
        identity = json.loads((root / "campaign.json").read_text())
        identity["id"] = secrets.token_hex(4)  # by which its jobs are told from those of another copy
        _update(identity["config"], config or {})
        (root / "campaign.json").write_text(json.dumps(identity))
        case = Disturbed(root, stage, tmp_path / "orders", tmp_path / "calls", _site(site or {}, slurm))
        case.order("go")
        monkeypatch.setenv("HPCFT_TEST_ORDERS", str(case.orders))
        monkeypatch.setenv("HPCFT_TEST_CALLS", str(case.calls))
        made.append(case)
        return case

    yield make
    for case in made:
        name = json.loads((case.root / "campaign.json").read_text())["id"]
        queue = command("squeue", "--me", "-h", "-o", "%A %j").splitlines()
        jobs = [line.split()[0] for line in queue if f"hpcft-{name}-" in line]
        if jobs:
            command("scancel", *jobs)


def _update(config: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping):
            _update(config[key], value)
        else:
            config[key] = value


def _site(site: Mapping[str, Any], slurm: Mapping[str, Any]) -> Any:
    from hpcft.config.site import Site

    content = {"name": "dying-jobs", "executor": "slurm", "device": "cpu", "poll_s": 0.5, **site}
    return Site.model_validate({**content, "slurm": {"partition": "cpu", **slurm}})


@contextlib.contextmanager
def hogging(node: str) -> Iterator[str]:
    """A job of the higher tier has, or wants, the whole of a node; yields its id."""
    wish = ["--partition=cpu", f"--nodelist={node}", "--exclusive", "--time=5", "--output=/dev/null"]
    job = command("sbatch", "--parsable", "--job-name=hog", *wish, "--wrap=sleep 600")
    try:
        yield job
    finally:
        command("scancel", job)


@contextlib.contextmanager
def losing(cluster: Any, node: str, *, crash: bool) -> Iterator[None]:
    """The node is lost, with its job steps or (`crash=False`) without them, and comes back afterwards.

    That Slurm finds out by itself takes it 20 s (SlurmdTimeout): here somebody tells it.
    """
    how = ["--crash"] if crash else []
    command(str(TESTS / "slurm" / "cluster" / "down"), *how, str(cluster.folder), node)
    command("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
    try:
        yield
    finally:
        cluster.up()


@contextlib.contextmanager
def partition_with(name: str, **settings: str) -> Iterator[None]:
    """A partition whose settings are other ones for a while."""
    text = command("scontrol", "--oneliner", "show", "partition", name)
    before = dict(word.split("=", 1) for word in text.split() if "=" in word)
    command("scontrol", "update", f"PartitionName={name}", *(f"{k}={v}" for k, v in settings.items()))
    try:
        yield
    finally:
        command("scontrol", "update", f"PartitionName={name}", *(f"{k}={before[k]}" for k in settings))

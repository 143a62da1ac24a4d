"""A campaign that stands before round 0's reference stage, and that a test drives turn by turn on a real Slurm.

The stage has two tasks and eight labels, needs no torch, and each of its calculations is written down when it is paid for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import history_of, write_campaign

from hpcft.campaign.decide import Wait
from hpcft.campaign.manager import Manager, Turn
from hpcft.cli.drive import managing
from hpcft.config.site import Site, default_site
from hpcft.storage.campaign_folder import CampaignFolder, StageFolder

HERE, TESTS = Path(__file__).parent, Path(__file__).parents[1]
DEADLINE_S = 300
NUM_TASKS, NUM_LABELS = 2, 8

CHANGES: dict[str, Any] = {
    "rounds": 1,
    "reference": {"calculator": "calculators.CountingEMT", "elements": ["Cu"], "time_limit_s": 60},
    "label": {"shards": NUM_TASKS},
    "relaxations": {},
    "train": {"epochs": 1, "batch_size": 2},
    "probe": {"tasks": 1, "steps": 12, "frames": NUM_LABELS // 4},
    "max_attempts": 3,
}
# Jobs of work wait while there is a file `gate`, and fail without a word while there is one `fails-ELEMENT`.
_SETUP = (
    '[[ "$SLURM_JOB_NAME" == *controller* ]] || while [ -e {base}/gate ]; do sleep 0.1; done',
    '[ ! -e "{base}/fails-${{SLURM_ARRAY_TASK_ID:-single}}" ] || exit 7',
)


def command(*argv: str) -> str:
    """What a command prints; when it fails, an AssertionError with its own words."""
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{argv} exited with {done.returncode}: {done.stderr}"
    return done.stdout.strip()


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Return once the condition holds; the deadline is one that only a hang reaches."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"not so after {deadline_s} s: {what}\n{_queue()}")
        time.sleep(0.2)


def _queue() -> str:
    done = subprocess.run(["squeue", "-l", "--states=all"], check=False, capture_output=True, text=True)
    return done.stdout + done.stderr


@dataclass
class OnSlurm:
    """A copy of the campaign for one test. `base` is the test's own folder, for switches, shims and lists of calls."""

    folder: CampaignFolder
    base: Path
    site: Site
    clock: Callable[[], float] = field(default=time.time)

    @property
    def root(self) -> Path:
        return self.folder.root

    @property
    def here(self) -> StageFolder:
        """The stage that a test disturbs."""
        return self.folder.stage(0, "reference")

    @property
    def prefix(self) -> str:
        """What the names of this campaign's jobs begin with."""
        return f"hpcft-{self.folder.read_identity()['id']}-"

    @contextlib.contextmanager
    def managed(self, *, resumed: bool = False) -> Iterator[Manager]:
        """The lease and a manager, as `hpcft resume` has them."""
        with managing(self.folder, self.site, False, resumed=resumed) as manager:
            manager._clock = self._now
            yield manager

    def _now(self) -> float:
        return self.clock()

    def step_until(self, manager: Manager, condition: Callable[[], object], what: str) -> list[Turn]:
        """Turn after turn until the condition holds; the turns."""
        turns: list[Turn] = []

        def holds() -> object:
            return condition() or turns.append(manager.step()) or condition()

        wait_until(holds, what)
        return turns

    def finish_stage(self, manager: Manager | None = None) -> list[Turn]:
        """Drive the stage to its product."""
        if manager is None:
            with self.managed() as manager:
                return self.finish_stage(manager)
        return self.step_until(manager, self.here.product.exists, "the reference stage is finished")

    def submit(self, manager: Manager, attempt: int = 1) -> None:
        """Turns until a submission of the stage is recorded."""
        self.step_until(manager, self.here.submitted(attempt).exists, f"attempt {attempt} is submitted")

    @property
    def gate(self) -> Path:
        return self.base / "gate"

    def fail_element(self, element: int | str, fails: bool = True) -> None:
        """Let the jobs of an array's element (or `single` jobs) fail from now on, or no longer."""
        switch = self.base / f"fails-{element}"
        switch.touch() if fails else switch.unlink()

    def shim(self, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
        """A bash script before the real program in PATH, which it knows as $real; `calls NAME` lists what it was asked."""
        programs = self.base / "bin"
        programs.mkdir(exist_ok=True)
        real = shutil.which(name)
        assert real is not None
        (programs / name).write_text(
            f'#!/bin/bash\nreal={real} base={self.base}\necho "$*" >> "$base/calls-{name}"\n{text}\n'
        )
        (programs / name).chmod(0o755)
        if str(programs) not in os.environ["PATH"].split(os.pathsep):
            monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")

    def calls(self, name: str) -> list[str]:
        """The arguments of each call of a program that has a shim."""
        path = self.base / f"calls-{name}"
        return path.read_text().splitlines() if path.exists() else []

    def jobs(self, stage: str = "", states: str = "all") -> dict[str, tuple[str, str]]:
        """Name and state of this campaign's jobs, by id (an array by element), those that are over included."""
        lines = command(
            "squeue", "--me", "-h", "--array", f"--states={states}", "-o", "%i|%j|%T"
        ).splitlines()
        found = {line.split("|")[0]: (line.split("|")[1], line.split("|")[2]) for line in lines}
        return {job: known for job, known in found.items() if known[0].startswith(self.prefix + stage)}

    def arrays(self, stage: str = "r0-reference-") -> dict[str, str]:
        """Name of each submission of the stage that has reached Slurm, by the id of the job or array."""
        return {job.partition("_")[0]: name for job, (name, _) in self.jobs(stage).items()}

    def job_ids(self, attempt: int = 1) -> dict[int, str]:
        """The recorded job of each task."""
        recorded = history_of(self.root)[str(self.here.submitted(attempt).relative_to(self.root))]
        return {int(task): str(job) for task, job in recorded["job_ids"].items()}

    def records(self, pattern: str) -> list[dict[str, Any]]:
        """The stage's records whose file name matches, oldest first, whether or not they are packed by now."""
        found = history_of(self.root, "round-000/reference")
        return [found[name] for name in sorted(found) if re.search(pattern, name)]

    def endings(self) -> dict[tuple[int, int], str]:
        """How attempts ended that left no result: the cause, by task and attempt."""
        return {
            (int(task), int(ending["attempt"])): str(ending["cause"])
            for record in self.records(r"/ended-\d+\.json$")
            for task, ending in record["tasks"].items()
        }

    def executions(self) -> dict[int, int]:
        """How often each task has begun to run."""
        found = history_of(self.root, "round-000/reference")
        tasks = [int(m[1]) for name in found if (m := re.search(r"/(\d+)\.run-\d+\.json$", name))]
        return {task: tasks.count(task) for task in sorted(set(tasks))}

    def paid(self) -> list[float]:
        """Energies of all calculations that were paid for."""
        path = self.base / "calls"
        return sorted(_energies(path)) if path.exists() else []

    def assert_undisturbed(self) -> None:
        """The finished stage holds the data of one that nothing has disturbed; no task ran twice, no label was paid twice."""
        expected = _template().labels
        assert self.here.product.exists()
        assert self.executions() == dict.fromkeys(range(_num_tasks(self.here)), 1)
        assert self.paid() == sorted(_energies(_template().calls))
        labels = labels_of(self.folder)
        assert labels.keys() == expected.keys()
        for number, values in expected.items():
            for name, value in values.items():
                assert np.array_equal(labels[number][name], value), f"label {number}: {name} differs"

    def cancel_jobs(self) -> None:
        jobs = [
            job for job, (_, state) in self.jobs().items() if state in ("PENDING", "RUNNING", "SUSPENDED")
        ]
        if jobs:
            command("scancel", *jobs)


def _energies(path: Path) -> list[float]:
    return [float(line.removeprefix("np.float64(").rstrip(")")) for line in path.read_text().split()]


def _num_tasks(stage: StageFolder) -> int:
    return len(json.loads(stage.plan.read_text())["tasks"])


def is_waiting(turn: Turn) -> bool:
    """Nothing but waiting came of this turn."""
    return all(isinstance(action, Wait) for action in turn.actions)


def labels_of(folder: CampaignFolder) -> dict[int, dict[str, Any]]:
    """Positions, energy and forces of each labelled frame by its number, however they were shared out."""
    from hpcft.campaign.settings import settings_of
    from hpcft.stages.context import StageContext
    from hpcft.stages.labels import label_outcomes

    found = label_outcomes(StageContext(folder, settings_of(folder), 0, "reference"), "reference")
    return {
        number: {
            "positions": atoms.positions,
            "energy": atoms.info["REF_energy"],
            "forces": atoms.arrays["REF_forces"],
        }
        for number, atoms in found.items()
    }


@dataclass(frozen=True)
class Template:
    root: Path
    labels: dict[int, dict[str, Any]]
    calls: Path


@functools.cache
def _template() -> Template:
    """The campaign before its reference stage, and what that stage gives on this machine with nothing gone wrong."""
    from hpcft.campaign.create import open_or_create
    from hpcft.config.campaign import load_campaign

    base = Path(tempfile.mkdtemp(prefix="hpcft-faults-"))
    file = write_campaign(base / "inputs", CHANGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPCFT_TEST_CALLS", str(base / "calls"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
        folder = open_or_create(load_campaign(file), file, base / "campaign")
        _run_here(folder, "probe")
        shutil.copytree(folder.root, base / "template")
        _run_here(folder, "reference")
    return Template(base / "template", labels_of(folder), base / "calls")


def _run_here(folder: CampaignFolder, stage: str) -> None:
    """Plan a stage of round 0, run its tasks in this process, collect it."""
    from hpcft.campaign.tidy import tidy
    from hpcft.campaign.worker import run_task

    where = folder.stage(0, stage)
    with managing(folder, default_site(), False, resumed=False) as manager:
        manager.step()
        tasks = list(range(_num_tasks(where)))
        intent = {"attempt": 1, "tasks": tasks, "job_name": "none", "at": 0.0, "needs": {}}
        where.intent(1).write_text(json.dumps(intent))
        for task in tasks:
            assert run_task(str(folder.root), 0, stage, task, 1) == "done"
        manager.step()
        tidy(where)
    assert where.product.exists()


def site_for(base: Path, changes: Mapping[str, Any] | None = None) -> Site:
    """The test cluster, with switches in `base`; partition gpu, where nothing else runs."""
    content: dict[str, Any] = {
        "name": "faults",
        "executor": "slurm",
        "device": "cpu",
        "poll_s": 0.5,
        "setup": [line.format(base=base) for line in _SETUP],
        "slurm": {"partition": "gpu"},
    }
    return Site.model_validate({**content, **(changes or {})})


MakeCampaign = Callable[..., OnSlurm]


@pytest.fixture
def campaign_on(
    slurm_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MakeCampaign]:
    """As `campaigns_on`, on the session's cluster."""
    with campaigns_on(slurm_cluster, tmp_path, monkeypatch) as make:
        yield make


@contextlib.contextmanager
def campaigns_on(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeCampaign]:
    """Make this test's campaign, with changes of its site; an obedient one's tasks wait while `orders` says so.

    What is left of its jobs is cancelled in the end.
    """
    for name, value in cluster.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HPCFT_TEST_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("HPCFT_TEST_ORDERS", str(tmp_path / "orders"))
    (tmp_path / "orders").write_text("go")
    made: list[OnSlurm] = []

    def make(tasks: int = NUM_TASKS, *, obedient: bool = False, **site: Any) -> OnSlurm:
        root = tmp_path / "campaign"
        shutil.copytree(_template().root, root)
        identity = json.loads((root / "campaign.json").read_text())
        identity["id"] = secrets.token_hex(4)  # tells the jobs of this copy from those of any other
        identity["config"]["label"]["shards"] = tasks
        if obedient:
            identity["config"]["reference"]["calculator"] = "calculators.ObedientEMT"
        (root / "campaign.json").write_text(json.dumps(identity))
        made.append(OnSlurm(CampaignFolder(root), tmp_path, site_for(tmp_path, site)))
        return made[-1]

    yield make
    for campaign in made:
        campaign.gate.unlink(missing_ok=True)
        campaign.cancel_jobs()


@pytest.fixture
def campaign(campaign_on: MakeCampaign) -> OnSlurm:
    """The campaign on the test cluster as it is."""
    return campaign_on()


def _load_slurm_conftest() -> Any:
    """tests/slurm/conftest.py, which is not in sight of this folder's tests."""
    name = "slurm_conftest"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TESTS / "slurm" / "conftest.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


SlurmCluster = _load_slurm_conftest().SlurmCluster


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Any]:
    """As in tests/slurm: that of the shell, or one that ends with the session."""
    yield from _load_slurm_conftest().slurm_cluster.__wrapped__()


def slurmctld_pid() -> int:
    return int((Path(os.environ["HPCFT_SLURM_DIR"]) / "run" / "slurmctld.pid").read_text())


@contextlib.contextmanager
def reconfigured(cluster: Any, *lines: str) -> Iterator[None]:
    """The controller with more lines in its slurm.conf; afterwards as it was."""
    local = cluster.folder / "local.conf"
    before = local.read_text()
    try:
        restart_controller(cluster, before + "".join(f"{line}\n" for line in lines))
        yield
    finally:
        restart_controller(cluster, before)


def restart_controller(cluster: Any, local_conf: str) -> None:
    """With these lines in slurm.conf. (`up` would wait for accounting, which may be off now.)"""
    cluster.down("slurmctld")
    (cluster.folder / "local.conf").write_text(local_conf)
    environment = {**os.environ, **cluster.environment()}
    program = shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin")
    assert program is not None
    subprocess.run([program], env=environment, check=True, stdin=subprocess.DEVNULL)

    def answers() -> bool:
        ping = subprocess.run(["scontrol", "ping"], env=environment, check=False, capture_output=True)
        return ping.returncode == 0

    wait_until(answers, "the controller is up again")


@contextlib.contextmanager
def own_cluster() -> Iterator[Any]:
    """A cluster for tests that would spoil that of the others."""
    cluster = SlurmCluster(Path(tempfile.mkdtemp(prefix="hpcft.", dir="/tmp")))
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(cluster.folder)

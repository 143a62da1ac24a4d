"""What the manager costs: a round of a million items in 10,000 tasks, and the gap between stages on a real Slurm.

    python benchmarks/manager.py [--json] [--without-slurm]

The large round runs against programs on PATH that stand for Slurm, so that submitit, hpcft.cluster and the records do all
that they always do. The gap is that of a tiny campaign on the single-host Slurm of tests/slurm/cluster; beside it, in the
same minutes, jobs that do nothing but start Python and submitit show what of it is Slurm's.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.build import bulk
from rich.console import Console
from rich.table import Table

from hpcft.campaign.decide import RecordEndings, Submit
from hpcft.campaign.lease import lease
from hpcft.campaign.manager import Manager, Turn
from hpcft.campaign.records import read_records
from hpcft.campaign.tidy import tidy
from hpcft.config.campaign import Campaign
from hpcft.config.site import Site
from hpcft.labelling.item import Item
from hpcft.labelling.reference import Reference
from hpcft.labelling.shard import finish_shard
from hpcft.labelling.store import LabelStore
from hpcft.labelling.worker import label_items
from hpcft.stages.context import StageContext
from hpcft.stages.quarantine import find_suspects
from hpcft.stages.registry import stage_named
from hpcft.stages.sharing import numbers_of
from hpcft.storage.atomic import read_json, write_json
from hpcft.storage.campaign_folder import CampaignFolder, StageFolder, stages_of
from hpcft.storage.structures import read_structures, write_structures

REPOSITORY = Path(__file__).parents[1]
ITEMS, TASKS = 1_000_000, 10_000
REPEATS = 5
CAMPAIGN: dict[str, Any] = {
    "name": "large",
    "rounds": 1,
    "foundation": "/nowhere/foundation.pt",
    "structures": "/nowhere/start.extxyz",
    "reference": {"calculator": "ase.calculators.emt.EMT"},
    "explore": {"temperature_K": 300.0, "timestep": 1.0, "steps": 10},
    "train": {"epochs": 1},
    "probe": {"steps": 10, "frames": 1},
}
SITE: dict[str, Any] = {
    "name": "simulated",
    "executor": "slurm",
    "slurm": {
        "partition": "cpu",
        "max_array_size": 1001,
        "max_submitted": 10 * TASKS,
        "max_time_min": 1440,
        "max_memory_GB": 64.0,
    },
}
PROGRAMS = {
    "sbatch": 'n=$(cat next); echo $((n+1)) > next; echo "Submitted batch job $n"',
    # A real one needs some seconds to give up on a controller that is dead.
    "squeue": "test -e down && { sleep 4; echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1; }\n"
    "cat queue",
    "sacct": "test -e down && exit 1\ncat accounting",
    "scontrol": "",
    "scancel": "",
    "srun": "",
}


# ---- the simulated scheduler ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SimulatedSlurm:
    """What the programs on PATH answer from, and the log of what they were asked."""

    folder: Path

    def shows(self, queue: list[str], accounting: list[str] | None = None) -> None:
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in queue))
        (self.folder / "accounting").write_text("".join(f"{line}\n" for line in accounting or []))

    def is_down(self, down: bool) -> None:
        if down:
            (self.folder / "down").touch()
        else:
            (self.folder / "down").unlink(missing_ok=True)

    def calls(self) -> Counter[str]:
        """The programs that ran since the last look."""
        log = self.folder / "log"
        names = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return Counter(names)


@contextlib.contextmanager
def simulated_slurm(folder: Path) -> Iterator[SimulatedSlurm]:
    """Programs that answer at once from prepared files, first on PATH while this lasts."""
    slurm, programs = SimulatedSlurm(folder / "slurm"), folder / "bin"
    for path in (slurm.folder, programs):
        path.mkdir(parents=True)
    for name, answer in PROGRAMS.items():
        home = shlex.quote(str(slurm.folder))
        (programs / name).write_text(f"#!/bin/sh\ncd {home}\necho {name} >> log\n{answer}\n")
        (programs / name).chmod(0o755)
    (slurm.folder / "next").write_text("812")
    slurm.shows([])
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{programs}{os.pathsep}{before}"
    try:
        yield slurm
    finally:
        os.environ["PATH"] = before


# ---- a large round -------------------------------------------------------------------------------------------------


def write_large_campaign(root: Path, items: int, tasks: int) -> CampaignFolder:
    """A campaign whose next stage is label: `items` selected frames, `tasks` shards."""
    folder = CampaignFolder(root)
    folder.inputs.mkdir(parents=True)
    sizes = {"select": {"frames": items}, "label": {"shards": tasks}}
    config = Campaign.model_validate(CAMPAIGN | sizes).model_dump(mode="json")
    write_json(folder.identity, {"id": "0123abcd", "name": "large", "rounds": 1, "config": config})
    done = [(0, name) for name in stages_of(0)] + [(1, "explore"), (1, "select")]
    for round_, name in done:
        where = folder.stage(round_, name)
        where.path.mkdir(parents=True)
        write_json(where.plan, {"tasks": [{}]})
        metrics: dict[str, Any] = {"metrics": {}} if name == "evaluate" else {}
        counts = {"failed": 0, "relaxations": 0, "frames_done": 1, "frames": 1, "stopped": {}}
        write_json(where.product, {"tasks": 1, **counts, **metrics})
    selected = folder.stage(1, "select").task(0).path / "selected.h5"
    selected.parent.mkdir(parents=True)
    write_structures(selected, [bulk("Cu", cubic=True)] * items)
    return folder


def plan_and_submit(root: Path) -> dict[str, float]:
    """Run in a fresh process, so that its peak memory is its own."""
    folder = CampaignFolder(root)
    with lease(folder.leases):
        manager = Manager(folder, Site.model_validate(SITE))
        planned = seconds(manager.step)
        peak = peak_memory_MiB()
        submitted = seconds(manager.step)
    return {
        "plan_seconds_1e6": planned,
        "plan_peak_mib": peak,
        "submit_seconds_1e4": submitted,
        "submit_peak_mib": peak_memory_MiB(),
    }


def peak_memory_MiB() -> float:
    """Of this process alone: ru_maxrss begins with that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def median_seconds(function: Callable[[], Any]) -> float:
    return statistics.median(seconds(function) for _ in range(REPEATS))


@dataclass
class Round:
    """The large round in progress, and what its steps have cost."""

    folder: CampaignFolder
    slurm: SimulatedSlurm
    calls: list[Counter[str]] = field(default_factory=list)

    @property
    def stage(self) -> StageFolder:
        return self.folder.stage(1, "label")

    def jobs(self) -> dict[int, tuple[str, str]]:
        """Job id and name of each task's latest attempt."""
        stage = read_records(self.folder).current
        assert stage is not None and stage.num_tasks
        found = {}
        for task in range(stage.num_tasks):
            attempt = stage.latest_attempt(task)
            assert attempt is not None and attempt.job_ids is not None
            found[task] = (attempt.job_ids[task], attempt.job_name)
        return found

    def step(self, manager: Manager) -> tuple[float, Turn]:
        self.slurm.calls()
        start = time.perf_counter()
        turn = manager.step()
        taken = time.perf_counter() - start
        self.calls.append(self.slurm.calls())
        return taken, turn

    def finish(self, tasks: range, num_items: int) -> None:
        """Results as label tasks leave them, and all the files around them. Not timed, so not flushed to the disk."""
        host = {"host": "n0001", "hpcft_version": "0", "peak_memory_MiB": 300.0}
        counts = {"items": num_items, "done": num_items, "failed": 0, "frames_done": num_items, "causes": {}}
        result = json.dumps({**counts, "wall_s": 1.0, "about": {"attempt": 1, "execution": 1, **host}})
        mark = json.dumps({"attempt": 1, "at": time.time(), "host": "n0001", "pid": 1, "node": "n0001"})
        logs = {task: self.stage.logs(1) / f"{job_id}_0" for task, (job_id, _) in self.jobs().items()}
        for task in tasks:
            where = self.stage.task(task)
            where.path.mkdir(parents=True, exist_ok=True)
            for name in ("lock", "journal-0001.jsonl", "failures.json"):
                (where.path / name).write_text("{}")
            labels, contents = labels_of_a_task(num_items)
            (where.path / "labels.h5").write_bytes(labels)
            keys = [key_of(task * num_items + item) for item in range(num_items)]
            (where.path / "shard.json").write_text(json.dumps({**contents, "labels": keys}, indent=1))
            where.run(1).write_text(mark)
            where.result.write_text(result)
            for suffix in ("log.out", "log.err", "result.pkl"):
                logs[task].with_name(f"{logs[task].name}_{suffix}").write_text("a line of a log\n" * 20)


@functools.lru_cache(maxsize=4)
def labels_of_a_task(num_items: int) -> tuple[bytes, dict[str, Any]]:
    """A task's labels.h5 and shard.json for so many cells: every task's are the same, which is of no account here."""
    items = [Item.single_point(atoms) for atoms in _rattled_copper(num_items)]
    with tempfile.TemporaryDirectory() as folder:
        label_items(items, Reference("ase.calculators.emt.EMT"), Path(folder))
        shard = finish_shard(Path(folder))
        return (Path(folder) / "labels.h5").read_bytes(), read_json(shard)


def _rattled_copper(count: int) -> list[Atoms]:
    cells = [bulk("Cu", cubic=True) for _ in range(count)]
    for seed, atoms in enumerate(cells):
        atoms.rattle(0.05, seed=seed)
    return cells


def measure_steps(work: Round, num_items: int) -> dict[str, float]:
    """Steps while a part is done, a part runs and a part waits; then half of the tasks fail at once."""
    jobs = work.jobs()
    tasks = len(jobs)
    quarter = tasks // 4

    def line(task: int, state: str, reason: str) -> str:
        job_id, name = jobs[task]
        return f"{job_id}|{name}|{state}|{reason}|{'n0001' if state == 'RUNNING' else ''}"

    def ended(task: int) -> str:
        job_id, name = jobs[task]
        return f"{job_id}|{name}|FAILED|1:0|n0001|4G\n{job_id}.batch|batch|FAILED|1:0|n0001|\n{job_id}.0|python|FAILED|1:0|n0001|"

    work.finish(range(quarter), num_items)
    running = [line(task, "RUNNING", "None") for task in range(quarter, 2 * quarter)]
    pending = [line(task, "PENDING", "Priority") for task in range(2 * quarter, tasks)]
    work.slurm.shows(running + pending)
    found = {}
    with lease(work.folder.leases):
        manager = Manager(work.folder, Site.model_validate(SITE))
        taken = [work.step(manager)[0] for _ in range(REPEATS)]
        found["step_seconds"] = statistics.median(taken)
        work.slurm.shows(running, [ended(task) for task in range(2 * quarter, tasks)])
        cost, turn = work.step(manager)
        taken = [cost]
        while not isinstance(turn.actions[0], RecordEndings):  # only once they have been gone for a while
            time.sleep(0.5)
            cost, turn = work.step(manager)
            taken.append(cost)
        found["step_seconds_5000_ended"] = max(taken)
        again, turn = work.step(manager)
        assert isinstance(turn.actions[0], Submit)
        found["submit_again_seconds"] = again
        jobs |= work.jobs()
        again_pending = [line(task, "PENDING", "Priority") for task in range(2 * quarter, tasks)]
        work.slurm.shows(running + again_pending)
        taken = [work.step(manager)[0] for _ in range(REPEATS)]
        found["step_seconds_second_attempt"] = statistics.median(taken)
    questions = [calls["squeue"] + calls["sacct"] for calls in work.calls]
    assert all(calls[name] <= 1 for calls in work.calls for name in ("squeue", "sacct"))
    found["scheduler_calls_per_step"] = max(questions)
    found["scheduler_calls_per_usual_step"] = statistics.median(questions)
    return found


def measure_status(work: Round) -> dict[str, float]:
    """The whole command, from its start to its end."""
    command = [sys.executable, "-m", "hpcft", "status", str(work.folder.root)]

    def status() -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    found = {"status_seconds": median_seconds(status)}
    work.slurm.is_down(True)
    try:
        found["status_seconds_slurm_down"] = median_seconds(status)
    finally:
        work.slurm.is_down(False)
    return found


def measure_collection(work: Round, num_items: int) -> dict[str, float]:
    work.finish(range(len(work.jobs())), num_items)
    campaign = Campaign.model_validate(work.folder.read_identity()["config"])
    context = StageContext(work.folder, campaign, 1, "label")
    found = {"collect_seconds": seconds(lambda: stage_named("label").collect(context))}
    write_json(work.stage.product, {**stage_named("label").collect(context), "tasks": len(context.plan())})
    later = replace(context, round=2)  # with no labels of its own yet
    found["judge_beside_1e6_seconds"] = seconds(lambda: find_suspects(later))
    return found | {"tidy_seconds": seconds(lambda: tidy(work.stage))}


def measure_label_task(work: Round, num_items: int) -> dict[str, float]:
    """What a label task of the next round does besides labelling: read its share, look for labels that are there already."""
    campaign = Campaign.model_validate(work.folder.read_identity()["config"])
    context = StageContext(work.folder, campaign, 1, "label")
    payload = context.plan()[7]
    selected = work.folder.stage(1, "select").task(0).path / "selected.h5"
    share = list(numbers_of(payload["frames"]))
    found = {"task_read_seconds": median_seconds(lambda: read_structures(selected, share))}
    store = LabelStore(work.folder.labels)
    wanted = [key_of(10**9 + item) for item in range(num_items)]
    return found | {"store_find_seconds": median_seconds(lambda: store.find(wanted))}


def key_of(number: int) -> str:
    """As scattered as the keys of items, which are hashes too."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def measure_large_round(base: Path, items: int = ITEMS, tasks: int = TASKS) -> dict[str, float]:
    """Everything that needs no Slurm, in a folder of its own below `base`."""
    folder = write_large_campaign(base / "large", items, tasks)
    with simulated_slurm(base) as slurm:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found = pool.submit(plan_and_submit, folder.root).result()
        work = Round(folder, slurm)
        found |= measure_steps(work, items // tasks)
        found |= measure_status(work)
        found |= measure_collection(work, items // tasks)
        found |= measure_label_task(work, items // tasks)
    return found


# ---- stages on a real Slurm ----------------------------------------------------------------------------------------

# What each of hpcft's jobs does before its first own line: Slurm, srun, Python, submitit.
EMPTY_JOB = """#!/bin/sh
#SBATCH --ntasks=1 --output={out}
srun {python} -u -c 'import numpy, submitit.core._submit, time; print(time.time())'
"""


@contextlib.contextmanager
def single_host_slurm() -> Iterator[None]:
    """The cluster of this shell, or one that ends with this."""
    if os.environ.get("HPCFT_SLURM_DIR"):
        yield
        return
    scripts, before = REPOSITORY / "tests" / "slurm" / "cluster", dict(os.environ)
    # Not in TMPDIR, which may be long: a Unix socket's path has at most 107 bytes.
    home = Path(tempfile.mkdtemp(prefix="hpcft.", dir="/tmp"))
    try:
        # To a file: a daemon that kept a pipe open would keep us waiting for its end.
        with (home / "start.log").open("w") as log:
            subprocess.run(
                [scripts / "up", home], check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        words = shlex.split((home / "env").read_text(), comments=True)
        os.environ.update(word.split("=", 1) for word in words if word != "export")
        yield
    finally:
        subprocess.run([scripts / "down", home], check=False)
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(home, ignore_errors=True)


def measure_gaps(base: Path) -> dict[str, float]:
    """From the last result of each stage to the first execution of the next, and what an empty job needs meanwhile."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from tiny import hpcft, write_campaign

    campaign, root = write_campaign(base / "inputs"), base / "tiny"
    site = REPOSITORY / "site-configs" / "test-cluster.yaml"
    results: dict[Path, float] = {}  # by stage: packing removes the files
    with (base / "log").open("w") as log, ThreadPoolExecutor(1) as aside:
        manager = hpcft("run", campaign, "--dir", root, "--site", site, cwd=base, output=log)
        empty = [aside.submit(empty_job_seconds, base)]
        while manager.poll() is None:
            for path in root.glob("round-*/*/outcomes/*.result.json"):
                with contextlib.suppress(FileNotFoundError):
                    stage = path.parent.parent
                    results[stage] = max(results.get(stage, 0.0), path.stat().st_mtime)
            if empty[-1].done():
                empty.append(aside.submit(empty_job_seconds, base, pause_s=10.0))
            time.sleep(0.02)
    if manager.returncode:
        raise SystemExit(
            f"the campaign ended with exit code {manager.returncode}:\n{(base / 'log').read_text()}"
        )
    folder = CampaignFolder(root)
    stages = [folder.stage(record.round, record.name) for record in read_records(folder).stages]
    gaps = [first_execution(after) - results[before.path] for before, after in pairwise(stages)]
    latency = statistics.median(job.result() for job in empty)
    return {
        "stage_gap_seconds": statistics.median(gaps) - latency,
        "stage_gap_seconds_longest": max(gaps) - latency,
        "stage_gap_seconds_raw": statistics.median(gaps),
        "empty_job_seconds": latency,
        "num_stage_gaps": len(gaps),
    }


def first_execution(stage: StageFolder) -> float:
    with zipfile.ZipFile(stage.history) as archive:
        marks = [name for name in archive.namelist() if ".run-" in name]
        return min(float(json.loads(archive.read(name))["at"]) for name in marks)


def empty_job_seconds(base: Path, pause_s: float = 0.0) -> float:
    """After a pause: from sbatch to the first line of Python in a job that does nothing else."""
    time.sleep(pause_s)
    out = base / "empty.out"
    out.unlink(missing_ok=True)
    (base / "empty.sh").write_text(EMPTY_JOB.format(out=out, python=shlex.quote(sys.executable)))
    start = time.time()
    subprocess.run(["sbatch", "--wait", base / "empty.sh"], check=True, stdout=subprocess.DEVNULL)
    return float(out.read_text().split()[-1]) - start


# ---- the command ---------------------------------------------------------------------------------------------------

AIMS = {
    "plan_seconds_1e6": "10",
    "plan_peak_mib": "477 (500 MB)",
    "status_seconds": "1",
    "status_seconds_slurm_down": "1",
    "step_seconds": "1",
    "step_seconds_5000_ended": "1",
    "scheduler_calls_per_step": "2",
    "stage_gap_seconds": "10",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--without-slurm", action="store_true", help="leave out what needs a real Slurm")
    options = parser.parse_args()
    found: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory(prefix="hpcft-manager-") as base:
        found |= measure_large_round(Path(base) / "simulated")
        found["stage_gap_seconds"] = None
        if not options.without_slurm:
            with single_host_slurm():
                found |= measure_gaps(Path(base))
    if options.json:
        print(json.dumps(found))
        return
    table = Table("what", "figure", "at most")
    for name, value in found.items():
        table.add_row(name, "not measured" if value is None else f"{value:.3g}", AIMS.get(name, ""))
    Console().print(table)


if __name__ == "__main__":
    main()

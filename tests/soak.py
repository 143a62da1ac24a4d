"""A campaign while everything around it fails at random: tasks, nodes, Slurm's daemons and the manager itself.

    tests/soak.py --minutes 60 [--seed 1] [--size large]

Needs no running cluster: it starts one of its own, and stops it. First the campaign runs undisturbed on this machine; then it
runs on Slurm, again and again from the start for as long as asked, while a saboteur works. In the end what each campaign
left is compared with the undisturbed one: labels, frames, weights and evaluations bit for bit, each label paid for once but
for those in hand when something died. Exits 0 only if all agree; prints what was done to it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from tiny import CAMPAIGN, arrays_of, assert_same_results, hpcft, hpcft_to_end, write_campaign

CLUSTER = Path(__file__).parent / "slurm" / "cluster"
SIZES = {"small": (6, 6, 1), "large": (30, 36, 1)}
"""Tasks of MD, shards of labels, rounds: some 40 tasks, and some 200."""


def changes(size: str) -> dict[str, Any]:
    tasks, shards, rounds = SIZES[size]
    return {
        "rounds": rounds,
        "max_attempts": 200,
        "max_interruptions": 1000,
        "reference": {"calculator": "calculators.SlowEMT", "elements": ["Cu"], "time_limit_s": 60},
        "explore": {**CAMPAIGN["explore"], "tasks": tasks, "tolerated_failures": 0},
        "select": {"frames": shards},
        "label": {"shards": shards, "tolerated_failures": 0},
        "probe": {**CAMPAIGN["probe"], "tasks": tasks, "tolerated_failures": 0},
    }


@dataclass
class Saboteur:
    """Breaks one thing at a time, and mends what does not mend itself."""

    chance: random.Random
    cluster: Path
    root: Path
    done: Counter[str] = field(default_factory=Counter)

    def strike(self, manager: subprocess.Popen[str] | None) -> None:
        blows = [
            self.kill_task,
            self.kill_task,
            self.requeue,
            self.requeue,
            self.cancel,
            self.preempt,
            self.crash_node,
            self.lose_node,
            self.stop_controller,
            self.freeze_controller,
            self.stop_accounting,
        ]
        if manager is not None:
            blows += [lambda: self.kill_manager(manager)] * 4
        blow = self.chance.choice(blows)
        blow()

    def kill_task(self) -> None:
        ours = [p for p in psutil.process_iter(["cmdline"]) if self._is_task(p)]
        if ours:
            self._count("a task's process killed")
            _kill(self.chance.choice(ours).pid)

    def kill_manager(self, manager: subprocess.Popen[str]) -> None:
        self._count("the manager killed")
        _kill(manager.pid)
        manager.wait()

    def requeue(self) -> None:
        self._job("a job requeued", "scontrol", "requeue")

    def cancel(self) -> None:
        self._job("a job cancelled", "scancel")

    def preempt(self) -> None:
        """Work of higher priority comes to a node on which ours may run."""
        self._count("a node taken by others")
        node = self.chance.choice(["n1", "n2"])
        subprocess.run(
            [
                "sbatch",
                "-p",
                "cpu",
                "-w",
                node,
                "-c",
                "4",
                "-t",
                "1",
                "-o",
                "/dev/null",
                "-J",
                "others",
                "--wrap",
                "sleep 4",
            ],
            capture_output=True,
            check=False,
        )

    def crash_node(self) -> None:
        self._count("a node crashed")
        self._down("--crash", self.cluster, self.chance.choice(["n1", "n2", "n3", "n4"]), for_s=(5, 25))

    def lose_node(self) -> None:
        self._count("a node lost, its jobs alive")
        self._down(self.cluster, self.chance.choice(["n1", "n2", "n3", "n4"]), for_s=(5, 25))

    def stop_controller(self) -> None:
        self._count("slurmctld stopped")
        self._down(self.cluster, "slurmctld", for_s=(1, 15))

    def freeze_controller(self) -> None:
        self._count("slurmctld frozen")
        pid = int((self.cluster / "run" / "slurmctld.pid").read_text())
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self.chance.uniform(1, 15))
        os.kill(pid, signal.SIGCONT)

    def stop_accounting(self) -> None:
        self._count("slurmdbd stopped")
        self._down(self.cluster, "slurmdbd", for_s=(1, 15))

    def mend(self) -> None:
        _run([CLUSTER / "up", self.cluster])

    def _down(self, *arguments: object, for_s: tuple[float, float]) -> None:
        _run([CLUSTER / "down", *arguments])
        time.sleep(self.chance.uniform(*for_s))
        self.mend()

    def _job(self, what: str, *command: str) -> None:
        listed = subprocess.run(
            ["squeue", "--me", "-h", "-t", "running", "-o", "%A %j"],
            capture_output=True,
            text=True,
            check=False,
        )
        jobs = [line.split()[0] for line in listed.stdout.splitlines() if "hpcft-" in line]
        if jobs:
            self._count(what)
            subprocess.run([*command, self.chance.choice(jobs)], capture_output=True, check=False)

    def _is_task(self, process: psutil.Process) -> bool:
        arguments = process.info["cmdline"] or []
        return "submitit.core._submit" in arguments and any(str(self.root) in a for a in arguments)

    def _count(self, what: str) -> None:
        self.done[what] += 1
        print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def _run(argv: list[object]) -> None:
    """Daemons must not keep a pipe of ours open."""
    status = subprocess.call(list(map(str, argv)), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    if status != 0:
        raise RuntimeError(f"{argv} exited with {status}")


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def disturbed(campaign: Path, site: Path, root: Path, saboteur: Saboteur, end: float) -> None:
    """One campaign to its end; disturbed until the time is up, then left in peace. Managers are started as users would."""
    log = root.with_suffix(".log").open("a")
    manager: subprocess.Popen[str] | None = None
    quiet = 0.0
    while True:
        if manager is None or manager.poll() is not None:
            if manager is not None and manager.returncode == 0 and _is_finished(root):
                return
            manager = _start(campaign, site, root, log, saboteur)
        if time.monotonic() < end:
            time.sleep(saboteur.chance.uniform(1, 12))
            saboteur.strike(manager)
        else:
            time.sleep(2)
            quiet += 2
            if quiet > 1800:
                raise RuntimeError(f"{root} does not come to its end in peace; see {log.name}")


def _start(campaign: Path, site: Path, root: Path, log: Any, saboteur: Saboteur) -> subprocess.Popen[str]:
    """In the foreground, or left to a controller for a while: then whoever types the next command mends a lost one."""
    known = (root / "campaign.json").exists()
    if known and saboteur.chance.random() < 0.4:
        subprocess.run(
            [sys.executable, "-m", "hpcft", "submit", str(root)],
            stdout=log,
            stderr=log,
            timeout=600,
            check=False,
        )
        print(f"{time.strftime('%H:%M:%S')} left to a controller", flush=True)
        for _ in range(saboteur.chance.randint(1, 4)):
            time.sleep(8)
            saboteur.strike(None)
    arguments = ("resume", root) if known else ("run", campaign, "--dir", root, "--site", site)
    return hpcft(*arguments, cwd=root.parent, output=log)


def _is_finished(root: Path) -> bool:
    status = subprocess.run(
        [sys.executable, "-m", "hpcft", "status", str(root)], capture_output=True, text=True, check=False
    )
    return ": finished" in status.stdout


def assert_labels_paid_once(root: Path, calls: Path, deaths: int) -> int:
    """Each label's energy was computed once, but for those in hand when something died; returns how many more."""
    counts = Counter(
        float(line.removeprefix("np.float64(").rstrip(")")) for line in calls.read_text().split()
    )
    energies = [
        float(energy)
        for path in root.glob("round-*/*/tasks/*/labels.h5")
        for energy in arrays_of(path)["info/REF_energy"]
    ]
    assert energies
    assert all(counts[energy] for energy in energies), "labels that nobody computed"
    again = sum(counts[energy] - 1 for energy in energies)
    # A node that dies takes at most its four tasks along, each with one label in hand.
    assert again <= 4 * deaths, f"{again} labels were paid for again after {deaths} blows"
    return again


def soak(base: Path, minutes: float, seed: int, size: str) -> None:
    inputs = write_campaign(base / "inputs", changes(size))
    _more_replicas(base / "inputs" / "start.extxyz", SIZES[size][0])
    paths = [str(Path(__file__).parent / "faults"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ["HPCFT_TEST_CALLS"] = str(base / "calls-undisturbed")
    hpcft_to_end("run", inputs, "--dir", base / "undisturbed", cwd=base)
    print(f"{time.strftime('%H:%M:%S')} the undisturbed campaign is finished", flush=True)
    cluster = Path(tempfile.mkdtemp(prefix="hpcft.", dir="/tmp"))
    chance = random.Random(seed)
    try:
        _run([CLUSTER / "up", cluster])
        os.environ["SLURM_CONF"] = str(cluster / "etc" / "slurm.conf")
        site = _preemptible_site(base / "site.yaml")
        end = time.monotonic() + 60 * minutes
        number = 0
        blows: Counter[str] = Counter()
        while number == 0 or time.monotonic() < end:
            number += 1
            root = base / f"disturbed-{number}"
            os.environ["HPCFT_TEST_CALLS"] = str(base / f"calls-{number}")
            saboteur = Saboteur(chance, cluster, root)
            disturbed(inputs, site, root, saboteur, end)
            assert_same_results(base / "undisturbed", root)
            again = assert_labels_paid_once(root, base / f"calls-{number}", sum(saboteur.done.values()))
            blows += saboteur.done
            print(
                f"{time.strftime('%H:%M:%S')} campaign {number}: the same data as undisturbed after "
                f"{sum(saboteur.done.values())} blows; {again} labels in hand were computed again",
                flush=True,
            )
    finally:
        _run([CLUSTER / "down", cluster])
        shutil.rmtree(cluster, ignore_errors=True)
    for what, count in sorted(blows.items()):
        print(f"{count:5d}  {what}")


def _more_replicas(path: Path, count: int) -> None:
    from ase.io import read, write

    few = read(path, ":")
    many = []
    for number in range(count):
        atoms = few[number % len(few)].copy()
        atoms.rattle(0.02, seed=number)
        many.append(atoms)
    write(path, many)


def _preemptible_site(path: Path) -> Path:
    shipped = Path(__file__).parents[1] / "site-configs" / "test-cluster.yaml"
    content = yaml.safe_load(shipped.read_text())
    content["slurm"] = {"partition": "preempt", "max_array_size": 50}
    content["stages"] = {}
    path.write_text(yaml.safe_dump(content))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", choices=sorted(SIZES), default="large")
    parser.add_argument("--keep", type=Path, help="work in this new folder, and leave it")
    wishes = parser.parse_args()
    if wishes.keep is not None:
        wishes.keep.mkdir(parents=True)
        soak(wishes.keep.absolute(), wishes.minutes, wishes.seed, wishes.size)
        return
    with tempfile.TemporaryDirectory(prefix="hpcft-soak.") as base:
        soak(Path(base), wishes.minutes, wishes.seed, wishes.size)


if __name__ == "__main__":
    main()

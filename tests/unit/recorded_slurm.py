"""A cluster that answers with what a real Slurm 22.05 printed.

It is that of tests/slurm/cluster with more partitions (short, closed, pairs), a drained node, a QOS `long` that may go over
the partitions' limits, and an account `guests` whose limits stand at the account, for the partition gpu only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpcft.cluster.limits import Cluster, read_cluster
from hpcft.cluster.problems import Problem, problems
from hpcft.cluster.slurm_answers import NodeGroup
from hpcft.config.campaign import Campaign
from hpcft.config.site import Site, Slurm
from hpcft.errors import SchedulerUnavailable

FOLDER = Path(__file__).parent / "recorded" / "slurm-22.05"

FILES = {
    "scontrol show config": "config",
    "scontrol --all --oneliner show partition": "partitions",
    "sinfo": "nodes",
    "id -un": "user",
    "id -Gnz": "groups",
    "sacctmgr --noheader --parsable2 show user": "accounts",
    "sacctmgr --noheader --parsable2 show assoc": "associations",
    "sacctmgr --noheader --parsable2 show qos": "qos",
}


class Recorded:
    """Runs no command: each is answered with the recorded output, or as `changes` say; None: it fails."""

    def __init__(self, changes: Mapping[str, str | None] | None = None) -> None:
        self.changes, self.commands = changes or {}, list[str]()

    def __call__(self, argv: Sequence[str]) -> str:
        command = " ".join(argv)
        self.commands.append(command)
        name = next(name for start, name in FILES.items() if command.startswith(start))
        answer = self.changes[name] if name in self.changes else (FOLDER / f"{name}.txt").read_text()
        if answer is None:
            raise SchedulerUnavailable(f"{command} failed")
        return answer


def recorded_cluster(**changes: str | None) -> Cluster:
    return read_cluster(Recorded(changes))


def recorded(name: str) -> str:
    return (FOLDER / f"{name}.txt").read_text()


def with_nodes(*nodes: NodeGroup) -> Cluster:
    return replace(recorded_cluster(), nodes=nodes)


def site(stages: Mapping[str, object] | None = None, **slurm: object) -> Site:
    """A site in partition cpu, with these keys of its slurm section and of its stages'."""
    section = Slurm.model_validate({"partition": "cpu", **slurm})
    return Site.model_validate({"name": "x", "executor": "slurm", "slurm": section, "stages": stages or {}})


CLUSTER = recorded_cluster()
A100 = NodeGroup("gpu", 2, 64, 512_000, {"a100": 4}, frozenset({"gpu", "ib"}))
H100 = NodeGroup("gpu", 1, 32, 256_000, {"h100": 8}, frozenset({"gpu"}))
PLAIN = NodeGroup("cpu", 2, 4, 4000, {}, frozenset({"cpu"}))


def campaign(**changes: dict[str, Any]) -> Campaign:
    content: dict[str, dict[str, Any]] = {
        "explore": {"tasks": 3, "temperature_K": 300.0, "timestep": 1.0, "steps": 100},
        "select": {"frames": 8},
        "label": {"shards": 2},
        "train": {"epochs": 1},
        "probe": {"steps": 100, "frames": 2, "tasks": 3},
    }
    for key, value in changes.items():
        content[key] = {**content[key], **value}
    fixed = {"name": "c", "rounds": 1, "foundation": "f.pt", "structures": "s.xyz"}
    return Campaign.model_validate(
        {**fixed, "reference": {"calculator": "ase.calculators.emt.EMT"}, **content}
    )


def found(
    site: Site, campaign: Campaign | None = None, cluster: Cluster = CLUSTER, **shell: str
) -> list[Problem]:
    return problems(site, campaign, cluster, shell)


def the_one(
    site: Site, campaign: Campaign | None = None, cluster: Cluster = CLUSTER, **shell: str
) -> Problem:
    (problem,) = found(site, campaign, cluster, **shell)
    return problem

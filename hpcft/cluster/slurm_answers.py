"""What Slurm's commands print about a cluster, as values. Pure: tests read output that was recorded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# Columns that are asked for, in this order; sacctmgr knows these names since long before Slurm 20.
ASSOCIATION_FIELDS = "Account,Partition,QOS,DefaultQOS,MaxSubmitJobs,MaxJobs,MaxWall,GrpSubmitJobs"
QOS_FIELDS = "Name,Flags,MaxSubmitPU,MaxSubmitPA,GrpSubmitJobs,MaxJobsPU,MaxWall"
NODE_FORMAT = "%R|%D|%c|%m|%G|%f|%T"

_NO_LIMIT = {"", "(null)", "N/A", "NONE", "UNLIMITED", "INFINITE"}
# The last characters of a node's state are marks: `*` does not answer, `~` is powered down until it is needed, ...
_STATE_MARKS = "*~#!%$@^-+"
_OUT_OF_SERVICE = ("down", "drain", "fail", "error", "unk", "not_responding", "future")


@dataclass(frozen=True)
class Partition:
    """None: no limit. `allow_*` None: everybody."""

    name: str
    state: str = "UP"
    is_default: bool = False
    max_time_min: int | None = None
    default_time_min: int | None = None
    min_nodes: int = 0
    max_nodes: int | None = None
    total_nodes: int = 0
    max_cpus_per_node: int | None = None
    max_memory_MB: int | None = None
    """Memory that one job may have on a node."""
    allow_accounts: frozenset[str] | None = None
    deny_accounts: frozenset[str] = frozenset()
    allow_qos: frozenset[str] | None = None
    deny_qos: frozenset[str] = frozenset()
    allow_groups: frozenset[str] | None = None
    is_for_root: bool = False
    qos: str | None = None
    """QOS whose limits hold for every job in the partition."""


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one partition that are alike."""

    partition: str
    num_nodes: int
    cpus: int
    memory_MB: int
    gpus: Mapping[str, int] = field(default_factory=dict)
    """GPUs of each node by type; the type is empty where the site does not name it."""
    features: frozenset[str] = frozenset()
    state: str = "idle"

    @property
    def num_gpus(self) -> int:
        return sum(self.gpus.values())

    @property
    def is_in_service(self) -> bool:
        return not self.state.startswith(_OUT_OF_SERVICE)


@dataclass(frozen=True)
class Association:
    """What a user may do for one account, in one partition or (None) in all."""

    account: str
    partition: str | None = None
    qos: tuple[str, ...] = ()
    default_qos: str | None = None
    max_submitted: int | None = None
    max_running: int | None = None
    max_time_min: int | None = None


@dataclass(frozen=True)
class Qos:
    """Limits for one user of a quality of service."""

    name: str
    flags: frozenset[str] = frozenset()
    max_submitted: int | None = None
    max_running: int | None = None
    max_time_min: int | None = None


def parse_config(output: str) -> dict[str, str]:
    """`scontrol show config` as keys and values."""
    pairs = (line.partition("=") for line in output.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def parse_partitions(output: str) -> dict[str, Partition]:
    """`scontrol --oneliner show partition`, by name."""
    found = (_partition(_pairs(line)) for line in output.splitlines() if line.startswith("PartitionName="))
    return {partition.name: partition for partition in found}


def parse_nodes(output: str) -> tuple[NodeGroup, ...]:
    """`sinfo --exact --format=NODE_FORMAT`; nodes that differ in no column but the state are one line for each state."""
    groups = []
    for line in output.splitlines():
        words = [word.strip() for word in line.split("|")]
        if len(words) != 7:
            continue
        name, num_nodes, cpus, memory, gres, features, state = words
        groups.append(
            NodeGroup(
                partition=name,
                num_nodes=_count(num_nodes) or 0,
                cpus=_count(cpus) or 0,
                memory_MB=_count(memory) or 0,
                gpus=parse_gpus(gres),
                features=_names(features) or frozenset(),
                state=state.rstrip(_STATE_MARKS).lower(),
            )
        )
    return tuple(groups)


def parse_gpus(gres: str) -> dict[str, int]:
    """GPUs by type from `gpu:a100:4(S:0-1),nvme:3600`; other resources are left out."""
    found: dict[str, int] = {}
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        kind, *words = [word for word in entry.split(":") if word != "no_consume"]
        if kind != "gpu":
            continue
        count = int(words.pop()) if words and words[-1].isdigit() else 1
        gpu_type = ":".join(words)
        found[gpu_type] = found.get(gpu_type, 0) + count
    return found


def parse_associations(output: str) -> tuple[Association, ...]:
    """`sacctmgr -nP show assoc format=ASSOCIATION_FIELDS`."""
    found = []
    for line in output.splitlines():
        words = line.split("|")
        if len(words) != 8 or not words[0]:
            continue
        account, partition, qos, default_qos, submit, jobs, wall, group_submit = words
        found.append(
            Association(
                account=account,
                partition=partition or None,
                qos=tuple(name for name in qos.split(",") if name),
                default_qos=default_qos or None,
                max_submitted=smallest(_count(submit), _count(group_submit)),
                max_running=_count(jobs),
                max_time_min=parse_minutes(wall),
            )
        )
    return tuple(found)


def parse_qos(output: str) -> dict[str, Qos]:
    """`sacctmgr -nP show qos format=QOS_FIELDS`, by name."""
    found = {}
    for line in output.splitlines():
        words = line.split("|")
        if len(words) != 7 or not words[0]:
            continue
        name, flags, per_user, per_account, group, jobs, wall = words
        found[name] = Qos(
            name=name,
            flags=_names(flags) or frozenset(),
            max_submitted=smallest(_count(per_user), _count(per_account), _count(group)),
            max_running=_count(jobs),
            max_time_min=parse_minutes(wall),
        )
    return found


def parse_minutes(text: str) -> int | None:
    """Whole minutes of 60, 15:00, 3:00:00, 1-0 or 1-12:00:00; None where there is no limit that can be read."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, first, second, third = (None if word is None else int(word) for word in match.groups())
    assert first is not None
    if days is not None or third is not None:  # [D-]HH[:MM[:SS]]
        return ((days or 0) * 24 + first) * 60 + (second or 0)
    return first  # MM[:SS]


def smallest(*limits: float | int | None) -> int | None:
    """The smallest of the limits that are known."""
    known = [limit for limit in limits if limit is not None]
    return int(min(known)) if known else None


def _pairs(line: str) -> dict[str, str]:
    # A value may have blanks (a partition called `CPU nodes`); a key begins after one and ends at its first `=`.
    return {key: value.strip() for key, value in re.findall(r"(\w+)=(.*?)(?=\s\w+=|\s*$)", line)}


def _partition(pairs: Mapping[str, str]) -> Partition:
    return Partition(
        name=pairs["PartitionName"],
        state=pairs.get("State", "UP").upper(),
        is_default=pairs.get("Default") == "YES",
        max_time_min=parse_minutes(pairs.get("MaxTime", "")),
        default_time_min=parse_minutes(pairs.get("DefaultTime", "")),
        min_nodes=_count(pairs.get("MinNodes", "")) or 0,
        max_nodes=_count(pairs.get("MaxNodes", "")),
        total_nodes=_count(pairs.get("TotalNodes", "")) or 0,
        max_cpus_per_node=_count(pairs.get("MaxCPUsPerNode", "")),
        max_memory_MB=_count(pairs.get("MaxMemPerNode", "")),
        allow_accounts=_allowed(pairs.get("AllowAccounts")),
        deny_accounts=_names(pairs.get("DenyAccounts", "")) or frozenset(),
        allow_qos=_allowed(pairs.get("AllowQos")),
        deny_qos=_names(pairs.get("DenyQos", "")) or frozenset(),
        allow_groups=_allowed(pairs.get("AllowGroups")),
        is_for_root=pairs.get("RootOnly") == "YES",
        qos=next(iter(_names(pairs.get("QoS", "")) or ()), None),
    )


def _allowed(text: str | None) -> frozenset[str] | None:
    return None if text is None or text.upper() == "ALL" else _names(text)


def _names(text: str) -> frozenset[str] | None:
    if text.upper() in _NO_LIMIT:
        return None
    return frozenset(name for name in text.split(",") if name)


def _count(text: str) -> int | None:
    """The number in 4000 or 382000+ (at least); None: no limit, or none that can be read."""
    match = re.match(r"\d+", text)
    return int(match[0]) if match else None

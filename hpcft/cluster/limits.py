"""What Slurm says about its own limits, and what of that bounds a stage on a site."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hpcft.cluster.slurm import Run, run_command
from hpcft.cluster.slurm_answers import (
    ASSOCIATION_FIELDS,
    NODE_FORMAT,
    QOS_FIELDS,
    Association,
    NodeGroup,
    Partition,
    Qos,
    parse_associations,
    parse_config,
    parse_nodes,
    parse_partitions,
    parse_qos,
    smallest,
)
from hpcft.config.campaign import StageName
from hpcft.config.site import Site, Slurm
from hpcft.errors import SchedulerUnavailable

JobKind = StageName | Literal["controller"]


@dataclass(frozen=True)
class Cluster:
    """A cluster as Slurm describes it to this user. None and empty: unknown, or not there."""

    name: str
    version: str
    max_array_size: int | None
    """Elements of one array at most: MaxArraySize, as indices run from 0 to one less."""
    max_job_count: int | None
    """Jobs of all users that the controller remembers."""
    enforce_part_limits: str
    """ALL or ANY: a job over the limits of its partitions is refused; NO: it waits for ever."""
    enforced: frozenset[str]
    """What accounting enforces: associations, limits, qos, ..."""
    has_accounting: bool
    job_submit_plugins: str
    """The site's own plugins that may change or refuse a job; empty: none."""
    user: str | None
    groups: frozenset[str] | None
    default_account: str | None
    partitions: Mapping[str, Partition]
    nodes: tuple[NodeGroup, ...]
    associations: tuple[Association, ...]
    qos: Mapping[str, Qos]

    @property
    def default_partition(self) -> str | None:
        return next((p.name for p in self.partitions.values() if p.is_default), None)


@dataclass(frozen=True)
class StageLimits:
    """What bounds the jobs of a stage; None: nothing that is known."""

    max_array_size: int | None = None
    max_submitted: int | None = None
    max_time_min: int | None = None
    max_memory_GB: float | None = None


@dataclass(frozen=True)
class Terms:
    """What a job would run under: its partitions as far as they exist, its association and its QOS."""

    partitions: tuple[Partition, ...]
    account: str | None
    association: Association | None
    qos: Qos | None
    partition_qos: Mapping[str, Qos]
    all_partitions_must_fit: bool


def read_cluster(run: Run = run_command) -> Cluster:
    """The cluster that Slurm's commands reach; SchedulerUnavailable if scontrol does not answer.

    A site without accounting, or whose accounting does not answer, has no associations and no QOS.
    """
    config = parse_config(run(["scontrol", "show", "config"]))
    partitions = parse_partitions(run(["scontrol", "--all", "--oneliner", "show", "partition"]))
    nodes = _answer(run, ["sinfo", "--all", "--exact", "--noheader", f"--format={NODE_FORMAT}"])
    name = config.get("ClusterName", "")
    user = (_answer(run, ["id", "-un"]) or "").strip() or None
    groups = _answer(run, ["id", "-Gnz"])
    kept = config.get("AccountingStorageType", "").endswith("slurmdbd") and user is not None
    accounts = _answer(run, _show("user", f"name={user}", "format=User,DefaultAccount")) if kept else None
    where = ["assoc", f"user={user}", f"cluster={name}", f"format={ASSOCIATION_FIELDS}"]
    associations = _answer(run, _show(*where)) if accounts is not None else None
    qos = _answer(run, _show("qos", f"format={QOS_FIELDS}")) if associations is not None else None
    return Cluster(
        name=name,
        version=config.get("SLURM_VERSION", ""),
        max_array_size=_array_size(config.get("MaxArraySize")),
        max_job_count=_number(config.get("MaxJobCount")),
        enforce_part_limits=config.get("EnforcePartLimits", "NO").upper(),
        enforced=frozenset(config.get("AccountingStorageEnforce", "none").split(",")) - {"none"},
        has_accounting=associations is not None,
        job_submit_plugins=config.get("JobSubmitPlugins", "").replace("(null)", ""),
        user=user,
        groups=None if groups is None else frozenset(groups.strip("\0\n").split("\0")),
        default_account=(accounts or "").partition("\n")[0].partition("|")[2] or None,
        partitions=partitions,
        nodes=parse_nodes(nodes or ""),
        associations=parse_associations(associations or ""),
        qos=parse_qos(qos or ""),
    )


def effective(
    site: Site, stage: JobKind, cluster: Cluster | None, environment: Mapping[str, str] = os.environ
) -> StageLimits:
    """The limits of a stage's jobs: the site's own keys, or Slurm's where those are smaller or alone known."""
    if site.executor != "slurm":
        return StageLimits()
    asked = site.slurm_for(stage)
    if cluster is None:
        return StageLimits(asked.max_array_size, asked.max_submitted, asked.max_time_min, asked.max_memory_GB)
    terms = terms_of(asked, cluster, environment)
    memory_MB = max((node.memory_MB for node in suitable_nodes(asked, terms, cluster)), default=0)
    memory_GB = [m for m in (asked.max_memory_GB, memory_MB / 1024) if m]
    return StageLimits(
        max_array_size=smallest(asked.max_array_size, cluster.max_array_size),
        max_submitted=smallest(asked.max_submitted, max_submitted(terms, cluster)),
        max_time_min=smallest(asked.max_time_min, max_time_min(terms, cluster)),
        max_memory_GB=min(memory_GB, default=None),
    )


def terms_of(asked: Slurm, cluster: Cluster, environment: Mapping[str, str] = os.environ) -> Terms:
    """What a job with these wishes would run under; sbatch takes what is not asked for from its environment."""
    names = partition_names(asked, cluster, environment)
    partitions = tuple(cluster.partitions[name] for name in names if name in cluster.partitions)
    account = asked.account or environment.get("SBATCH_ACCOUNT") or cluster.default_account
    mine = [a for a in cluster.associations if a.account == account and a.partition in (None, *names)]
    # An association for a single partition goes before the one for all of them.
    association = next(iter(sorted(mine, key=lambda a: a.partition is None)), None)
    name = asked.qos or environment.get("SBATCH_QOS")
    if name is None and association is not None:
        name = association.default_qos or (association.qos[0] if len(association.qos) == 1 else None)
    return Terms(
        partitions=partitions,
        account=account,
        association=association,
        qos=cluster.qos.get(name) if name else None,
        partition_qos={p.name: cluster.qos[p.qos] for p in partitions if p.qos and p.qos in cluster.qos},
        all_partitions_must_fit=cluster.enforce_part_limits == "ALL",
    )


def partition_names(
    asked: Slurm, cluster: Cluster, environment: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """The partitions that sbatch would be given, or the default one."""
    text = asked.partition or environment.get("SBATCH_PARTITION") or cluster.default_partition or ""
    return tuple(name for name in text.split(",") if name)


def suitable_nodes(asked: Slurm, terms: Terms, cluster: Cluster) -> list[NodeGroup]:
    """Nodes with the features and the kind of GPU that are asked for, as large as their partition lets a job see them."""
    wanted, must_have_all = features_of(asked.constraint)
    found = []
    for partition in terms.partitions:
        for node in nodes_of(partition, cluster):
            has = [feature in node.features for feature in wanted]
            if wanted and not (all(has) if must_have_all else any(has)):
                continue
            if not asked.gpus_per_rank or gpus_of_type(node, asked.gpu_type):
                found.append(node)
    return found


def nodes_of(partition: Partition, cluster: Cluster) -> list[NodeGroup]:
    """The partition's nodes with the cores and the memory that it gives to one job."""
    return [
        replace(
            node,
            cpus=min(node.cpus, partition.max_cpus_per_node or node.cpus),
            memory_MB=min(node.memory_MB, partition.max_memory_MB or node.memory_MB),
        )
        for node in cluster.nodes
        if node.partition == partition.name
    ]


def gpus_of_type(node: NodeGroup, gpu_type: str | None) -> int:
    """The node's GPUs of this type (Slurm does not mind capitals), or of any."""
    if gpu_type is None:
        return node.num_gpus
    return sum(count for name, count in node.gpus.items() if name.lower() == gpu_type.lower())


def features_of(constraint: str | None) -> tuple[list[str], bool]:
    """The features that a constraint names, and whether a node must have all of them; one that it must not have is not."""
    if constraint is None:
        return [], True
    words = "".join(" " if sign in "&|,()[]" else sign for sign in constraint).split()
    names = [word.partition("*")[0] for word in words if not word.startswith("!")]
    return names, not set("|,[") & set(constraint)


def max_time_min(terms: Terms, cluster: Cluster) -> int | None:
    """The longest time limit with which a job starts in some partition (in all, where Slurm wants that)."""
    limits = [_partition_time(partition, terms, cluster) for partition in terms.partitions]
    known = [limit for limit in limits if limit is not None]
    if terms.all_partitions_must_fit or not known:
        return min(known, default=None)
    return max(known) if len(known) == len(limits) else None


def max_submitted(terms: Terms, cluster: Cluster) -> int | None:
    """The smallest of the limits on one user's jobs; Slurm itself may use a QOS's in place of an account's."""
    if not _are_limits_enforced(cluster):
        return None
    owners: Iterable[Qos | Association | None] = (terms.qos, terms.association, *terms.partition_qos.values())
    return smallest(*(owner.max_submitted for owner in owners if owner is not None))


def _partition_time(partition: Partition, terms: Terms, cluster: Cluster) -> int | None:
    of_job = terms.qos
    is_free = of_job is not None and "PartitionTimeLimit" in of_job.flags
    own = None if is_free else partition.max_time_min
    if not _are_limits_enforced(cluster):
        return own
    # The first of these that has a limit hides the others'.
    owners: list[Qos | Association | None] = [terms.partition_qos.get(partition.name), of_job]
    if of_job is not None and "OverPartQOS" in of_job.flags:
        owners.reverse()
    walls = [o.max_time_min for o in (*owners, terms.association) if o is not None and o.max_time_min]
    return smallest(own, *walls[:1])


def _are_limits_enforced(cluster: Cluster) -> bool:
    return bool({"limits", "safe"} & cluster.enforced)


def _array_size(text: str | None) -> int | None:
    size = _number(text)
    return None if size is None else max(1, size)  # 0 and 1: no arrays, only single jobs


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _show(*words: str) -> list[str]:
    return ["sacctmgr", "--noheader", "--parsable2", "show", *words]


def _answer(run: Run, argv: Sequence[str]) -> str | None:
    """What the command prints; None if it fails: then this is not known, and no reason to stop."""
    try:
        return run(argv)
    except SchedulerUnavailable:
        return None

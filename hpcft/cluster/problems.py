"""What a cluster would refuse, or leave waiting for ever, of what a site and a campaign ask for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from hpcft.cluster.jobs import JOB_KINDS, Job, job_kinds, job_of
from hpcft.cluster.limits import (
    Cluster,
    JobKind,
    Terms,
    features_of,
    gpus_of_type,
    max_time_min,
    nodes_of,
    partition_names,
    suitable_nodes,
    terms_of,
)
from hpcft.cluster.slurm_answers import NodeGroup, Partition
from hpcft.config.settings import Settings
from hpcft.config.site import Site

# Accounting may also be told to keep wckeys, or no jobs and steps: that refuses no account.
_NOT_ABOUT_ACCOUNTS = {"wckeys", "nojobs", "nosteps"}


@dataclass(frozen=True)
class Problem:
    """One thing that stands in the way; `key` is a key path in the file that `source` names."""

    source: Literal["site", "campaign", "machine"]
    key: str
    what: str
    accepted: str = ""
    """What would be accepted instead."""
    severity: Literal["error", "warning"] = "error"
    stages: tuple[JobKind, ...] = ()
    """The stages that it concerns; empty: all."""


def problems(
    site: Site,
    settings: Settings | None,
    cluster: Cluster,
    environment: Mapping[str, str] = os.environ,
) -> list[Problem]:
    """Everything that Slurm would refuse or never start, errors first; sbatch reads SBATCH_* in `environment`."""
    if site.executor != "slurm":
        return []
    found: dict[Problem, list[JobKind]] = {problem: [] for problem in _about_the_site(site, cluster)}
    kinds = job_kinds(settings)
    for stage in kinds:
        check = _Check(site, cluster, job_of(site, stage, settings), environment)
        for problem in check.problems():
            found.setdefault(problem, []).append(stage)
    merged = [
        replace(problem, stages=tuple(stages) if len(stages) < len(kinds) else ())
        for problem, stages in found.items()
    ]
    return sorted(merged, key=lambda problem: problem.severity != "error")


def closed(partition: Partition, terms: Terms, cluster: Cluster) -> tuple[str, bool] | None:
    """Why a job under these terms does not start in the partition, and whether that may pass by itself."""
    name, qos = f"partition {partition.name}", terms.qos.name if terms.qos else None
    if partition.state in ("DRAIN", "INACTIVE"):
        return f"{name} takes no jobs (its state is {partition.state})", False
    if partition.is_for_root and cluster.user != "root":
        return f"{name} is for root only", False
    if terms.account and not _admits(terms.account, partition.allow_accounts, partition.deny_accounts):
        return f"{name} does not admit the account {terms.account}", False
    if qos and not _admits(qos, partition.allow_qos, partition.deny_qos):
        return f"{name} does not admit the QOS {qos}", False
    groups = partition.allow_groups
    if (
        groups is not None
        and cluster.groups is not None
        and cluster.user != "root"
        and not groups & cluster.groups
    ):
        return f"{name} is for members of the group {_listed(groups)} only", False
    if partition.min_nodes > 1:
        return f"{name} wants {partition.min_nodes} nodes for a job, and hpcft asks for one", False
    if partition.state == "DOWN":
        return f"{name} is down, and its jobs wait until it is up again", True
    if cluster.nodes and not any(node.is_in_service for node in nodes_of(partition, cluster)):
        return f"{name} has no node in service, and its jobs wait until it has", True
    return None


def _about_the_site(site: Site, cluster: Cluster) -> Iterator[Problem]:
    if site.cluster is not None and site.cluster.lower() != cluster.name.lower():
        what = f"is {site.cluster}, but Slurm on this machine says ClusterName {cluster.name}"
        yield Problem("site", "cluster", what, f"{cluster.name} here; or log in to {site.cluster}")
    for stage in JOB_KINDS:
        size = site.slurm_for(stage).max_array_size
        if size is not None and cluster.max_array_size is not None and size > cluster.max_array_size:
            what = f"is {size}, but Slurm takes arrays of {cluster.max_array_size} (MaxArraySize) and less"
            accepted = f"at most {cluster.max_array_size}, which is used instead"
            yield Problem("site", _site_key(site, stage, "max_array_size"), what, accepted, "warning")


class _Check:
    """The problems of one job."""

    def __init__(self, site: Site, cluster: Cluster, job: Job, environment: Mapping[str, str]) -> None:
        self.site, self.cluster, self.job, self.environment = site, cluster, job, environment
        self.names = partition_names(job.asked, cluster, environment)
        self.terms = terms_of(job.asked, cluster, environment)

    def problems(self) -> Iterator[Problem]:
        yield from self._account()
        yield from self._qos()
        asked = self.job.asked.partition or self.environment.get("SBATCH_PARTITION")
        for problem in self._with_the_partition():
            # Where none is asked for, the site may choose another one than Slurm's default.
            yield problem if asked else replace(problem, severity="warning")

    def _with_the_partition(self) -> Iterator[Problem]:
        unknown = [name for name in self.names if name not in self.cluster.partitions]
        if unknown or not self.names:
            what = f"there is no partition {_listed(unknown)}" if unknown else "there is no default partition"
            yield self._at("partition", what, _listed(self._open_partitions()))
            return
        yield from self._closed()
        yield from self._time()
        fits_by_kind = list(self._kind_of_node())
        yield from fits_by_kind or self._size_of_node()

    def _at(self, key: str, what: str, accepted: str = "", *, is_error: bool = True) -> Problem:
        where = _site_key(self.site, self.job.stage, key)
        return Problem("site", where, what, accepted, "error" if is_error else "warning")

    def _at_resources(self, key: str, what: str, accepted: str) -> Problem:
        stage = self.job.stage
        if stage == "controller":
            return Problem("site", f"controller.{key}", what, accepted)
        section = "label" if stage == "reference" else stage  # they share their resources
        return Problem("campaign", f"{section}.resources.{key}", what, accepted)

    def _account(self) -> Iterator[Problem]:
        if not self.cluster.has_accounting or not self.cluster.enforced - _NOT_ABOUT_ACCOUNTS:
            return
        mine = self.cluster.associations
        if not mine:
            what = f"the user {self.cluster.user} has no account on {self.cluster.name}, and jobs need one"
            yield self._at("account", what, "none; ask those who run the cluster")
        elif self.terms.account and self.terms.association is None:
            here = {a.account for a in mine if a.partition in (None, *self.names)}
            is_mine = self.terms.account in {a.account for a in mine}
            where = f" in partition {_listed(self.names)}" if is_mine else ""
            from_shell = "" if self.job.asked.account else " (SBATCH_ACCOUNT, or your default)"
            what = f"the user {self.cluster.user} may not use the account {self.terms.account}{from_shell}{where}"
            yield self._at("account", what, _listed(here))

    def _qos(self) -> Iterator[Problem]:
        name = self.job.asked.qos or self.environment.get("SBATCH_QOS")
        association = self.terms.association
        if name is None or not self.cluster.qos:
            return
        mine = association.qos if association and association.qos else tuple(self.cluster.qos)
        if name not in self.cluster.qos:
            what = f"there is no QOS {name}"
        elif name not in mine and "qos" in self.cluster.enforced:
            what = f"the account {self.terms.account} may not use the QOS {name}"
        else:
            return
        # Some sites have a plugin that puts the QOS's true name in place of a short one.
        plugins = self.cluster.job_submit_plugins
        may_change = f" (unless the site's plugin {plugins} makes another of it)" if plugins else ""
        yield self._at("qos", what + may_change, _listed(mine), is_error=not plugins)

    def _open_partitions(self) -> list[str]:
        return [
            p.name for p in self.cluster.partitions.values() if closed(p, self.terms, self.cluster) is None
        ]

    def _closed(self) -> Iterator[Problem]:
        found = [closed(p, self.terms, self.cluster) for p in self.terms.partitions]
        reasons = [reason for reason in found if reason is not None]
        if reasons and (self.terms.all_partitions_must_fit or len(reasons) == len(found)):
            what = "; ".join(text for text, _ in reasons)
            is_error = not any(may_pass for _, may_pass in reasons)
            yield self._at("partition", what, _listed(self._open_partitions()), is_error=is_error)

    def _time(self) -> Iterator[Problem]:
        limit, wish = max_time_min(self.terms, self.cluster), self.job.time_min
        if limit is not None and wish is not None and wish > limit:
            qos = f" with QOS {self.terms.qos.name}" if self.terms.qos else ""
            what = f"is {wish}, but jobs in partition {_listed(self.names)}{qos} end after {limit} min"
            yield self._at_resources("time_min", what, f"at most {limit}")

    def _kind_of_node(self) -> Iterator[Problem]:
        """Features and GPUs that no node in the partitions has at all."""
        asked, where = self.job.asked, f"partition {_listed(self.names)}"
        nodes = [node for p in self.terms.partitions for node in nodes_of(p, self.cluster)]
        if not nodes or suitable_nodes(asked, self.terms, self.cluster):
            return
        wanted, _ = features_of(asked.constraint)
        known = {feature for node in nodes for feature in node.features}
        if missing := [feature for feature in wanted if feature not in known]:
            what = f"no node in {where} has the feature {_listed(missing)}"
            yield self._at("constraint", what, _listed(known) or "no constraint: the nodes have no features")
        elif asked.gpus_per_rank and not any(node.num_gpus for node in nodes):
            with_gpus = {node.partition for node in self.cluster.nodes if node.num_gpus}
            accepted = f"a partition with GPUs ({_listed(with_gpus)}), or 0" if with_gpus else "0"
            yield self._at(
                "gpus_per_rank", f"is {asked.gpus_per_rank}, but no node in {where} has GPUs", accepted
            )
        elif asked.gpu_type and not any(gpus_of_type(node, asked.gpu_type) for node in nodes):
            types = {name for node in nodes for name in node.gpus if name}
            accepted = _listed(types) or "no gpu_type: Slurm does not name the types here"
            yield self._at("gpu_type", f"no node in {where} has a GPU of type {asked.gpu_type}", accepted)
        else:
            and_gpus = " and has GPUs as well" if asked.gpus_per_rank else ""
            what = f"no node in {where} has all features of {asked.constraint}{and_gpus}"
            yield self._at("constraint", what, f"what one node has together: {_features(nodes)}")

    def _size_of_node(self) -> Iterator[Problem]:
        """More of something than the largest of the suitable nodes has, or all of it than any single one."""
        job, nodes = self.job, suitable_nodes(self.job.asked, self.terms, self.cluster)
        if not nodes:
            return
        where = f"a node in partition {_listed(self.names)} has"
        memory_MB = math.ceil((job.memory_GB or 0) * 1024)
        sum_ = _product(job)
        found = []
        if job.gpus > (most := max(_gpus(job, node) for node in nodes)):
            what = f"asks for {job.gpus} GPUs on a node{sum_}, but {where} {most}"
            found.append(self._at("gpus_per_rank", what, f"at most {most} GPUs on a node"))
        if job.cpus is not None and job.cpus > (most := max(node.cpus for node in nodes)):
            what = f"asks for {job.cpus} cores on a node{sum_}, but {where} {most}"
            accepted = f"at most {most} cores on a node"
            at = self._at if job.are_packed else self._at_resources
            found.append(at("tasks_per_job" if job.are_packed else "cpus_per_rank", what, accepted))
        if memory_MB > (most := max(node.memory_MB for node in nodes)):
            what = f"is {job.memory_GB:g}, but {where} {most / 1024:.4g} GB for a job"
            found.append(self._at_resources("memory_GB", what, f"at most {math.floor(most / 10.24) / 100:g}"))
        if not found and not any(
            _gpus(job, n) >= job.gpus and n.cpus >= (job.cpus or 0) and n.memory_MB >= memory_MB
            for n in nodes
        ):
            what = f"no single node has the {job.cpus} cores, {job.gpus} GPUs and {memory_MB} MB that a job wants"
            found.append(self._at("partition", what, "less of them, or another partition"))
        yield from found


def _gpus(job: Job, node: NodeGroup) -> int:
    return gpus_of_type(node, job.asked.gpu_type)


def _product(job: Job) -> str:
    if job.processes == 1:
        return ""
    return f" for {job.processes} {'tasks of tasks_per_job' if job.are_packed else 'ranks'}"


def _site_key(site: Site, stage: JobKind, key: str) -> str:
    """Where the value that this stage has for a key of the slurm section is written, or would be."""
    override = site.controller if stage == "controller" else site.stages.get(stage)
    if override is None or key not in override.model_fields_set:
        return f"slurm.{key}"
    return f"controller.{key}" if stage == "controller" else f"stages.{stage}.{key}"


def _admits(name: str, allowed: frozenset[str] | None, denied: frozenset[str]) -> bool:
    return name not in denied and (allowed is None or name in allowed)


def _features(nodes: list[NodeGroup]) -> str:
    return "; ".join(sorted({_listed(node.features) for node in nodes if node.features})) or "none"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))

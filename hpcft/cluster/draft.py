"""A first site file for a cluster, from what Slurm says about it: every choice in it is marked as a guess."""

from __future__ import annotations

import re

from hpcft.cluster.limits import Cluster, effective, nodes_of, terms_of
from hpcft.cluster.problems import closed
from hpcft.cluster.slurm_answers import Partition
from hpcft.config.site import Site, Slurm
from hpcft.config.yaml_file import dump_yaml
from hpcft.errors import UserError

_STAGES_ON_GPUS = ("explore", "probe", "train")
_COLUMN = 44


def site_name(cluster: Cluster) -> str:
    """The cluster's name as a site may be called."""
    return re.sub(r"[^A-Za-z0-9._-]|^[^A-Za-z0-9]+", "", cluster.name)[:64] or "my-cluster"


def draft_site(cluster: Cluster, name: str) -> str:
    """The text of a site file; UserError where no partition takes jobs of this user."""
    usable = _usable(cluster)
    if not usable:
        raise UserError(
            f"no partition of {cluster.name} takes jobs of {cluster.user} now; look at `sinfo`, and ask those who run the "
            "cluster"
        )
    default = next((p for p in usable if p.is_default), usable[0])
    gpus = _best_with_gpus(usable, cluster)
    why = "Slurm's default" if default.is_default else "the first that takes your jobs; Slurm has no default"
    lines = [
        f"# Cluster {cluster.name} (Slurm {cluster.version}), written by `hpcft site init`: what is marked as a guess was",
        "# chosen from what Slurm says, and nobody has tried it. docs/sites.md and site-configs/generic.yaml explain the keys.",
        "",
        _line(f"name: {_yaml(name)}"),
        _line(f"cluster: {_yaml(cluster.name)}", "ClusterName of `scontrol show config`"),
        "executor: slurm",
        "",
        "# setup:",
        _line(
            "#   - module load python",
            "shell lines that run in each job before the work, if your Python needs any",
        ),
        "",
        "slurm:",
        _line(f"  partition: {_yaml(default.name)}", f"guess: {why}"),
        *(f"  #   {_described(partition, cluster)}" for partition in usable),
        *_account(cluster, default),
        *_limits(cluster, default),
    ]
    if gpus is not None:
        lines += ["", "stages:"]
        for stage in _STAGES_ON_GPUS:
            wish = f"  {stage}: {{partition: {_yaml(gpus.name)}, gpus_per_rank: 1}}"
            lines.append(_line(wish, "guess: it runs the model, and there are GPUs"))
    return "\n".join([*lines, *_controller(cluster, default)]) + "\n"


def _usable(cluster: Cluster) -> list[Partition]:
    found = []
    for partition in cluster.partitions.values():
        terms = terms_of(Slurm(partition=_plain(partition.name)), cluster, {})
        if _plain(partition.name) and closed(partition, terms, cluster) is None:
            found.append(partition)
    return found


def _plain(name: str) -> str | None:
    """The name if a site file can hold it: some partitions have blanks in theirs."""
    return name if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._@:+/-]*", name) else None


def _best_with_gpus(usable: list[Partition], cluster: Cluster) -> Partition | None:
    """One that has nothing but GPU nodes rather than a mixed one, then the one with most of them."""
    found = []
    for partition in usable:
        nodes = nodes_of(partition, cluster)
        with_gpus = sum(node.num_nodes for node in nodes if node.num_gpus)
        if with_gpus:
            found.append((any(not node.num_gpus for node in nodes), -with_gpus, partition.name, partition))
    return min(found, key=lambda choice: choice[:3])[3] if found else None


def _described(partition: Partition, cluster: Cluster) -> str:
    nodes = nodes_of(partition, cluster)
    cores, memory = max((n.cpus for n in nodes), default=0), max((n.memory_MB for n in nodes), default=0)
    time = f"{partition.max_time_min} min" if partition.max_time_min else "no time limit"
    gpus = sorted(
        {f"{count} GPUs{f' ({kind})' if kind else ''}" for n in nodes for kind, count in n.gpus.items()}
    )
    has = ", ".join([f"{cores} cores", f"{memory / 1024:.3g} GB", *gpus])
    return f"{partition.name}: {sum(n.num_nodes for n in nodes)} nodes of at most {has}; {time}"


def _account(cluster: Cluster, partition: Partition) -> list[str]:
    if not cluster.has_accounting:
        return [_line("  # account: my-project", "Slurm keeps no accounts here")]
    terms = terms_of(Slurm(partition=partition.name), cluster, {})
    accounts = ", ".join(sorted({a.account for a in cluster.associations}))
    lines = [_line("  # account: my-project", "Slurm knows no default; left out, it decides")]
    if terms.association is not None:
        lines = [
            _line(f"  account: {_yaml(terms.association.account)}", f"guess: your default; yours: {accounts}")
        ]
    if terms.qos is not None and terms.association is not None:
        names = ", ".join(terms.association.qos)
        lines.append(_line(f"  qos: {_yaml(terms.qos.name)}", f"guess: your default; yours: {names}"))
    return lines


def _limits(cluster: Cluster, partition: Partition) -> list[str]:
    """Slurm's limits as comments: hpcft asks for them whenever it runs, so that they need not be written down."""
    site = Site(name="draft", executor="slurm", slurm=Slurm(partition=partition.name))
    limits = effective(site, "label", cluster, {})
    found = {
        "max_array_size": limits.max_array_size,
        "max_submitted": limits.max_submitted,
        "max_time_min": limits.max_time_min,
        "max_memory_GB": None if limits.max_memory_GB is None else f"{limits.max_memory_GB:.4g}",
    }
    known = [f"  # {key}: {value}" for key, value in found.items() if value is not None]
    return [_line(line, "Slurm's own limit, which holds anyway") for line in known]


def _controller(cluster: Cluster, partition: Partition) -> list[str]:
    """A shorter controller where its usual time is over the partition's."""
    site = Site(name="draft", executor="slurm", slurm=Slurm(partition=partition.name))
    most = effective(site, "controller", cluster, {}).max_time_min
    if most is None or most >= site.controller.time_min:
        return []
    return ["", _line(f"controller: {{time_min: {most}}}", f"guess: all that {partition.name} gives")]


def _yaml(text: str) -> str:
    """The text, in quotes where YAML would read something else: an account may be called 0123 or no."""
    return dump_yaml({"x": text}).strip().removeprefix("x: ")


def _line(text: str, comment: str = "") -> str:
    return f"{text:<{_COLUMN}}  # {comment}" if comment else text

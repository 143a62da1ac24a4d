"""hpcft check, and hpcft site init: a site and a campaign against the cluster, before anything is submitted."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from hpcft.errors import SchedulerUnavailable, UserError

if TYPE_CHECKING:
    from hpcft.cli.preflight import Estimate, Inputs
    from hpcft.cluster.limits import Cluster
    from hpcft.cluster.problems import Problem
    from hpcft.config.campaign import Campaign
    from hpcft.config.site import Site

app = typer.Typer(help="Describe a cluster.", no_args_is_help=True)

_Read = TypeVar("_Read")
_EXIT_ERRORS = 2


def check(
    campaign_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CAMPAIGN.yaml]",
            help="The campaign's YAML file; without: only the site.",
            show_default=False,
        ),
    ] = None,
    site_file: Annotated[
        Path | None, typer.Option("--site", help="Site config; default: this machine, without Slurm.")
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Campaign folder; default: runs/NAME below the current folder."),
    ] = None,
) -> None:
    """Say what the cluster would refuse or never start, and what a run would lack; nothing is submitted or written."""
    from hpcft.cli import preflight
    from hpcft.config.campaign import load_campaign
    from hpcft.config.site import default_site, load_site, missing_executables

    mistakes: list[UserError] = []
    site = _read(lambda: load_site(site_file) if site_file else default_site(), mistakes)
    campaign = _read(lambda: load_campaign(campaign_file) if campaign_file else None, mistakes)
    if site is None or mistakes:
        raise UserError("\n".join(map(str, mistakes)))
    inputs = _read(lambda: preflight.read_inputs(campaign) if campaign else None, mistakes)
    needed = preflight.estimate(campaign, site, inputs) if campaign and inputs else None
    root = directory or (Path("runs") / campaign.name if campaign else None)
    root = root.absolute() if root else None
    found = [*preflight.machine_problems(site, campaign), *_unreadable(mistakes)]
    found += preflight.reference_problems(site, campaign, inputs) if campaign else []
    found += preflight.folder_problems(root, needed) if root else []
    asks_slurm = site.executor == "slurm" and not missing_executables(site)
    cluster, silence = _ask_slurm() if asks_slurm else (None, None)
    found += _refused(site, campaign, cluster)
    _print_summary(site, cluster, campaign, inputs)
    _print_needs(root, needed)
    nothing = "no problems found" if silence is None else "no problems found without Slurm"
    _print_problems(found, {"site": site_file, "campaign": campaign_file}, nothing)
    if silence is not None:
        raise SchedulerUnavailable(f"Slurm was not asked about its limits: {silence}")
    if any(problem.severity == "error" for problem in found):
        raise typer.Exit(_EXIT_ERRORS)


@app.command()
def init(
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the site; default: the cluster's.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write; default: NAME.yaml here.")] = None,
) -> None:
    """Write a first site config from what this cluster says about itself."""
    from hpcft.cluster.draft import draft_site, site_name
    from hpcft.cluster.limits import read_cluster

    if missing := [program for program in ("scontrol", "sinfo") if shutil.which(program) is None]:
        raise UserError(
            f"{' and '.join(missing)} cannot be found on this machine, so there is no Slurm to ask; log in to the cluster, "
            "or run here without a site config"
        )
    cluster = read_cluster()
    name = name or site_name(cluster)
    path = out or Path(f"{name}.yaml")
    if not path.parent.is_dir():
        raise UserError(
            f"there is no folder {path.parent} for {path.name}; make it, or name another file with --out"
        )
    if not _write_once(path, draft_site(cluster, name)):
        raise UserError(f"{path} exists and is left as it is; name another file with --out, or delete it")
    typer.echo(f"{path} written. Look at what is marked as a guess, then: hpcft check --site {path}")


def _write_once(path: Path, text: str) -> bool:
    """Whether the file is new; UserError for a text that is no site, such as one whose name no site may have."""
    from hpcft.config.site import load_site
    from hpcft.storage.atomic import publish_once, temporary_beside

    temporary = temporary_beside(path)
    try:
        temporary.write_text(text)
        load_site(temporary)
        return publish_once(temporary, path)
    except UserError as mistake:
        raise UserError(str(mistake).replace(str(temporary), str(path))) from mistake
    finally:
        temporary.unlink(missing_ok=True)


def _read(read: Callable[[], _Read], mistakes: list[UserError]) -> _Read | None:
    try:
        return read()
    except UserError as mistake:
        mistakes.append(mistake)
        return None


def _unreadable(mistakes: list[UserError]) -> Iterator[Problem]:
    from hpcft.cluster.problems import Problem

    for mistake in mistakes:
        yield Problem("campaign", "structures", str(mistake))


def _refused(site: Site, campaign: Campaign | None, cluster: Cluster | None) -> list[Problem]:
    from hpcft.cluster.problems import problems

    return problems(site, campaign, cluster) if cluster is not None else []


def _ask_slurm() -> tuple[Cluster | None, SchedulerUnavailable | None]:
    from hpcft.cluster.limits import read_cluster

    try:
        return read_cluster(), None
    except SchedulerUnavailable as silence:
        return None, silence


def _print_summary(
    site: Site, cluster: Cluster | None, campaign: Campaign | None, inputs: Inputs | None
) -> None:
    if site.executor == "local":
        typer.echo(f"site {site.name}: tasks are processes on this machine")
    elif cluster is None:
        typer.echo(f"site {site.name}: Slurm, which was not asked about its limits")
    else:
        size = f", arrays of at most {cluster.max_array_size}" if cluster.max_array_size else ""
        typer.echo(f"site {site.name}: cluster {cluster.name}, Slurm {cluster.version}{size}")
    if campaign is not None:
        replicas = f", {inputs.num_replicas} replicas, {inputs.num_atoms} atoms in all" if inputs else ""
        rounds = f"{campaign.rounds} round{'s' * (campaign.rounds != 1)}"
        typer.echo(f"campaign {campaign.name}: {rounds}{replicas}")
    if campaign is not None or site.executor == "slurm":
        typer.echo()
        for row in _rows(site, cluster, campaign, inputs):
            typer.echo("{:<11}{:>6}{:>6}{:>6}{:>5}{:>7}{:>13}{:>11}  {}".format(*row).rstrip())


def _rows(
    site: Site, cluster: Cluster | None, campaign: Campaign | None, inputs: Inputs | None
) -> Iterator[tuple[str, ...]]:
    """Cells of the table of stages: tasks of a round; the others for one task, or for one job of packed ones."""
    from hpcft.cli.preflight import num_tasks
    from hpcft.cluster.jobs import JOB_KINDS, job_of, ranks_of
    from hpcft.cluster.limits import effective, partition_names
    from hpcft.config.campaign import STAGES

    is_slurm = site.executor == "slurm"
    yield "stage", "tasks", "ranks", "cores", "GPUs", "GB", "min (limit)", "max jobs", "partition"
    for stage in JOB_KINDS if is_slurm else STAGES:
        tasks = num_tasks(campaign, stage, inputs) if campaign and stage != "controller" else None
        job = job_of(site, stage, campaign)
        limits = effective(site, stage, cluster)
        names = partition_names(job.asked, cluster) if cluster else (job.asked.partition or "",)
        limit = f" ({limits.max_time_min})" if limits.max_time_min else ""
        yield (
            stage,
            _cell(tasks),
            _cell(ranks_of(campaign, stage) if campaign else None),
            _cell(job.cpus),
            _cell(job.gpus if campaign or stage == "controller" else job.asked.gpus_per_rank),
            _cell(job.memory_GB),
            _cell(job.time_min) + limit,
            _cell(limits.max_submitted),
            ", ".join(names),
        )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _print_needs(root: Path | None, needed: Estimate | None) -> None:
    from hpcft.cli.preflight import free_space, in_bytes, nearest_folder

    if root is None:
        return
    typer.echo()
    free_bytes, free_files = free_space(nearest_folder(root))
    room = in_bytes(free_bytes) + ("" if free_files is None else f" and {free_files} files")
    typer.echo(f"folder   {root}: room for {room}")
    if needed is not None:
        typer.echo(f"writes   about {needed.num_files} files and {in_bytes(needed.num_bytes)} (estimate)")
        hours = f"{needed.core_hours:.3g} core-hours and {needed.gpu_hours:.3g} GPU-hours"
        typer.echo(f"takes    at most {hours}, were each task to use up its time limit once (estimate)")


def _print_problems(found: Iterable[Problem], files: dict[str, Path | None], nothing: str) -> None:
    found = sorted(dict.fromkeys(found), key=lambda problem: problem.severity != "error")
    width = min(shutil.get_terminal_size().columns, 120)
    typer.echo()
    for problem in found:
        # A key such as stages.train.partition says by itself whom it concerns.
        is_shared = problem.stages and problem.key.startswith("slurm.")
        stages = f" ({', '.join(problem.stages)})" if is_shared else ""
        first = f"{problem.severity:<9}{_place(problem, files)}: {problem.what}{stages}"
        accepted = f"accepted: {problem.accepted}"
        for text, indent in ((first, ""), (accepted, " " * 9)):
            if text != "accepted: ":
                typer.echo(_wrapped(text, indent, width))
    counts = {kind: sum(p.severity == kind for p in found) for kind in ("error", "warning")}
    words = [f"{count} {kind}{'s' * (count != 1)}" for kind, count in counts.items() if count]
    typer.echo(", ".join(words) or nothing)


def _wrapped(text: str, indent: str, width: int) -> str:
    # Paths and names stay whole, so that they can be copied.
    return textwrap.fill(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=" " * 9,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _place(problem: Problem, files: dict[str, Path | None]) -> str:
    """File, line and key, as other mistakes are named; the key alone where it stands in no file."""
    from hpcft.config.yaml_file import load_yaml

    path = files.get(problem.source)
    if path is None:
        return problem.key
    document, keys = load_yaml(path), tuple(problem.key.split("."))
    lines = (document.line_of(keys[:length]) for length in range(len(keys), -1, -1))
    line = next((number for number in lines if number is not None), 1)
    return f"{path}:{line}: {problem.key}"

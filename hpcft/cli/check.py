"""hpcft check: a site, and a campaign or labels alone, against machine and cluster, before anything is submitted."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from hpcft.errors import SchedulerUnavailable, UserError
from hpcft.storage.campaign_folder import CampaignFolder

if TYPE_CHECKING:
    from hpcft.cli.preflight import Estimate, Inputs
    from hpcft.cluster.limits import Cluster
    from hpcft.cluster.problems import Problem
    from hpcft.config.settings import Settings
    from hpcft.config.site import Site

_Read = TypeVar("_Read")
_EXIT_ERRORS = 2


def check(
    campaign: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CAMPAIGN.yaml]",
            help="The campaign's YAML file, or the folder of a campaign or of labels; without: only the site.",
            show_default=False,
        ),
    ] = None,
    site_file: Annotated[
        Path | None,
        typer.Option(
            "--site", help="Site config; default: this machine, without Slurm, or the folder's last one."
        ),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Campaign folder; default: runs/NAME below the current folder."),
    ] = None,
) -> None:
    """Say what the cluster would refuse or never start, and what a run would lack; nothing is submitted or written.

    Before labels alone: `hpcft label ... --dry-run`.
    """
    if campaign is not None and campaign.is_dir():
        _check_folder(CampaignFolder(campaign.absolute()), site_file)
        return
    from hpcft.config.site import default_site, load_site

    mistakes: list[UserError] = []
    site = _read(lambda: load_site(site_file) if site_file else default_site(), mistakes)
    settings = _read(lambda: _load_campaign(campaign) if campaign else None, mistakes)
    if site is None or mistakes:
        raise UserError("\n".join(map(str, mistakes)))
    root = directory or (Path("runs") / settings.name if settings else None)
    examine(site, settings, root.absolute() if root else None, {"site": site_file, "campaign": campaign})


def _load_campaign(path: Path) -> Settings:
    from hpcft.config.campaign import load_campaign
    from hpcft.config.yaml_file import load_yaml

    if path.is_file() and "calculator" in load_yaml(path).data:
        raise UserError(
            f"{path} describes a reference and no campaign; to check what labels a file of structures by it: hpcft label "
            f"IN.extxyz --reference {path} --dry-run"
        )
    return load_campaign(path)


def _check_folder(folder: CampaignFolder, site_file: Path | None) -> None:
    from hpcft.campaign.settings import settings_of, site_of
    from hpcft.config.site import load_site

    settings = settings_of(folder)
    site = load_site(site_file) if site_file else site_of(folder)
    examine(site, settings, folder.root, {"site": site_file}, folder)


def examine(
    site: Site,
    settings: Settings | None,
    root: Path | None,
    files: Mapping[str, Path | None],
    folder: CampaignFolder | None = None,
) -> None:
    """Print what was found; typer.Exit for an error, SchedulerUnavailable where Slurm was not heard.

    `files` are what the user wrote, by the source of a problem; `root` is or will be the folder. With a `folder` that has
    begun its own copies of the inputs count.
    """
    from hpcft.cli import preflight
    from hpcft.config.site import missing_executables

    mistakes: list[UserError] = []
    inputs = _read(lambda: preflight.read_inputs(settings, folder) if settings else None, mistakes)
    needed = preflight.estimate(settings, site, inputs) if settings and inputs and not folder else None
    found = [*preflight.machine_problems(site, settings), *_unreadable(mistakes, settings)]
    found += preflight.reference_problems(site, settings, inputs) if settings else []
    if settings and inputs and not folder and not any(p.severity == "error" for p in found):
        found += preflight.structure_problems(settings)
    found += preflight.folder_problems(root, needed) if root else []
    asks_slurm = site.executor == "slurm" and not missing_executables(site)
    cluster, silence = _ask_slurm() if asks_slurm else (None, None)
    found += _refused(site, settings, cluster)
    _print_summary(site, cluster, settings, inputs)
    _print_needs(root, needed)
    nothing = "no problems found" if silence is None else "no problems found without Slurm"
    is_label = settings is not None and settings.kind == "label"
    _print_problems(found, files, nothing, reference_file=is_label)
    if silence is not None:
        raise SchedulerUnavailable(f"Slurm was not asked about its limits: {silence}")
    if any(problem.severity == "error" for problem in found):
        raise typer.Exit(_EXIT_ERRORS)


def _read(read: Callable[[], _Read], mistakes: list[UserError]) -> _Read | None:
    try:
        return read()
    except UserError as mistake:
        mistakes.append(mistake)
        return None


def _unreadable(mistakes: list[UserError], settings: Settings | None) -> Iterator[Problem]:
    from hpcft.cluster.problems import Problem

    for mistake in mistakes:
        is_key = settings is not None and settings.kind == "campaign"
        yield Problem("campaign" if is_key else "machine", "structures", str(mistake))


def _refused(site: Site, settings: Settings | None, cluster: Cluster | None) -> list[Problem]:
    from hpcft.cluster.problems import problems

    return problems(site, settings, cluster) if cluster is not None else []


def _ask_slurm() -> tuple[Cluster | None, SchedulerUnavailable | None]:
    from hpcft.cluster.limits import read_cluster

    try:
        return read_cluster(), None
    except SchedulerUnavailable as silence:
        return None, silence


def _print_summary(
    site: Site, cluster: Cluster | None, settings: Settings | None, inputs: Inputs | None
) -> None:
    if site.executor == "local":
        typer.echo(f"site {site.name}: tasks are processes on this machine")
    elif cluster is None:
        typer.echo(f"site {site.name}: Slurm, which was not asked about its limits")
    else:
        size = f", arrays of at most {cluster.max_array_size}" if cluster.max_array_size else ""
        typer.echo(f"site {site.name}: cluster {cluster.name}, Slurm {cluster.version}{size}")
    if settings is not None:
        typer.echo(_in_short(settings, inputs))
    if settings is not None or site.executor == "slurm":
        typer.echo()
        for row in _rows(site, cluster, settings, inputs):
            typer.echo("{:<11}{:>6}{:>6}{:>6}{:>5}{:>7}{:>13}{:>11}  {}".format(*row).rstrip())


def _in_short(settings: Settings, inputs: Inputs | None) -> str:
    if settings.kind == "label":
        counts = [f"{inputs.num_structures} structures, {inputs.num_atoms} atoms in all"] if inputs else []
        return ": ".join([f"labels {settings.name}", *counts])
    replicas = f", {inputs.num_structures} replicas, {inputs.num_atoms} atoms in all" if inputs else ""
    return f"campaign {settings.name}: {settings.rounds} round{'s' * (settings.rounds != 1)}{replicas}"


def _rows(
    site: Site, cluster: Cluster | None, settings: Settings | None, inputs: Inputs | None
) -> Iterator[tuple[str, ...]]:
    """Cells of the table of stages: tasks of a round; the others for one task, or for one job of packed ones."""
    from hpcft.cli.preflight import num_tasks
    from hpcft.cluster.jobs import job_kinds, job_of, ranks_of
    from hpcft.cluster.limits import effective, partition_names

    is_slurm = site.executor == "slurm"
    yield "stage", "tasks", "ranks", "cores", "GPUs", "GB", "min (limit)", "max jobs", "partition"
    for stage in job_kinds(settings):
        if stage == "controller" and not is_slurm:
            continue
        tasks = num_tasks(settings, stage, inputs) if settings and stage != "controller" else None
        job = job_of(site, stage, settings)
        limits = effective(site, stage, cluster)
        names = partition_names(job.asked, cluster) if cluster else (job.asked.partition or "",)
        limit = f" ({limits.max_time_min})" if limits.max_time_min else ""
        yield (
            stage,
            _cell(tasks),
            _cell(ranks_of(settings, stage) if settings else None),
            _cell(job.cpus),
            _cell(job.gpus if settings or stage == "controller" else job.asked.gpus_per_rank),
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


def _print_problems(
    found: Iterable[Problem], files: Mapping[str, Path | None], nothing: str, *, reference_file: bool
) -> None:
    """In a file of a `reference` alone its keys stand at the top."""
    found = sorted(dict.fromkeys(found), key=lambda problem: problem.severity != "error")
    width = min(shutil.get_terminal_size().columns, 120)
    typer.echo()
    for problem in found:
        # A key such as stages.train.partition says by itself whom it concerns.
        is_shared = problem.stages and problem.key.startswith("slurm.")
        stages = f" ({', '.join(problem.stages)})" if is_shared else ""
        key = problem.key.removeprefix("reference.") if reference_file else problem.key
        place = _place(key, files.get(problem.source))
        first = f"{problem.severity:<9}{place}: {problem.what}{stages}"
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


def _place(key: str, path: Path | None) -> str:
    """File, line and key, as other mistakes are named; the key alone where it stands in no file."""
    from hpcft.config.yaml_file import load_yaml

    if path is None:
        return key
    document, keys = load_yaml(path), tuple(key.split("."))
    lines = (document.line_of(keys[:length]) for length in range(len(keys), -1, -1))
    line = next((number for number in lines if number is not None), 1)
    return f"{path}:{line}: {key}"

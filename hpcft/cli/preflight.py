"""What a run needs of this machine, and an estimate of what it will take: read and measured, nothing is changed."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpcft.cluster.jobs import max_tasks, ranks_of
from hpcft.cluster.problems import Problem
from hpcft.config.campaign import Campaign, StageName
from hpcft.config.label_run import LabelRun
from hpcft.config.settings import Settings
from hpcft.config.site import Site, missing_executables
from hpcft.errors import UserError
from hpcft.storage.campaign_folder import CampaignFolder, stages_of

# Seen in finished campaigns: a stage keeps a plan, a product, its tasks' results and its history; a task its folder and
# at most five files; while a stage runs, each task has a lock, logs and submitit's files as well.
_FILES_PER_STAGE, _FILES_PER_TASK, _FILES_PER_RUNNING_TASK, _FILES_PER_CAMPAIGN = 7, 6, 10, 20
_BYTES_PER_TASK = 50_000
_ARRAYS = 3  # positions, velocities or displacements, forces
_BYTES_PER_ATOM_OF_A_TRAJECTORY = _ARRAYS * 3 * 4
_BYTES_PER_ATOM_OF_A_LABEL = _ARRAYS * 3 * 8
_BYTES_PER_ATOM_AS_TEXT = 130
_STEPS_OF_A_RELAXATION = 25
_MODELS_PER_ROUND = 5  # the model, and a checkpoint with averages and the optimiser's two moments
_IMAGES = (".sif", ".sqsh", ".sqfs", ".img")


@dataclass(frozen=True)
class Inputs:
    """What the estimate must know of the input files."""

    num_structures: int
    """Replicas of a campaign; of labels alone what is labelled."""
    num_atoms: int
    """Atoms of all of them."""
    num_bytes: int
    """Size of all input files."""
    model_bytes: int
    symbols: tuple[str, ...] = ()
    """Chemical symbols of all that is labelled."""


@dataclass(frozen=True)
class Estimate:
    """What a campaign takes at most or about: orders of magnitude, not promises."""

    num_files: int
    num_bytes: int
    core_hours: float
    gpu_hours: float


def read_inputs(settings: Settings, folder: CampaignFolder | None = None) -> Inputs:
    """UserError for a file that cannot be read. Of a folder that has begun it is the copies that count."""
    from hpcft.storage.structures import read_any  # ASE, which takes its time

    paths = settings.structure_files()
    models = [settings.foundation] if isinstance(settings, Campaign) else []
    if folder is not None:
        paths = {name: folder.inputs / f"{name}.h5" for name in paths}
        models = [folder.inputs / str(folder.read_identity()["foundation_file"]) for _ in models]
    structures = read_any(paths["structures"])
    others = [path for name, path in paths.items() if name.startswith("relaxations")]
    labelled = [*structures, *(atoms for path in others for atoms in read_any(path))]
    model_bytes = sum(path.stat().st_size for path in models)
    return Inputs(
        num_structures=len(structures),
        num_atoms=sum(len(atoms) for atoms in structures),
        num_bytes=sum(path.stat().st_size for path in set(paths.values())) + model_bytes,
        model_bytes=model_bytes,
        symbols=tuple(sorted({symbol for atoms in labelled for symbol in atoms.symbols})),
    )


def num_tasks(settings: Settings, stage: StageName, inputs: Inputs | None) -> int:
    """Tasks of the stage in one round; no more than there are structures to share out."""
    tasks = max_tasks(settings, stage) or 1
    is_bounded = stage in ("explore", "probe") or settings.kind == "label"
    return min(tasks, inputs.num_structures) if inputs and is_bounded else tasks


def estimate(settings: Settings, site: Site, inputs: Inputs) -> Estimate:
    """Files and bytes of all that is done, and the hours of its tasks if each takes all of its time limit, once."""
    tasks = {stage: num_tasks(settings, stage, inputs) for stage in settings.stages}
    rounds = range(settings.rounds + 1)
    times = {stage: sum(stage in stages_of(round_, settings.kind) for round_ in rounds) for stage in tasks}
    total = sum(tasks[stage] * times[stage] for stage in tasks)
    files = _FILES_PER_CAMPAIGN + _FILES_PER_STAGE * sum(times.values()) + _FILES_PER_TASK * total
    files += _FILES_PER_RUNNING_TASK * max(tasks.values())
    core_min = gpu_min = 0
    for stage in tasks:
        wish, ranks = settings.resources_for(stage), ranks_of(settings, stage)
        rank_min = wish.time_min * tasks[stage] * times[stage] * ranks
        core_min += rank_min * wish.cpus_per_rank
        gpu_min += rank_min * (site.slurm_for(stage).gpus_per_rank if site.executor == "slurm" else 0)
    written = (
        _bytes(settings, inputs) if isinstance(settings, Campaign) else _bytes_of_labels(settings, inputs)
    )
    return Estimate(
        num_files=files,
        num_bytes=written + _BYTES_PER_TASK * total,
        core_hours=core_min / 60,
        gpu_hours=gpu_min / 60,
    )


def _bytes(campaign: Campaign, inputs: Inputs) -> int:
    rounds, atoms_of_a_frame = campaign.rounds, inputs.num_atoms / max(1, inputs.num_structures)
    explored = inputs.num_atoms * campaign.explore.num_frames * rounds * _BYTES_PER_ATOM_OF_A_TRAJECTORY
    probed = inputs.num_atoms * campaign.probe.frames * (rounds + 1) * _BYTES_PER_ATOM_OF_A_TRAJECTORY
    # A frame stands in the selection or beside the probe, and with its label.
    labelled = campaign.select.frames * rounds + campaign.probe.frames * inputs.num_structures * (rounds + 1)
    labels = 2 * labelled * atoms_of_a_frame * _BYTES_PER_ATOM_OF_A_LABEL
    models = _MODELS_PER_ROUND * inputs.model_bytes * rounds
    return int(explored + probed + labels + models + inputs.num_bytes)


def _bytes_of_labels(settings: Settings, inputs: Inputs) -> int:
    """A label stands in a journal while its task is at work, in HDF5, and in a file for people."""
    frames = _STEPS_OF_A_RELAXATION if isinstance(settings, LabelRun) and settings.relaxation else 1
    return (
        inputs.num_atoms * frames * (_BYTES_PER_ATOM_OF_A_LABEL + 2 * _BYTES_PER_ATOM_AS_TEXT)
        + inputs.num_bytes
    )


def machine_problems(
    site: Site, settings: Settings | None, which: Callable[[str], str | None] = shutil.which
) -> list[Problem]:
    """What this machine lacks for the site, and time limits that contradict each other."""
    found = [*_programs(site, which), *_cpu_limit(site)]
    return [*found, *_time_limits(settings), *_shared_store(settings)] if settings else found


def reference_problems(
    site: Site,
    settings: Settings,
    inputs: Inputs | None,
    which: Callable[[str], str | None] = shutil.which,
) -> list[Problem]:
    """What this machine lacks for the reference calculations; what the jobs' own environment may bring is a warning."""
    from hpcft.labelling.presets import launcher
    from hpcft.labelling.requirements import lacks, scratch_lacks

    ranks = settings.label.ranks_per_calculation
    mpi = launcher(site.mpi_launcher, ranks)
    is_local = site.executor == "local"
    # In a job even a single rank may not start without it: Open MPI looks for Slurm's PMI.
    needs_mpi = ranks > 1 or not is_local
    found = [
        Problem(
            "campaign",
            f"reference.{lack.key}",
            lack.what,
            lack.accepted,
            "warning" if site.python or (lack.may_come_later and not is_local) else "error",
        )
        for lack in lacks(
            settings.reference, inputs.symbols if inputs else (), mpi, which, needs_mpi=needs_mpi
        )
    ]
    # The nodes of a cluster have scratch of their own.
    severity: Literal["error", "warning"] = "error" if is_local else "warning"
    accepted = "a folder on a local disk, with room for the files of running calculations"
    return [*found, *(Problem("machine", "TMPDIR", what, accepted, severity) for what in scratch_lacks())]


def _programs(site: Site, which: Callable[[str], str | None]) -> Iterator[Problem]:
    if missing := missing_executables(site, which):
        what = f"is slurm, but {', '.join(missing)} cannot be found on this machine"
        yield Problem("site", "executor", what, "a machine of the cluster; or local, for tasks on this one")
    if not site.python:
        return
    program = site.python[0]
    if which(program) is None:
        # A module that setup loads may bring it; a path is there or not.
        is_path = "/" in program
        what = f"there is no program {program} on this machine" + ("" if is_path else "'s PATH")
        accepted = "the path of a program" if is_path else "a program that the lines of setup bring"
        yield Problem("site", "python", what, accepted, "error" if is_path else "warning")
    for word in site.python[1:]:
        if word.startswith("/") and word.endswith(_IMAGES) and not Path(word).exists():
            yield Problem(
                "site", "python", f"there is no image {word} on this machine", "the path of an image"
            )


def _cpu_limit(site: Site) -> Iterator[Problem]:
    limit_s, _ = resource.getrlimit(resource.RLIMIT_CPU)
    if limit_s != resource.RLIM_INFINITY:
        whose = "tasks among them" if site.executor == "local" else "`hpcft run` among them"
        what = f"each process here is ended after {limit_s / 60:g} min of CPU time (ulimit -t), {whose}"
        yield Problem("machine", "ulimit", what, "a machine without that limit", "warning")


def structure_problems(settings: Settings) -> list[Problem]:
    """The first structure with which a run would be refused; whether the model knows its elements is left to the run."""
    from hpcft.campaign.create import check_inputs
    from hpcft.campaign.create import read_inputs as read_all
    from hpcft.campaign.create_labels import read_suitable

    try:
        if isinstance(settings, LabelRun):
            read_suitable(settings)
        elif isinstance(settings, Campaign):
            check_inputs(settings, read_all(settings))
    except UserError as refusal:
        key = str(settings.structures) if isinstance(settings, LabelRun) else "structures"
        return [Problem("machine", key, str(refusal))]
    return []


def _shared_store(settings: Settings) -> Iterator[Problem]:
    store = settings.label.store
    if store is None:
        return
    nearest = next(path for path in (store, *store.parents) if path.exists())
    if not os.access(nearest, os.R_OK | os.W_OK | os.X_OK):
        what = f"names {store}, but you cannot write in {nearest}, so that no label could be registered there"
        yield Problem("campaign", "label.store", what, "a folder that you can write")


def _time_limits(settings: Settings) -> Iterator[Problem]:
    calculation_s, task_min = settings.reference.time_limit_s, settings.label.resources.time_min
    if calculation_s > 60 * task_min:
        what = f"lets one calculation take {calculation_s:g} s, but its task ends after {task_min} min"
        accepted = f"at most {60 * task_min}, or more label.resources.time_min"
        yield Problem("campaign", "reference.time_limit_s", what, accepted, "warning")


def folder_problems(root: Path, needed: Estimate | None) -> list[Problem]:
    """Why a campaign folder cannot be made at `root`, or not be filled."""
    from hpcft.campaign.new_folder import refuse_hostile_name, refuse_shared

    there = nearest_folder(root)
    found: list[Problem] = []
    for refuse, path in ((refuse_hostile_name, root), (refuse_shared, root if root.exists() else None)):
        try:
            if path is not None:
                refuse(path)
        except UserError as refusal:
            found.append(Problem("machine", "--dir", str(refusal)))
    if root.exists() and not root.is_dir():
        return [*found, Problem("machine", "--dir", f"{root} is a file", "a folder, or a name that is free")]
    if _is_somebodys(root):
        what = f"{root} has files in it and is no campaign folder"
        found.append(Problem("machine", "--dir", what, "an empty folder, or a name that is free"))
    if not os.access(there, os.W_OK | os.X_OK):
        what = f"you may not write to {there}, so the campaign folder {root} cannot be made or filled"
        found.append(
            Problem("machine", "--dir", what, "a folder of your own on a file system that all nodes see")
        )
    return [*found, *(_space(there, needed) if needed else ())]


def _is_somebodys(root: Path) -> bool:
    """A campaign has an identity, or a lease where its creation was interrupted."""
    own = CampaignFolder(root)
    try:
        return any(root.iterdir()) and not (own.identity.exists() or own.leases.exists())
    except OSError:  # none yet, or one that we may not read, which is said elsewhere
        return False


def nearest_folder(root: Path) -> Path:
    """The folder, or that above it in which it would be made."""
    return next(path for path in (root, *root.parents) if path.is_dir())


def _space(folder: Path, needed: Estimate) -> Iterator[Problem]:
    free_bytes, free_files = free_space(folder)
    if free_bytes < needed.num_bytes:
        what = f"{folder} has {in_bytes(free_bytes)} free, and the campaign will write about {in_bytes(needed.num_bytes)}"
        yield Problem("machine", "--dir", f"{what} (estimate)", "a folder with more room")
    if free_files is not None and free_files < needed.num_files:
        what = f"{folder} has room for {free_files} more files, and the campaign will make about {needed.num_files}"
        yield Problem("machine", "--dir", f"{what} (estimate)", "a folder with more room, or fewer tasks")


def free_space(folder: Path) -> tuple[int, int | None]:
    """Bytes and files that this user may still write, as the file system tells; quotas it may not know.

    None: a file system that does not count its files.
    """
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize, status.f_favail if status.f_files else None


def in_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"

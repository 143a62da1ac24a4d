"""submitit executors from a site: the only place that turns site facts into submission parameters."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError, JobPaths

from hpcft.config.common import Resources
from hpcft.config.site import Site
from hpcft.errors import SchedulerUnavailable, SubmissionRefused

_ALL = 1_000_000
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# sbatch's reason for a job that was not taken. Those that speak of the connection leave open whether it arrived.
_REFUSAL = re.compile(r"Batch job submission failed: (.+)")
_UNCLEAR = re.compile(
    r"timed out|contact|connect|communicat|zero bytes|temporarily|socket|shutting down|in standby|unspecified",
    re.IGNORECASE,
)
# Slurm names the limit on a line of its own, and then, whatever it was, speaks of the submit limit among others.
_LIMIT = re.compile(r"\b(?:Assoc|QOS)[A-Z]\w*")
_TOO_MANY = re.compile(r"Submit|MaxJobCount|too many jobs", re.IGNORECASE)
_ANY_LIMIT = "job submit limit"
_BAD_OPTION = re.compile(r"sbatch: (?:error: )?(?:unrecognized option|Invalid|invalid|option requires)")


@dataclass(frozen=True)
class JobSpec:
    """What all elements of one submission share."""

    name: str
    stage: str
    ranks: int
    """Processes of each job: the ranks of one task, or as many tasks of one rank."""
    resources: Resources
    folder: Path
    """submitit's own folder for this submission."""
    are_packed: bool = False
    """The ranks are tasks of their own: one that fails leaves the others alone."""
    exclude: tuple[str, ...] = ()
    """Nodes not to run on."""
    after: tuple[str, ...] = ()
    """Jobs that must be over before this one starts."""
    begin_in_s: int = 0
    """Not to start before this much time has passed."""

    @property
    def is_held(self) -> bool:
        """Work is released once its job ids are recorded; a controller waits for the jobs before it anyway."""
        return self.stage != "controller"


def submit(
    site: Site, spec: JobSpec, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]
) -> list[str]:
    """Submit one call of `function` per element, as one array where there are several; returns the job ids.

    On Slurm the jobs are held: release them with `hpcft.cluster.slurm.release` once their ids are recorded. Raises
    SubmissionRefused when Slurm has said no, SchedulerUnavailable when nobody knows whether the jobs arrived.
    """
    spec.folder.mkdir(parents=True, exist_ok=True)
    executor = _executor(site, spec)
    complaint = io.StringIO()  # submitit prints it as well as raising it
    with (
        _clean_environment(_variables(site, spec), _kept_options(site, spec)),
        _children_ignore_the_terminal(),
    ):
        try:
            with contextlib.redirect_stderr(complaint):
                jobs = executor.map_array(function, *zip(*arguments, strict=True))
        except (FailedJobError, FailedSubmissionError) as error:
            for path in spec.folder.glob(
                "*.pkl"
            ):  # should the jobs be adopted, their inputs are written anew
                path.unlink(missing_ok=True)
            raise _failure(spec.name, str(error)) from error
    return [str(job.job_id) for job in jobs]


def _failure(name: str, words: str) -> SubmissionRefused | SchedulerUnavailable:
    """What sbatch's words mean: a no, or nothing that can be relied on."""
    refusal = _REFUSAL.search(words)
    reason = refusal[1] if refusal else words
    if (refusal or _BAD_OPTION.search(words)) and not _UNCLEAR.search(reason):
        return SubmissionRefused(f"Slurm refuses {name}: {words.strip()}", is_limit=_is_limit(words, reason))
    return SchedulerUnavailable(
        f"sbatch did not confirm the submission of {name}: {words.strip()}\nShould it have arrived all the same, it "
        "will be found in the queue: go on with hpcft resume."
    )


def _is_limit(words: str, reason: str) -> bool:
    """Whether there are too many jobs, so that fewer or later ones would be taken."""
    named = _LIMIT.search(words)
    if named is not None:
        return bool(_TOO_MANY.search(named[0]))
    return _ANY_LIMIT in reason or bool(_TOO_MANY.search(reason))


def write_inputs(
    folder: Path,
    job_ids: Sequence[str],
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
) -> None:
    """Give jobs that submitit's process did not live to see their input under the names by which they look for it."""
    for job_id, values in zip(job_ids, arguments, strict=True):
        DelayedSubmission(function, *values).dump(JobPaths(folder, job_id, 0).submitted_pickle)


def _executor(site: Site, spec: JobSpec) -> Any:
    if site.executor == "local":
        local = submitit.LocalExecutor(spec.folder)
        local.update_parameters(
            timeout_min=spec.resources.time_min,
            tasks_per_node=spec.ranks,
            **_visible_gpus(),
        )
        return local
    slurm = submitit.SlurmExecutor(
        spec.folder,
        max_num_timeout=0,
        # A controller submits jobs, and a container rarely has Slurm's commands.
        python=shlex.join(site.python) if site.python and spec.stage != "controller" else None,
    )
    slurm.update_parameters(**slurm_parameters(site, spec))
    return slurm


def _visible_gpus() -> dict[str, Any]:
    """submitit's local executor hides all GPUs unless it is told which ones the job may see."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        count = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
        gpus = list(range(count))
    else:
        gpus = [int(number) for number in listed.split(",") if number.strip().isdigit()]
    return {"gpus_per_node": len(gpus), "visible_gpus": gpus} if gpus else {}


def slurm_parameters(site: Site, spec: JobSpec) -> dict[str, Any]:
    """submitit's parameters for one submission: pure, so that tests read the batch script as text."""
    asked = site.slurm_for(spec.stage)  # type: ignore[arg-type]
    additional: dict[str, Any] = {key: value for key, value in asked.options.items() if value is not False}
    additional |= {"hold": True, "requeue": True} if spec.is_held else {"requeue": True}
    if spec.after:
        additional["dependency"] = "afterany:" + ":".join(spec.after)
    if spec.begin_in_s:
        additional["begin"] = f"now+{spec.begin_in_s}"
    if spec.resources.memory_GB is not None:
        num_tasks = spec.ranks if spec.are_packed else 1
        additional["mem"] = f"{math.ceil(spec.resources.memory_GB * num_tasks * 1024)}M"  # 0: the whole node
    parameters: dict[str, Any] = {
        "job_name": spec.name,
        "partition": asked.partition,
        "time": spec.resources.time_min,
        "nodes": 1,
        "ntasks_per_node": spec.ranks,
        "cpus_per_task": spec.resources.cpus_per_rank,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "setup": [*_exports(_variables(site, spec)), *site.setup],
        # Since Slurm 22.05 srun does not inherit the job's CPUs per task.
        "srun_args": [
            f"--kill-on-bad-exit={0 if spec.are_packed else 1}",
            f"--cpus-per-task={spec.resources.cpus_per_rank}",
            *asked.srun_arguments,
        ],
        "additional_parameters": additional,
        # Inside a step Slurm takes no further jobs on some sites, and a controller has one process anyway.
        "use_srun": spec.stage != "controller",
        # submitit's default wckey is rejected by sites that enforce them.
        "wckey": asked.wckey,
    }
    if spec.exclude:
        parameters["exclude"] = ",".join(filter(None, [str(additional.pop("exclude", "")), *spec.exclude]))
    if asked.gpus_per_rank:
        count = asked.gpus_per_rank * spec.ranks
        wanted = f"{asked.gpu_type}:{count}" if asked.gpu_type else count
        if asked.gpu_option == "gres":
            parameters["gres"] = f"gpu:{wanted}"
        else:
            parameters["gpus_per_node"] = wanted
    # submitit's own default would hold an array to 256 elements at once.
    parameters["array_parallelism"] = asked.array_parallelism or _ALL
    return {key: value for key, value in parameters.items() if value is not None or key == "wckey"}


def _variables(site: Site, spec: JobSpec) -> dict[str, str]:
    threads = dict.fromkeys(_THREADS, str(spec.resources.cpus_per_rank))
    # `python -m` would import whatever lies in the current folder: a stray glob.py there breaks every job.
    return {**threads, "PYTHONSAFEPATH": "1", **site.environment}


def _exports(variables: dict[str, str]) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


@contextlib.contextmanager
def _children_ignore_the_terminal() -> Iterator[None]:
    """Ctrl-C and a hang-up reach a terminal's whole foreground group: the manager alone decides what becomes of tasks.

    It hears of them when this is over, not in the middle of a submission.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers, heard = (signal.SIGINT, signal.SIGHUP), list[int]()
    # What is started here inherits the mask. A thread of ours that lacks it, as a live display has one, may be the one
    # that the signal reaches.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    before = {number: signal.signal(number, lambda n, frame: heard.append(n)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in heard:
            signal.raise_signal(late)  # pending, until the next line
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _kept_options(site: Site, spec: JobSpec) -> frozenset[str]:
    """Variables of sbatch that name what the site config leaves to the user."""
    if site.slurm is None:
        return frozenset()
    asked = site.slurm_for(spec.stage)  # type: ignore[arg-type]
    wishes = {
        "SBATCH_ACCOUNT": asked.account,
        "SBATCH_PARTITION": asked.partition,
        "SBATCH_QOS": asked.qos,
        "SBATCH_CONSTRAINT": asked.constraint,
        "SBATCH_RESERVATION": asked.options.get("reservation"),
        "SBATCH_CLUSTERS": asked.options.get("clusters"),
    }
    return frozenset(name for name, wish in wishes.items() if not wish)


@contextlib.contextmanager
def _clean_environment(variables: Mapping[str, str], kept_options: frozenset[str]) -> Iterator[None]:
    """Submit from this process's environment and `variables`, but without what is only true of the job that we run in,
    and without the user's SBATCH_* but `kept_options`: sbatch would prefer them to what the batch script asks for.

    A controller job submits from inside a job, whose SLURM_MEM_PER_CPU and the like contradict the new job's.
    """
    before = dict(os.environ)
    for name in before:
        if name.startswith("SBATCH_") and name not in kept_options:
            del os.environ[name]
    if "SLURM_JOB_ID" in before:
        for name in before:
            if (
                name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "PMI_", "PMIX_"))
                and name not in _KEPT
            ):
                del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)

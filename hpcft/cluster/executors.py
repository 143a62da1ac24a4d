"""submitit executors from a site: the only place that turns site facts into submission parameters."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from hpcft.config.campaign import Resources
from hpcft.config.site import Site
from hpcft.errors import SchedulerUnavailable

_ALL = 1_000_000
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class JobSpec:
    """What all elements of one submission share."""

    name: str
    stage: str
    ranks: int
    resources: Resources
    folder: Path
    """submitit's own folder for this submission."""


def submit(
    site: Site, spec: JobSpec, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]
) -> list[str]:
    """Submit one call of `function` per element, as one array where there are several; returns the job ids.

    On Slurm the jobs are held: release them with `hpcft.cluster.slurm.release` once their ids are recorded. Raises
    SchedulerUnavailable when sbatch fails: then the jobs may have been submitted or not.
    """
    spec.folder.mkdir(parents=True, exist_ok=True)
    executor = _executor(site, spec)
    with _environment(_variables(site, spec)), _children_ignore_ctrl_c():
        try:
            jobs = executor.map_array(function, *zip(*arguments, strict=True))
        except (FailedJobError, FailedSubmissionError) as error:
            raise SchedulerUnavailable(
                f"sbatch did not confirm the submission of {spec.name}: {error}\nShould it have arrived all the same, it "
                "will be found in the queue: go on with hpcft resume."
            ) from error
    return [str(job.job_id) for job in jobs]


def _executor(site: Site, spec: JobSpec) -> Any:
    if site.executor == "local":
        local = submitit.LocalExecutor(spec.folder)
        local.update_parameters(
            timeout_min=spec.resources.time_min,
            tasks_per_node=spec.ranks,
            **_visible_gpus(),
        )
        return local
    slurm = submitit.SlurmExecutor(spec.folder, max_num_timeout=0)
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
    additional |= {"hold": True, "requeue": True}
    if spec.resources.memory_GB is not None:
        additional["mem"] = f"{math.ceil(spec.resources.memory_GB * 1024)}M"  # 0 would be the whole node
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
            "--kill-on-bad-exit=1",
            f"--cpus-per-task={spec.resources.cpus_per_rank}",
            *asked.srun_arguments,
        ],
        "additional_parameters": additional,
        # submitit's default wckey is rejected by sites that enforce them.
        "wckey": asked.wckey,
    }
    if asked.gpus_per_rank:
        parameters["gpus_per_node"] = asked.gpus_per_rank * spec.ranks
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
def _children_ignore_ctrl_c() -> Iterator[None]:
    """Ctrl-C reaches a terminal's whole foreground group: the manager alone decides what becomes of local tasks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """submitit starts local tasks and writes batch scripts from this process's own environment."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

"""Every fact about the machine that campaigns run on; no campaign names a partition, and no code does."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    Strict,
    model_serializer,
)

from hpcft.config.campaign import StageName
from hpcft.config.common import VariableName
from hpcft.config.validate import (
    Count,
    Name,
    OneLine,
    Positive,
    Section,
    Unit,
    matching,
    shown,
    validate,
)
from hpcft.config.yaml_file import KeyPath, load_yaml
from hpcft.errors import UserError

# sacct is not among them: a site without accounting is served by squeue and the tasks' own records.
_SLURM_EXECUTABLES = ("sbatch", "squeue", "scancel", "scontrol", "srun")

JOBSCRIPTS = Path(__file__).parents[2] / "jobscripts"
"""What `{jobscripts}` stands for: the scripts that run inside jobs lie beside the package, not in it."""
_PLACEHOLDER = re.compile(r"(?<!\$)\{(jobscripts|python)\}")  # ${python} is a variable of the shell

_OWN_KEYS = {"partition", "account", "qos", "constraint", "wckey"}
_SET_BY_HPCFT = {
    "array",
    "chdir",
    "cpus-per-task",
    "dependency",
    "error",
    "hold",
    "job-name",
    "mem",
    "no-requeue",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "parsable",
    "requeue",
    "signal",
    "test-only",
    "time",
    "wait",
    "wrap",
}


def _option_name(name: str) -> str:
    if name in _OWN_KEYS:
        raise ValueError(f"is a key of the slurm section itself; write slurm.{name} instead of an option")
    if name in _SET_BY_HPCFT:
        raise ValueError("is set by hpcft from the campaign and the task; delete it here")
    return name


def _option_value(value: object) -> str | int | bool:
    if not isinstance(value, str | int):
        raise ValueError(f"must be text, a whole number, true or false, but is {shown(value)}")
    if isinstance(value, str) and not value.isprintable():
        raise ValueError(f"{shown(value)} is not allowed: it must be one line without control characters")
    return value


def filled_in(text: str, jobscripts: Path, quoted: Callable[[str], str] = str) -> str:
    """The text with this folder for `{jobscripts}` and this interpreter for `{python}`; ValueError without the folder."""

    def value(match: re.Match[str]) -> str:
        if match[1] == "python":
            return quoted(sys.executable)
        if not jobscripts.is_dir():
            raise ValueError(
                f"{{jobscripts}} stands for the folder {jobscripts}, which is not there; install hpcft from a clone of its "
                "repository (pip install -e), or write the path of its folder jobscripts instead"
            )
        return quoted(str(jobscripts))

    return _PLACEHOLDER.sub(value, text)


def _word(text: str) -> str:
    return filled_in(text, JOBSCRIPTS)


def _shell_line(text: str) -> str:
    return filled_in(text, JOBSCRIPTS, shlex.quote)


SlurmName = Annotated[
    str,
    matching(
        r"[A-Za-z0-9_][A-Za-z0-9._,@:+/-]*", "use A-Z a-z 0-9 . _ , @ : + / - and do not begin with a sign"
    ),
]
Constraint = Annotated[
    str,
    matching(
        r"[A-Za-z0-9_(\[!][A-Za-z0-9._,:=&|*()\[\]!+-]*", "write node features and & | * ( ) [ ] between them"
    ),
]
OptionName = Annotated[
    str,
    matching(r"[a-z][a-z-]*", "write a long option of sbatch without its dashes, such as mail-type"),
    AfterValidator(_option_name),
]
OptionValue = Annotated[str | int | bool, PlainValidator(_option_value)]
Word = Annotated[OneLine, AfterValidator(_word)]
Words = Annotated[tuple[Word, ...], Strict(False)]
ShellLines = Annotated[tuple[Annotated[OneLine, AfterValidator(_shell_line)], ...], Strict(False)]


class Slurm(Section):
    """What is asked of Slurm for every job."""

    partition: SlurmName | None = None
    """Partition, or several with commas; left out: the site chooses."""
    account: SlurmName | None = None
    """Account that is charged; left out: that of SBATCH_ACCOUNT in your shell, or the user's default."""
    qos: SlurmName | None = None
    """Quality of service; left out: the default."""
    constraint: Constraint | None = None
    """Features that a node must have."""
    gpus_per_rank: Annotated[int, Field(ge=0)] = 0
    """GPUs for each rank."""
    srun_arguments: Words = ()
    """More arguments of the srun that starts the ranks."""
    options: dict[OptionName, OptionValue] = Field(default_factory=dict)
    """More options of sbatch, without dashes; true: a flag without a value, false: not this flag."""
    wckey: SlurmName | None = None
    """Workload characterisation key, where the site wants one."""
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """Option of sbatch that asks for GPUs."""
    gpu_type: SlurmName | None = None
    """Type of GPU to ask for, such as a100; left out: any."""
    tasks_per_job: Count = 1
    """Tasks of one rank each that share a job and run side by side in it, for sites that charge whole nodes."""
    array_parallelism: Count | None = None
    """Elements of one array that run at once; left out: all."""
    max_array_size: Count | None = None
    """Elements of one array at most (the site's MaxArraySize); left out: Slurm is asked."""
    max_submitted: Count | None = None
    """Jobs of yours that may be in the queue at once, each array element counted; left out: Slurm is asked."""
    max_time_min: Annotated[Count, Unit("min")] | None = None
    """Longest time limit in minutes that a task may get when it ran out of time before; left out: Slurm is asked."""
    max_memory_GB: Annotated[Positive, Unit("GB")] | None = None
    """Most memory in GB that a task may get when it ran out of memory before; left out: Slurm is asked."""


class StageSlurm(Slurm):
    """What one stage asks of Slurm differently; a key that is not written is as in the slurm section."""

    @model_serializer(mode="wrap")
    def _only_what_is_written(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A default that is written out would override the slurm section once a stored site is read again.
        return {key: value for key, value in dump(self).items() if key in self.model_fields_set}


class Controller(StageSlurm):
    """The small job of a detached campaign that collects a stage and submits the next one."""

    time_min: Annotated[Count, Unit("min")] = 30
    """Time limit of the controller job in minutes."""
    memory_GB: Annotated[Positive, Unit("GB")] | None = None
    """Memory of the controller job in GB, which needs less than 1; left out: what the site gives by default."""


class Site(Section):
    """A machine, or one user's way to use it."""

    name: Name
    """Name of the site."""
    cluster: SlurmName | None = None
    """ClusterName that `scontrol show config` gives on this machine; left out: not compared."""
    executor: Literal["local", "slurm"]
    """What starts tasks: processes on this machine, or Slurm."""
    max_running_tasks: Count | None = None
    """Tasks that run at once; left out: one for each core (local), or no limit (slurm)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto: a GPU where the task finds one."""
    mpi: Words = ()
    """Words that start the MPI ranks of a reference code inside a task, such as [srun, --overlap, -n, "{ranks}"].
    Left out: {jobscripts}/mpi-here, Open MPI on the task's own node."""
    poll_s: Annotated[Positive, Unit("s")] | None = None
    """Time between two looks at running tasks in seconds; left out: 0.5 (local) or 10 (slurm)."""
    patience_min: Annotated[Positive, Unit("min")] = 1440.0
    """Time in minutes for which Slurm may fail to answer before `hpcft run` gives up with exit code 4."""
    environment: dict[VariableName, Word] = Field(default_factory=dict)
    """Environment variables of every task, no secrets; {jobscripts} is the folder of hpcft's job scripts."""
    setup: ShellLines = ()
    """Shell lines that run in each job before the work, such as `module load`; slurm only."""
    python: Words = ()
    """Words of the command that is Python in jobs; left out: {python}, the Python that hpcft was started with; slurm only."""
    slurm: Slurm | None = None
    """What is asked of Slurm."""
    stages: dict[StageName, StageSlurm] = Field(default_factory=dict)
    """What single stages ask of Slurm differently."""
    controller: Controller = Controller()
    """The job that goes on with a detached campaign, and what it asks of Slurm differently."""

    @property
    def poll_interval_s(self) -> float:
        """Time between two looks at running tasks in seconds, given or by default."""
        return self.poll_s or (0.5 if self.executor == "local" else 10.0)

    @property
    def mpi_launcher(self) -> tuple[str, ...]:
        """The words of `mpi`, given or by default."""
        return self.mpi or (str(JOBSCRIPTS / "mpi-here"), "{ranks}")

    def task_limit(self, num_cores: int | None = None) -> int | None:
        """Tasks that may run at once, None: no limit; `num_cores` by default are those that we may use."""
        if self.max_running_tasks is not None or self.executor == "slurm":
            return self.max_running_tasks
        return num_cores or len(os.sched_getaffinity(0))

    def slurm_for(self, stage: StageName | Literal["controller"]) -> Slurm:
        """The slurm section as this stage wants it: options are merged, any other key is replaced."""
        if self.slurm is None:
            raise UserError(f"site {self.name} has no slurm section; add one to its file")
        override = self.controller if stage == "controller" else self.stages.get(stage)
        if override is None:
            return self.slurm
        written = override.model_fields_set & type(self.slurm).model_fields.keys()
        changes: dict[str, Any] = {key: getattr(override, key) for key in written}
        if "options" in changes:
            changes["options"] = self.slurm.options | override.options
        return self.slurm.model_copy(update=changes)

    def _problems(self) -> Iterator[tuple[KeyPath, str]]:
        if self.mpi and not any("{ranks}" in word for word in self.mpi):
            yield (
                ("mpi",),
                "does not say where the number of ranks goes; write {ranks} among its words, in quotes",
            )
        if self.executor == "slurm" and self.slurm is None:
            yield (
                ("executor",),
                "slurm needs a section `slurm:` with what jobs ask for; add it, as in `slurm: {partition: NAME}`",
            )
        if self.stages and self.slurm is None:
            yield ("stages",), "changes the slurm section, but there is none; add it, or delete stages"
        if self.executor == "local" and self.python:
            yield ("python",), "is for Slurm jobs only; delete it: here tasks run with the Python of hpcft"
        if self.executor == "local" and self.setup:
            yield ("setup",), "runs in Slurm jobs only; delete it, and run these lines in your shell instead"


def load_site(path: Path) -> Site:
    """The site that the YAML file describes; else a UserError with every problem."""
    return validate(Site, load_yaml(path), path)


def default_site() -> Site:
    """This machine, without Slurm."""
    return Site(name="local", executor="local")


def missing_executables(site: Site, which: Callable[[str], str | None] = shutil.which) -> list[str]:
    """The programs that the site's executor calls and that are not on PATH; empty if it can work."""
    wanted = _SLURM_EXECUTABLES if site.executor == "slurm" else ()
    return [name for name in wanted if which(name) is None]

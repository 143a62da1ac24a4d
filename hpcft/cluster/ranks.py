"""Which rank this process is, as submitit or the launcher of the process tells it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from hpcft.errors import UserError
from hpcft.training.rank import Rank


def rank_of_this_process(attempt: int) -> Rank:
    """The rank under submitit (local or Slurm); rank 0 of 1 outside of it.

    The token holds the attempt and Slurm's restart count: a requeued job has its old id and a new execution.
    """
    if not os.environ.get("SUBMITIT_EXECUTOR"):
        return Rank(token=f"{attempt}-0-0")
    from submitit import JobEnvironment

    environment = JobEnvironment()
    return Rank(
        rank=environment.global_rank,
        world_size=environment.num_tasks,
        local_rank=environment.local_rank,
        num_nodes=environment.num_nodes,
        token=f"{attempt}-{environment.job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}",
    )


def spread_over_gpus(rank: Rank, executor: str, index: int) -> Rank:
    """On this machine, tasks of one rank run side by side and none knows of the others: each takes the GPU of its index."""
    return replace(rank, local_rank=index) if executor == "local" and rank.world_size == 1 else rank


# By launcher: rank, world size, rank on the node, and what names this start of all ranks. The first that is there counts: a
# launcher may itself run within a job step of Slurm.
_LAUNCHERS: tuple[tuple[str, str, str, str, tuple[str, ...]], ...] = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")),
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")),
    ("MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("PMI_ID_NAMESPACE", "PMI_PORT", "HYDI_CONTROL_FD")),
    # Not SLURM_NTASKS: a batch script has it too, and is alone all the same.
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")),
)  # fmt: skip


def rank_of_launcher(environment: Mapping[str, str] = os.environ) -> Rank:
    """The rank under torchrun, mpirun (Open MPI, or MPICH's kin) or srun; rank 0 of 1 without any of them.

    UserError for an environment that contradicts itself.
    """
    for launcher, rank_name, size_name, local_name, names in _LAUNCHERS:
        if rank_name not in environment or size_name not in environment:
            continue
        try:
            rank, world_size = int(environment[rank_name]), int(environment[size_name])
            local_rank = int(environment.get(local_name, rank))
        except ValueError as error:
            raise UserError(f"{launcher} gives ranks that are no numbers: {error}") from error
        if not 0 <= rank < world_size:
            raise UserError(
                f"{launcher} says that this is rank {rank} of {world_size} ({rank_name}, {size_name})"
            )
        if world_size == 1:
            continue
        token = "-".join(_plain(environment[name]) for name in names if name in environment)
        return Rank(rank, world_size, local_rank, _num_nodes(environment, world_size), token or "0")
    return Rank()


def _num_nodes(environment: Mapping[str, str], world_size: int) -> int:
    """As the launcher tells; more than one wherever it is not sure, so that ranks meet under the host's name."""
    if "SLURM_STEP_NUM_NODES" in environment:
        return int(environment["SLURM_STEP_NUM_NODES"])
    on_node = environment.get("LOCAL_WORLD_SIZE") or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    return 1 if on_node is not None and int(on_node) == world_size else 2


def _plain(text: str) -> str:
    """Fit for a file's name."""
    return "".join(c if c.isalnum() else "_" for c in text)

"""Which rank this process is, as submitit's environments tell it."""

from __future__ import annotations

import os

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

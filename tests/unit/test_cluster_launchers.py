"""Which rank a process is under torchrun, mpirun and srun, from what they leave in the environment."""

from __future__ import annotations

import pytest

from hpcft.cluster.ranks import rank_of_launcher
from hpcft.errors import UserError
from hpcft.training.rank import Rank

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_PORT": "29500",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "1867972609",
}
# As in the shell of `sbatch -n 4`: one process, whatever is said about tasks.
BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2",
}
STEP = {
    **BATCH,
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "4",
}
ONE_TASK = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_NODES": "1"}


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, Rank()),
        (TORCHRUN, Rank(3, 8, 1, 2, "29500")),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, Rank(3, 8, 1, 1, "29500")),
        (MPIRUN, Rank(1, 2, 1, 1, "1867972609")),
        (BATCH, Rank()),
        (STEP, Rank(5, 8, 1, 4, "7-0")),
        ({**STEP, "SLURM_RESTART_COUNT": "2"}, Rank(5, 8, 1, 4, "7-0-2")),
        # mpirun within a step of one task, as Slurm sees it.
        ({**STEP, **MPIRUN, **ONE_TASK}, Rank(1, 2, 1, 1, "1867972609")),
        ({"PMI_RANK": "1", "PMI_SIZE": "3", "MPI_LOCALRANKID": "0"}, Rank(1, 3, 0, 2, "0")),
    ],
)  # fmt: skip
def test_the_launcher_is_believed(environment: dict[str, str], rank: Rank) -> None:
    assert rank_of_launcher(environment) == rank


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"RANK": "8"}, "torchrun says that this is rank 8 of 8"), ({"RANK": "x"}, "ranks that are no numbers")],
)
def test_an_environment_that_contradicts_itself_is_refused(changed: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rank_of_launcher({**TORCHRUN, **changed})

from __future__ import annotations

import os

import pytest
import torch

from hpcft.cluster.ranks import rank_of_this_process, spread_over_gpus
from hpcft.training.distributed import choose_device
from hpcft.training.rank import Rank


@pytest.fixture(autouse=True)
def outside_of_any_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SLURM_", "SUBMITIT_")):
            monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


ARRAY_ELEMENT = {
    "SUBMITIT_EXECUTOR": "slurm",
    "SLURM_JOB_ID": "815",
    "SLURM_ARRAY_JOB_ID": "812",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def test_a_process_outside_of_jobs_is_the_only_rank() -> None:
    assert rank_of_this_process(3) == Rank(0, 1, 0, 1, "3-0-0")
    assert rank_of_this_process(3).is_first


def test_a_rank_on_slurm_knows_its_place_and_its_array_element(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, ARRAY_ELEMENT)
    rank = rank_of_this_process(2)
    assert rank == Rank(rank=3, world_size=4, local_rank=1, num_nodes=2, token="2-812_3-0")
    assert not rank.is_first


def test_every_execution_of_a_task_has_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A requeued job has the id of its first execution; an id may come again after a new start of the controller."""
    set_all(monkeypatch, ARRAY_ELEMENT)
    tokens = [rank_of_this_process(1).token, rank_of_this_process(2).token]
    for change in ({"SLURM_RESTART_COUNT": "1"}, {"SLURM_RESTART_COUNT": "2"}, {"SLURM_ARRAY_TASK_ID": "4"}):
        set_all(monkeypatch, change)
        tokens.append(rank_of_this_process(2).token)
    assert len(set(tokens)) == len(tokens)


def test_a_rank_of_a_local_job_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(
        monkeypatch,
        {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_JOB_ID": "4711",
            "SUBMITIT_LOCAL_NTASKS": "2",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_GLOBALID": "1",
            "SUBMITIT_LOCAL_LOCALID": "1",
        },
    )
    assert rank_of_this_process(1) == Rank(1, 2, 1, 1, "1-4711-0")


def test_tasks_of_one_rank_on_this_machine_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)

    def gpus(executor: str, world_size: int) -> list[int | None]:
        ranks = [spread_over_gpus(Rank(0, world_size), executor, index) for index in range(4)]
        return [choose_device(rank).index for rank in ranks]

    assert gpus("local", 1) == [0, 1, 0, 1]
    assert [device.index for device in current] == [0, 1, 0, 1]  # other people's kernels look at nothing else
    assert gpus("local", 2) == [0, 0, 0, 0]  # the ranks of one task share the machine out among themselves
    assert gpus("slurm", 1) == [0, 0, 0, 0]  # Slurm shows each job its own

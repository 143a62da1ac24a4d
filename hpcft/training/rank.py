"""Which process of a task this is. No torch here, so that a job can ask before it loads it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rank:
    """`token` differs between executions of the same task, so that one never meets the leftovers of another."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    num_nodes: int = 1
    token: str = "0"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

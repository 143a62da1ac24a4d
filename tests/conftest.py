"""What holds for all tests, and how they are spread over processes (pytest-xdist, see tests/run)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# How long an example takes says something of the machine, nothing of the code.
settings.register_profile("hpcft", deadline=None)
settings.load_profile("hpcft")


@functools.cache
def group_of(file: str) -> str:
    """Tests of a file stay together, for what they share is dear; all that use the one Slurm cluster follow each other."""
    return "slurm" if "mark.slurm" in Path(file).read_text() else file


# xdist's own groups (--dist loadgroup) have no effect under pytest 9.2.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(str(config.rootpath / nodeid.split("::")[0]))

    return Grouped(config, log)

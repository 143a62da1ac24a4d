"""A task needs more memory than its job has: it gets twice as much, as far as the site goes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dying_jobs import TESTS, Disturbed, assert_same_data, disturbing

pytestmark = pytest.mark.slurm

# As sacct shows a step whose task the kernel has killed for its memory, where Slurm holds jobs to it (cgroups).
SACCT = """#!/bin/sh
{sacct} "$@" | sed -E 's/^([0-9_]+[.]0[|][^|]*[|])(FAILED|CANCELLED)/\\1OUT_OF_MEMORY/'
"""


@pytest.fixture
def accounting_with_memory(tmp_path: Path, slurm_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sacct that calls each step that was killed out of memory; the rest of Slurm is the real one."""
    shim = tmp_path / "bin" / "sacct"
    shim.parent.mkdir()
    shim.write_text(SACCT.format(sacct=shutil.which("sacct")))
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}{os.pathsep}{os.environ['PATH']}")


def test_a_task_that_was_killed_for_its_memory_gets_twice_as_much_and_keeps_its_segments(
    disturb: Callable[..., Disturbed], undisturbed: dict[str, Path], accounting_with_memory: None
) -> None:
    """Guards scheduler._cause, which looks at the steps (the job itself says FAILED), and policy._grown_memory."""
    case = disturb("probe", config={"max_attempts": 2, "probe": {"resources": {"memory_GB": 0.75}}})
    with case.managed():
        pid = case.until_stopped_in_md()
        before = case.segments()
        os.kill(pid, signal.SIGKILL)  # as the kernel does
        case.until(lambda: len(case.runs()) == 2, "a second attempt has begun")
        after = case.segments()
        assert {name: after[name] for name in before} == before
        case.until_finished()
    assert [ending["cause"] for ending in case.ends()] == ["out-of-memory"]
    assert [intent["needs"]["memory_GB"] for intent in case.intents()] == [None, 1.5]
    assert_same_data(undisturbed["end"], case.root, "probe")


@pytest.mark.nightly
def test_the_kernel_kills_a_task_that_needs_more_than_its_job_may_have_until_the_job_has_enough(
    disturb_with_memory: Callable[..., Disturbed], undisturbed: dict[str, Path]
) -> None:
    """Guards the same with nothing made up, on a cluster whose jobs are held to their memory."""
    case = disturb_with_memory(
        "probe", config={"max_attempts": 6, "probe": {"resources": {"memory_GB": 0.0625}}}
    )
    with case.managed():
        case.until_finished()
    causes = [ending["cause"] for ending in case.ends()]
    assert causes and set(causes) == {"out-of-memory"}
    wanted = [intent["needs"]["memory_GB"] for intent in case.intents()]
    assert wanted == [None, *(0.125 * 2**n for n in range(len(causes)))]
    assert_same_data(undisturbed["end"], case.root, "probe")


@pytest.fixture
def disturb_with_memory(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Disturbed]]:
    """`disturb` on a cluster of its own that holds jobs to their memory, where the machine allows that."""
    if not os.access("/sys/fs/cgroup/memory/cgroup.procs", os.W_OK):
        pytest.skip("only root can limit the memory of jobs, and only under cgroup v1")
    from slurm_conftest import SlurmCluster

    monkeypatch.setenv("HPCFT_SLURM_CGROUP", "1")
    folder = Path(tempfile.mkdtemp(prefix="hpcft.", dir="/tmp"))
    try:
        subprocess.run([TESTS / "slurm" / "cluster" / "up", folder], check=True, stdout=subprocess.DEVNULL)
        yield from disturbing(SlurmCluster(folder), request, tmp_path, monkeypatch)
    finally:
        subprocess.run([TESTS / "slurm" / "cluster" / "down", folder], check=True)
    shutil.rmtree(folder)

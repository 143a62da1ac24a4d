"""sbatch is killed while its request is on the way: whether the jobs exist is the queue's to say."""

from __future__ import annotations

import sys
import textwrap

import pytest
from slurm_campaign import OnSlurm, slurmctld_pid

from hpcft.campaign.decide import Adopt

pytestmark = pytest.mark.slurm

# The controller sleeps until the request lies in its socket; then sbatch is killed, and the controller wakes up.
KILLED = """
import os, signal, subprocess, sys, time
from pathlib import Path

def request_has_arrived(port):
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, queues = line.split()[:5]
        if int(local.split(":")[1], 16) == port and state == "01" and int(queues.split(":")[1], 16):
            return True
    return False

controller, port, *argv = sys.argv[1:]
os.kill(int(controller), signal.SIGSTOP)
try:
    sbatch = subprocess.Popen(argv)
    while not request_has_arrived(int(port)) and sbatch.poll() is None:
        time.sleep(0.01)
    sbatch.kill()
    sbatch.wait()
finally:
    os.kill(int(controller), signal.SIGCONT)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_jobs_of_an_sbatch_that_was_killed_in_mid_call_are_adopted_and_submitted_once(
    campaign: OnSlurm, slurm_cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the death of sbatch counts as a refusal, or its attempt is submitted again at once."""
    program = campaign.base / "killed.py"
    program.write_text(textwrap.dedent(KILLED))
    port = (slurm_cluster.folder / "etc" / "port").read_text().strip()  # type: ignore[attr-defined]
    campaign.shim(
        monkeypatch, "sbatch", f'exec {sys.executable} -S {program} {slurmctld_pid()} {port} "$real" "$@"'
    )
    with campaign.managed() as manager:
        manager.step()  # plans
        assert "did not confirm" in manager.step().unconfirmed
        turns = campaign.finish_stage(manager)
    assert sum(isinstance(action, Adopt) for turn in turns for action in turn.actions) == 1
    assert (
        len(campaign.calls("sbatch")) == len(campaign.arrays()) == len(campaign.records("-intent.json")) == 1
    )
    campaign.assert_undisturbed()

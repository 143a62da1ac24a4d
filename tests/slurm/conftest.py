"""The Slurm cluster that the tests in this folder run on."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "cluster"


@dataclass(frozen=True)
class SlurmCluster:
    """A cluster of tests/slurm/cluster; everything that it writes is under its folder."""

    folder: Path

    def up(self) -> None:
        """Start those daemons that are not running; return when every node takes jobs."""
        self._run("up")

    def down(self, *daemons: str) -> None:
        """Stop these daemons (n1, slurmctld, ...); without names, cancel all jobs and stop everything."""
        self._run("down", *daemons)

    def environment(self) -> dict[str, str]:
        """The variables that lead Slurm's and Open MPI's commands to this cluster."""
        words = shlex.split((self.folder / "env").read_text(), comments=True)
        return dict(word.split("=", 1) for word in words if word != "export")

    def _run(self, script: str, *daemons: str) -> None:
        argv = [str(SCRIPTS / script), str(self.folder), *daemons]
        # A file, not a pipe: a daemon that kept a pipe open would keep us waiting for its end.
        with tempfile.TemporaryFile("w+") as output:
            status = subprocess.call(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            output.seek(0)
            said = output.read().strip()
        if status != 0:
            pytest.fail(f"{shlex.join(argv)} exited with {status}: {said}", pytrace=False)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A running cluster that Slurm's commands reach: that of the shell, or one that ends with the session."""
    if shutil.which("sbatch") is None:
        pytest.fail(
            "there is no sbatch on this machine, and tests marked slurm need a real Slurm; "
            f"install it with: {SCRIPTS}/up --install, or leave these tests out with: pytest -m 'not slurm'",
            pytrace=False,
        )
    given = os.environ.get("HPCFT_SLURM_DIR")
    # SLURM_CONF alone may be that of a site's real cluster, which is not for tests.
    if given is not None and os.environ.get("SLURM_CONF") == f"{given}/etc/slurm.conf":
        cluster = SlurmCluster(Path(given))
        cluster.up()  # an earlier test run may have stopped a part of it
        yield cluster
        return
    # Not in TMPDIR, which may be long: a Unix socket's path has at most 107 bytes.
    cluster = SlurmCluster(Path(tempfile.mkdtemp(prefix="hpcft.", dir="/tmp")))
    try:
        cluster.up()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in cluster.environment().items():
                patch.setenv(name, value)
            yield cluster
    finally:
        cluster.down()
    shutil.rmtree(cluster.folder)

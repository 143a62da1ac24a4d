"""`hpcft` as a command on a machine whose Slurm commands print what a real Slurm printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from recorded_slurm import FILES, FOLDER

HPCFT = str(Path(sys.executable).with_name("hpcft"))
GOOD = "name: good\nexecutor: slurm\nslurm: {partition: cpu}\n"


def recorded_programs(folder: Path) -> Path:
    """Fill a folder with programs that are called as Slurm's are and print what was recorded."""
    folder.mkdir()
    for name in ("sbatch", "squeue", "scancel", "srun"):
        program(folder / name, "exit 1")
    for name in ("scontrol", "sinfo", "sacctmgr", "id"):
        cases = [f'"{command}"*) cat {FOLDER}/{file}.txt ;;' for command, file in FILES.items()]
        program(folder / name, 'case "$(basename $0) $*" in', *cases, "*) exit 1 ;; esac")
    return folder


def program(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


def hpcft(*arguments: object, path: Path | None, cwd: Path) -> tuple[int, str, str]:
    """Exit code, and what was said on both channels with its lines joined, as they break where the terminal ends."""
    environment = {
        **os.environ,
        "PATH": f"{path}:/usr/bin:/bin" if path else "/nowhere",
        "COLUMNS": "80",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [HPCFT, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, re.sub(r"\s+", " ", done.stdout), re.sub(r"\s+", " ", done.stderr)


def write_site(folder: Path, text: str = GOOD) -> Path:
    path = folder / "site.yaml"
    path.write_text(text)
    return path

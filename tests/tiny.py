"""A whole campaign in seconds: a Morse foundation that is wrong about copper, three rounds of learning from EMT."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml
from ase.build import bulk

CAMPAIGN: dict[str, Any] = {
    "name": "tiny",
    "seed": 7,
    "rounds": 2,
    "foundation": "foundation.pt",
    "structures": "start.extxyz",
    "reference": {"calculator": "ase.calculators.emt.EMT", "time_limit_s": 60},
    "explore": {
        "tasks": 2,
        "temperature_K": 600,
        "timestep": 4,
        "steps": 24,
        "frame_every": 2,
        "segment_frames": 3,
    },
    "select": {"frames": 8},
    "label": {"shards": 2},
    "relaxations": {"train": "vacancies-train.extxyz", "test": "vacancies-test.extxyz", "fmax": 0.05},
    "train": {
        "ranks": 2,
        "epochs": 4,
        "steps_per_epoch": 3,
        "batch_size": 3,
        "learning_rate": 0.02,
        "precision": "float64",
        "weights": {"energy": 10, "forces": 1, "stress": 1},
        "relaxation": {"weight": 0.01, "every": 3, "batch_size": 2, "steps": 4},
    },
    "probe": {"tasks": 2, "steps": 12, "frames": 2},
    "max_attempts": 20,
}


def write_campaign(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write the campaign file and its inputs into `folder`; returns the file."""
    import torch
    from ase.io import write

    from hpcft.models.files import save_model
    from hpcft.models.morse import MorsePotential

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_model(folder / "foundation.pt", MorsePotential([29], cutoff=4.0, depth=0.25).double())
    random = np.random.default_rng(1)

    def copper(displacement: float, vacancies: int) -> Any:
        atoms = bulk("Cu", "fcc", a=3.6, cubic=True).repeat((2, 2, 1))
        del atoms[:vacancies]
        atoms.positions += random.normal(0, displacement, atoms.positions.shape)
        return atoms

    write(folder / "start.extxyz", [copper(0.02, i % 2) for i in range(4)])
    write(folder / "vacancies-train.extxyz", [copper(0.1, 1) for _ in range(3)])
    write(folder / "vacancies-test.extxyz", [copper(0.1, 1) for _ in range(2)])
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**CAMPAIGN, **(changes or {})}, sort_keys=False))
    return path


def hpcft(*arguments: object, cwd: Path, output: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start the real command in a session of its own. (Tasks that outlive it hold a pipe open: pass a file then.)"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # The tests themselves may run under nohup, or in the background of a script without job control.
    heeding = ["env", "--default-signal=HUP,INT"]
    return subprocess.Popen(
        [*heeding, sys.executable, "-m", "hpcft", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def hpcft_to_end(*arguments: object, cwd: Path) -> str:
    """Run the real command; its output, or an AssertionError that shows it when the exit code is not 0."""
    process = hpcft(*arguments, cwd=cwd)
    output, _ = process.communicate()
    assert process.returncode == 0, f"hpcft {' '.join(map(str, arguments))}: {process.returncode}\n{output}"
    return output


def processes_of(root: Path) -> list[int]:
    """Every live process that has to do with the campaign in `root`: its manager, controllers, ranks and their children."""
    import psutil

    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if any(str(root) in argument for argument in process.info["cmdline"] or []):
            found.append(process.pid)
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
                found += [child.pid for child in process.children(recursive=True)]
    return sorted(set(found))


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def history_of(root: Path, stage: str = "round-*/*") -> dict[str, Any]:
    """The JSON records of how stages came about, by their path in the campaign: packed ones and those still lying open."""
    found = {}
    for folder in root.glob(stage):
        for path in [*folder.glob("attempts/*.json"), *folder.glob("outcomes/*.json")]:
            found[str(path.relative_to(root))] = json.loads(path.read_text())
        if (folder / "history.zip").exists():
            with zipfile.ZipFile(folder / "history.zip") as archive:
                for name in archive.namelist():
                    if name.endswith(".json"):
                        key = str((folder / name).relative_to(root))
                        found.setdefault(key, json.loads(archive.read(name)))
    return found


def submissions_of(root: Path, stage: str = "round-*/*") -> list[str]:
    """Paths of the intents of all attempts."""
    return sorted(name for name in history_of(root, stage) if name.endswith("-intent.json"))


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """Every dataset of an HDF5 file, but for those that say when and where it was written."""
    found: dict[str, np.ndarray] = {}

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and not name.endswith(("wall_s", "attempt")):
            found[name] = np.asarray(node[()])

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found


def assert_same_results(a: Path, b: Path) -> None:
    """Same trajectories, selections, labels, models (bit for bit) and evaluations in two campaign folders."""
    files = {path.relative_to(a) for path in a.glob("round-*/*/tasks/*/*") if path.suffix in (".h5", ".pt")}
    files -= {path for path in files if "checkpoint" in path.name}
    others = {path.relative_to(b) for path in b.glob("round-*/*/tasks/*/*") if path.suffix in (".h5", ".pt")}
    others -= {path for path in others if "checkpoint" in path.name}
    assert files == others, files ^ others
    for name in sorted(files):
        if name.suffix == ".pt":
            assert (a / name).read_bytes() == (b / name).read_bytes(), f"{name} differs"
            continue
        left, right = arrays_of(a / name), arrays_of(b / name)
        assert left.keys() == right.keys(), name
        for key, value in left.items():
            assert np.array_equal(value, right[key], equal_nan=value.dtype.kind == "f"), (
                f"{name}: {key} differs"
            )
    for product in sorted(a.glob("round-*/evaluate/product.json")):
        left = json.loads(product.read_text())
        right = json.loads((b / product.relative_to(a)).read_text())
        left.pop("about"), right.pop("about")
        assert left == right, product

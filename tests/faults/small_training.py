"""A training of a second in a process of its own: labels, replay and relaxations, and all that it ends with in one file.

`python small_training.py FOLDER EPOCHS RANK WORLD_SIZE TOKEN` prints each epoch when its checkpoint is there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk

from hpcft.models.morse import MorsePotential
from hpcft.relaxation import RelaxationPair
from hpcft.training.data import LabelledSet
from hpcft.training.distributed import process_group
from hpcft.training.rank import Rank
from hpcft.training.trainer import BpttSettings, ReplaySettings, Trainer, TrainingData, TrainingSettings


def structures() -> list[Atoms]:
    random = np.random.default_rng(0)
    found = []
    for _ in range(5):
        atoms = bulk("Cu", a=3.7, cubic=True)
        atoms.positions += random.normal(0, 0.1, (4, 3))
        atoms.info["REF_energy"] = random.normal()
        atoms.arrays["REF_forces"] = random.normal(size=(4, 3))
        found.append(atoms)
    return found


def trainer(epochs: int, rank: Rank) -> Trainer:
    potential = MorsePotential([29], cutoff=4.0)  # single precision, as in a campaign
    some = structures()
    labels = LabelledSet(some, potential.cutoff, torch.float32)
    data = TrainingData(labels, labels, [RelaxationPair(some[0], some[1])])
    settings = TrainingSettings(
        epochs,
        batch_size=2,
        learning_rate=0.02,
        replay=ReplaySettings(batch_size=2),
        relaxation=BpttSettings(weight=0.1, every=2, steps=2),
    )
    return Trainer(potential, data, settings, rank)


def start(
    folder: Path, epochs: int, rank: int = 0, world_size: int = 1, token: str = "0"
) -> subprocess.Popen[str]:
    """One rank of the training; `token` tells one start of all ranks from the next."""
    folder.mkdir(exist_ok=True)
    numbers = [str(number) for number in (epochs, rank, world_size)]
    argv = [sys.executable, "-W", "ignore", __file__, str(folder), *numbers, token]
    with (folder / f"log-{rank}").open("ab") as log:
        return subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def state_of(folder: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """The history and every tensor of the newest checkpoint, the optimiser's included."""
    from hpcft.training.checkpoint import load_latest

    checkpoint = load_latest(folder)
    assert checkpoint is not None
    tensors = {f"model {name}": value for name, value in checkpoint.model.items()}
    for number, values in checkpoint.optimiser["state"].items():
        tensors |= {f"optimiser {number} {name}": value for name, value in values.items()}
    return checkpoint.history, {name: value.numpy().tobytes() for name, value in tensors.items()}


def main(folder: Path, epochs: int, rank: int, world_size: int, token: str) -> None:
    me = Rank(rank, world_size, rank, token=token)
    with process_group(me, folder, torch.device("cpu")):
        trainer(epochs, me).run(folder, lambda row: print(int(row["epoch"]), flush=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])

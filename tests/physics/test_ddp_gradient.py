"""Training on two real processes is training on one: same gradient, same weights, same history.

Run as a script, this file is one rank: `python test_ddp_gradient.py RANK WORLD_SIZE FOLDER`.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from small_models import small_mace, small_morse

from hpcft.models.protocol import Potential
from hpcft.relaxation import Descent, Fire, RelaxationPair, StepSize, Stop
from hpcft.training.data import LabelledSet
from hpcft.training.loss import Unrolling, Weights
from hpcft.training.rank import Rank
from hpcft.training.trainer import BpttSettings, ReplaySettings, Trainer, TrainingData, TrainingSettings

ODD = TrainingSettings(
    epochs=1,
    steps_per_epoch=1,
    batch_size=3,
    learning_rate=0.01,
    weights=Weights(energy=2.0, forces=1.0, stress=50.0),
    replay=ReplaySettings(batch_size=3, weight=0.5),
    relaxation=BpttSettings(
        weight=0.1, batch_size=3, steps=4, unrolling=Unrolling(Descent(step_size=0.05, momentum=0.5))
    ),
    gradient_clip=None,
)
ALONE = replace(
    ODD,
    batch_size=1,
    replay=ReplaySettings(batch_size=1, weight=0.5),
    relaxation=BpttSettings(weight=0.1, batch_size=1, steps=4),
)
SCENARIOS: dict[str, TrainingSettings] = {
    "uneven shares, with replay and a relaxation": ODD,
    "a rank with an empty share": ALONE,
    "three epochs, a relaxation in every second step, clipped": replace(
        ODD,
        epochs=3,
        steps_per_epoch=3,
        gradient_clip=0.5,
        relaxation=BpttSettings(weight=0.1, every=2, batch_size=1, steps=3),
    ),
    "MACE": replace(ODD, replay=None, weights=Weights(energy=2.0, forces=1.0)),
    "relaxations alone, which stop each in its own step, with step sizes that are learned": replace(
        ODD,
        replay=None,
        weights=Weights(0.0, 0.0),
        relaxation=BpttSettings(
            weight=0.1,
            batch_size=3,
            steps=12,
            unrolling=Unrolling(Descent(StepSize(0.03, [13, 29]), 0.8), stop=Stop(fmax=1.0)),
        ),
    ),
    "FIRE with the cell, of which the last steps count": replace(
        ODD,
        relaxation=BpttSettings(
            weight=0.1, batch_size=3, steps=6, unrolling=Unrolling(Fire(), last=4, with_cell=True)
        ),
    ),
    "the gradient at the minimum": replace(
        ODD, relaxation=BpttSettings(weight=0.1, batch_size=3, unrolling=Unrolling(engine="implicit"))
    ),
}
# Conjugate gradients stop at 1e-8 of the right-hand side.
LOOSE = {"the gradient at the minimum": 1e-7}


def structures(count: int, seed: int) -> list[Atoms]:
    """Labelled cells of unequal size, so that a mean of the ranks' means is not the mean."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        atoms = bulk("Cu", a=3.7, cubic=True).repeat((1 + number % 3, 1, 1))
        atoms.numbers[::2] = 13
        atoms.positions += random.normal(0, 0.15, atoms.positions.shape)
        atoms.info["REF_energy"] = -0.5 * len(atoms) + random.normal()
        atoms.arrays["REF_forces"] = random.normal(0, 0.5, (len(atoms), 3))
        if number % 2:
            atoms.info["REF_stress"] = random.normal(0, 0.01, 6)
        found.append(atoms)
    return found


def pairs() -> list[RelaxationPair]:
    found = []
    for number, atoms in enumerate(structures(3, 5)):
        end = atoms.copy()
        end.rattle(0.1, seed=number)
        found.append(RelaxationPair(atoms, end))
    return found


def potential_of(scenario: str) -> Potential:
    potential: Potential = small_mace() if scenario == "MACE" else small_morse()
    return potential


def train(scenario: str, rank: Rank, folder: Path) -> dict[str, np.ndarray]:
    """The gradient of the last step, the weights after it, and the history."""
    potential = potential_of(scenario)
    data = TrainingData(
        LabelledSet(structures(7, 1), potential.cutoff, torch.float64),
        LabelledSet(structures(4, 2), potential.cutoff, torch.float64),
        pairs(),
    )
    trainer = Trainer(potential, data, copy.deepcopy(SCENARIOS[scenario]), rank)  # a step size learns
    history = trainer.run(folder)
    parameters: dict[str, Any] = dict(trainer.objective.named_parameters())
    # A parameter of the model that no output depends on has no gradient in one process, and a zero one under DDP.
    return {
        **{
            f"gradient {n}": (torch.zeros_like(p) if p.grad is None else p.grad).numpy()
            for n, p in parameters.items()
        },
        **{f"weight {n}": p.detach().numpy() for n, p in parameters.items()},
        **{f"history {n}": np.array([row[n] for row in history]) for n in history[0]},
    }


@pytest.fixture(scope="module")
def results_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every scenario on two processes, started once; the results of each rank are in one file per scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = []
    for rank in range(2):
        with (folder / f"log-{rank}").open("wb") as log:
            command = [sys.executable, "-W", "ignore", __file__, str(rank), "2", str(folder)]
            ranks.append(
                subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
            )
    try:
        codes = [rank.wait(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], "\n".join((folder / f"log-{rank}").read_text() for rank in range(2))
    return folder


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_give_the_gradient_and_the_weights_of_one(
    scenario: str, results_of_two: Path, tmp_path: Path
) -> None:
    expected = train(scenario, Rank(), tmp_path)
    largest = max(np.abs(values).max() for name, values in expected.items() if name.startswith("gradient"))
    assert largest > 1e-2
    number = list(SCENARIOS).index(scenario)
    for rank in range(2):
        with np.load(results_of_two / f"result-{number}-{rank}.npz") as found:
            assert sorted(found) == sorted(expected)
            for name, values in expected.items():
                scale = largest if name.startswith("gradient") else 1.0
                bound = LOOSE.get(scenario, 1e-12)
                np.testing.assert_allclose(found[name], values, rtol=bound, atol=bound * scale, err_msg=name)


def test_only_the_first_rank_writes_checkpoints_and_no_rendezvous_file_is_left(results_of_two: Path) -> None:
    number = list(SCENARIOS).index("three epochs, a relaxation in every second step, clipped")
    names = sorted(path.name for path in (results_of_two / f"scenario-{number}").iterdir())
    assert names == ["checkpoint-000002.pt", "checkpoint-000003.pt"]


def main(rank: int, world_size: int, folder: Path) -> None:
    from hpcft.training.distributed import process_group

    for number, scenario in enumerate(SCENARIOS):
        here = folder / f"scenario-{number}"
        here.mkdir(exist_ok=True)
        me = Rank(rank, world_size, rank, token=str(number))
        with process_group(me, here, torch.device("cpu"), timeout_s=120):
            results = train(scenario, me, here)
        np.savez(folder / f"result-{number}-{rank}.npz", **results)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

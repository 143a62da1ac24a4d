"""The loss against plain numpy, and its division over ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from hpcft.models.graph import build_graph
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import evaluate
from hpcft.relaxation import Descent, RelaxationPair, Stop
from hpcft.training.data import LabelledSet, share
from hpcft.training.loss import Counts, LabelledTerm, Objective, RelaxationTerm, Unrolling, Weights

CUTOFF, DEPTH, WIDTH, LENGTH = 4.0, 0.4, 1.3, 2.5
MASS = {29: 63.546, 13: 26.9815385}
WEIGHTS = Weights(energy=3.0, forces=2.0, stress=40.0)


@pytest.fixture
def morse() -> MorsePotential:
    potential = MorsePotential([13, 29], CUTOFF, DEPTH, WIDTH, LENGTH).double()
    with torch.no_grad():  # made in single precision
        potential.log_depth.fill_(np.log(DEPTH))
        potential.log_width.fill_(np.log(WIDTH))
        potential.length.fill_(LENGTH)
    return potential


def by_hand(positions: np.ndarray) -> tuple[float, np.ndarray]:
    """Energy and forces of a cluster from the formula, pair by pair."""
    energy, forces = 0.0, np.zeros_like(positions)
    for i in range(len(positions)):
        for j in range(i):
            d = positions[i] - positions[j]
            r = np.linalg.norm(d)
            if r >= CUTOFF:
                continue
            x = np.exp(-WIDTH * (r - LENGTH))
            well, slope = DEPTH * ((1 - x) ** 2 - 1), 2 * DEPTH * WIDTH * (1 - x) * x
            smooth = 0.5 * (np.cos(np.pi * r / CUTOFF) + 1)
            smooth_slope = -0.5 * np.pi / CUTOFF * np.sin(np.pi * r / CUTOFF)
            energy += well * smooth
            along = -(slope * smooth + well * smooth_slope) * d / r
            forces[i] += along
            forces[j] -= along
    return energy, forces


def clusters() -> list[Atoms]:
    random = np.random.default_rng(0)
    found = []
    for count in (2, 4):
        atoms = Atoms(
            "Cu" * count, positions=np.array([[0, 0, 0], [2.2, 0, 0], [0, 2.4, 0.5], [1, 1, 2]])[:count]
        )
        atoms.info["REF_energy"] = random.normal()
        atoms.arrays["REF_forces"] = random.normal(size=(count, 3))
        found.append(atoms)
    return found


def term_of(data: LabelledSet, indices: list[int], mine: list[int] | None = None) -> LabelledTerm:
    mine = indices if mine is None else mine
    return LabelledTerm(data.batch(mine) if mine else None, Counts(len(indices), data.num_atoms(indices)))


def test_energies_and_forces_enter_as_mean_squares_per_atom_and_component(morse: MorsePotential) -> None:
    structures = clusters()
    data = LabelledSet(structures, CUTOFF, torch.float64)
    loss, parts = Objective(morse, WEIGHTS)([term_of(data, [0, 1])])
    energy_errors, force_errors = [], []
    for atoms in structures:
        energy, forces = by_hand(atoms.positions)
        energy_errors.append((energy - atoms.info["REF_energy"]) / len(atoms))
        force_errors.append((forces - atoms.arrays["REF_forces"]).ravel())
    energy_part = np.mean(np.square(energy_errors))
    force_part = np.mean(np.square(np.concatenate(force_errors)))
    assert float(parts["labels/energy"]) == pytest.approx(energy_part, rel=1e-12)
    assert float(parts["labels/forces"]) == pytest.approx(force_part, rel=1e-12)
    assert float(parts["labels/stress"]) == 0.0
    assert float(loss.detach()) == pytest.approx(3 * energy_part + 2 * force_part, rel=1e-12)


def periodic(count: int) -> list[Atoms]:
    found = []
    random = np.random.default_rng(1)
    for number in range(count):
        atoms = bulk("Cu", a=3.5, cubic=True).repeat((1 + number % 3, 1, 1))
        atoms.numbers[0] = 13
        atoms.positions += random.normal(0, 0.1, atoms.positions.shape)
        atoms.info["REF_energy"] = random.normal()
        atoms.arrays["REF_forces"] = random.normal(size=(len(atoms), 3))
        if number != 1:
            atoms.info["REF_stress"] = random.normal(0, 0.1, 6)
        found.append(atoms)
    return found


def test_stress_enters_where_it_is_known_and_an_open_structure_beside_it_does_no_harm(
    morse: MorsePotential,
) -> None:
    structures = [*periodic(3), clusters()[0]]
    data = LabelledSet(structures, CUTOFF, torch.float64)
    indices = list(range(4))
    loss, parts = Objective(morse, WEIGHTS)([term_of(data, indices)])
    total = 0.0
    for number in (0, 2):
        predicted = evaluate(morse, build_graph([structures[number]], CUTOFF), stress=True).stress_b33
        assert predicted is not None
        xx, yy, zz, yz, xz, xy = structures[number].info["REF_stress"]
        total += np.sum((predicted[0].numpy() - [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]) ** 2)
    assert float(parts["labels/stress"]) == pytest.approx(total / (9 * 4), rel=1e-12)
    loss.backward()
    gradients = [p.grad for p in morse.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


def test_a_relaxation_enters_as_the_mean_distance_of_its_end(morse: MorsePotential) -> None:
    starts = [clusters()[1], clusters()[0]]
    pairs, expected = [], []
    for number, start in enumerate(starts):
        end = start.copy()
        end.positions += np.random.default_rng(number).normal(0, 0.1, end.positions.shape)
        pairs.append(RelaxationPair(start, end))
        final = start.positions + 0.05 * by_hand(start.positions)[1]
        expected.append(np.sqrt(MASS[29] * np.sum((end.positions - final) ** 2)))
    term = RelaxationTerm(pairs, 2, 0.25, 1, Unrolling(Descent(0.05, max_step=10.0)))
    loss, parts = Objective(morse, WEIGHTS)([], term)
    assert float(parts["relaxation/delta_q"]) == pytest.approx(np.mean(expected), rel=1e-10)
    assert float(loss.detach()) == pytest.approx(0.25 * np.mean(expected), rel=1e-10)


def test_a_relaxation_that_diverges_counts_as_nothing_and_is_counted(morse: MorsePotential) -> None:
    """Fails if one bad start spoils the loss or the gradient of the others."""
    good = periodic(1)[0]
    end = good.copy()
    end.rattle(0.05, seed=3)
    bad = good.copy()
    bad.positions[1] = bad.positions[0] + [0.01, 0.0, 0.0]
    with torch.no_grad():
        morse.log_depth.add_(3.0)
    how = Unrolling(Descent(0.001))
    both = RelaxationTerm([RelaxationPair(good, end), RelaxationPair(bad, good)], 2, 1.0, 3, how)
    one = RelaxationTerm([RelaxationPair(good, end)], 2, 1.0, 3, how)
    gradients = []
    for term, dropped in ((both, 1.0), (one, 0.0)):
        loss, parts = Objective(morse, Weights(0.0, 0.0))([], term)
        assert float(parts["relaxation/dropped"]) == dropped / 2
        assert float(parts["relaxation/steps"]) == 3 / 2
        gradients.append(torch.autograd.grad(loss, morse.length)[0])
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


def test_the_gradient_at_the_minimum_is_that_of_a_long_relaxation(morse: MorsePotential) -> None:
    start = periodic(1)[0].repeat((2, 1, 1))
    del start[0]  # in a perfect crystal nothing depends on the model
    end = start.copy()
    end.rattle(0.05, seed=3)
    gradients = []
    for how in (Unrolling(engine="implicit"), Unrolling(Descent(0.03, 0.8), stop=Stop(fmax=1e-6))):
        term = RelaxationTerm([RelaxationPair(start, end)], 1, 1.0, 3000, how)
        loss, parts = Objective(morse, Weights(0.0, 0.0))([], term)
        assert float(parts["relaxation/dropped"]) == 0
        gradients.append(torch.cat(torch.autograd.grad(loss, list(morse.parameters()))))
    assert (
        float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-3
    )  # the minimum is sought to 1e-3 eV/Å


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_the_mean_of_the_ranks_losses_and_gradients_is_that_of_one_process(
    morse: MorsePotential, world_size: int
) -> None:
    data = LabelledSet(periodic(5), CUTOFF, torch.float64)
    indices = [0, 1, 2, 3, 4]
    pairs = [RelaxationPair(atoms, atoms) for atoms in periodic(3)]

    def loss_and_gradient(ranks: list[int], size: int) -> tuple[float, list[torch.Tensor]]:
        losses, sums = [], [torch.zeros_like(p) for p in morse.parameters()]
        for rank in ranks:
            labelled = [term_of(data, indices, share(data.num_atoms_each(indices), rank, size))]
            mine = [pairs[i] for i in share([len(pair.start) for pair in pairs], rank, size)]
            relaxation = RelaxationTerm(mine, len(pairs), 0.3, 2)
            loss, _ = Objective(morse, WEIGHTS, size)(labelled, relaxation)
            losses.append(float(loss.detach()))
            # Not allow_unused: DDP waits for every parameter, also on a rank whose share is empty.
            for total, gradient in zip(
                sums, torch.autograd.grad(loss, list(morse.parameters())), strict=True
            ):
                total += gradient / size
        return float(np.mean(losses)), sums

    one, gradient_of_one = loss_and_gradient([0], 1)
    many, gradient_of_many = loss_and_gradient(list(range(world_size)), world_size)
    assert many == pytest.approx(one, rel=1e-12)
    for a, b in zip(gradient_of_one, gradient_of_many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_a_saddle_that_the_backward_pass_finds_is_counted_as_dropped(morse: MorsePotential) -> None:
    """A square of atoms, which stays flat by symmetry; to fold it along a diagonal would lower its energy."""
    square = Atoms("Cu4", positions=[[0, 0, 0], [2.5, 0, 0], [2.5, 2.5, 0], [0, 2.5, 0]])
    folded = square.copy()
    folded.positions[[0, 2], 2] += 0.3
    objective = Objective(morse, Weights(0.0, 0.0))
    term = RelaxationTerm([RelaxationPair(square, folded)], 1, 1.0, 1, Unrolling(engine="implicit"))
    loss, parts = objective([], term)
    assert float(parts["relaxation/dropped"]) == 0
    loss.backward()
    objective.count_left_out(parts)
    assert float(parts["relaxation/dropped"]) == 1
    assert all(p.grad is None or not p.grad.any() for p in morse.parameters())

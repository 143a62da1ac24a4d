"""Batched relaxation ends where ASE's optimisers end, each structure on its own."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.constraints import FixAtoms, FixBondLength
from ase.optimize import BFGS, FIRE
from ase.optimize.optimize import Optimizer

from hpcft.errors import UserError
from hpcft.models.graph import Graph, build_graph
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import Potential, evaluate
from hpcft.relaxation import OPTIMISERS, Relaxed, delta_q, relax


@pytest.fixture
def starts(morse: MorsePotential, make_alloy: Callable[..., Atoms]) -> list[Atoms]:
    """At rest already (to 1e-4 eV/Å); a vacancy; a cluster; far from its minimum."""
    (at_rest,) = relax(morse, [make_alloy((1, 1, 1))], fmax=1e-4)
    vacancy = make_alloy((2, 2, 1), rattle=0.1, seed=1)
    del vacancy[3]
    cluster = Atoms("Cu3Al", positions=[[0, 0, 0], [2.6, 0, 0], [0, 2.6, 0.3], [1.3, 1, 2.4]])
    far = make_alloy(rattle=0.3, seed=2)
    return [at_rest.atoms, vacancy, cluster, far]


def distance(a: Atoms, b: Atoms) -> float:
    graph = build_graph([a], 0.1)
    return float(delta_q(graph.positions_n3, torch.from_numpy(b.get_positions()), graph))


@pytest.mark.parametrize(("ours", "optimiser"), [("fire", BFGS), ("fire", FIRE), ("lbfgs", BFGS)])
def test_relaxations_end_in_the_minimum_that_ase_finds(
    morse: MorsePotential,
    starts: list[Atoms],
    as_calculator: Callable[[Potential], Calculator],
    ours: str,
    optimiser: type[Optimizer],
) -> None:
    before = [atoms.copy() for atoms in starts]
    results = relax(morse, starts, fmax=1e-4, optimiser=ours)
    assert all(a.positions.tolist() == b.positions.tolist() for a, b in zip(starts, before, strict=True))
    for start, result in zip(starts, results, strict=True):
        reference = start.copy()
        reference.calc = as_calculator(morse)
        optimiser(reference, logfile=None).run(fmax=1e-4, steps=2000)
        assert result.converged
        assert result.energy == pytest.approx(reference.get_potential_energy(), abs=2e-6)
        if start.pbc.any():
            assert distance(result.atoms, reference) < 0.01
        # A cluster may turn on its way, and BFGS and FIRE turn it differently.
        difference = result.atoms.get_all_distances(mic=True) - reference.get_all_distances(mic=True)
        assert np.abs(difference).max() < 0.003
        forces = evaluate(morse, build_graph([result.atoms], morse.cutoff)).forces_n3
        assert result.max_force == pytest.approx(float(forces.norm(dim=1).max()), rel=1e-6)
        assert result.max_force < 1e-4
    assert distance(starts[3], results[3].atoms) > 3.0


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_each_structure_takes_as_many_steps_as_alone_and_ends_at_the_same_place(
    morse: MorsePotential, starts: list[Atoms], optimiser: str
) -> None:
    together = relax(morse, starts, fmax=0.01, optimiser=optimiser)
    assert together[0].num_steps == 0
    assert len({result.num_steps for result in together}) >= 3
    for start, result in zip(starts, together, strict=True):
        (alone,) = relax(morse, [start], fmax=0.01, optimiser=optimiser)
        assert (result.num_steps, result.converged) == (alone.num_steps, True)
        np.testing.assert_allclose(result.atoms.positions, alone.atoms.positions, atol=1e-9)
        assert result.energy == pytest.approx(alone.energy, abs=1e-10)


def test_a_relaxation_that_runs_out_of_steps_says_that_it_has_not_converged(
    morse: MorsePotential, starts: list[Atoms]
) -> None:
    results = relax(morse, starts, fmax=1e-3, max_steps=5)
    assert [(result.converged, result.num_steps) for result in results] == [(True, 0)] + [(False, 5)] * 3
    assert all(result.max_force >= 1e-3 for result in results[1:])


def test_a_structure_whose_forces_are_not_finite_ends_at_once_and_the_others_converge(
    morse: MorsePotential, starts: list[Atoms]
) -> None:
    class Spoilt(torch.nn.Module):
        """Infinite energy where a structure has four atoms and is open."""

        architecture, cutoff, elements = "spoilt", morse.cutoff, morse.elements

        def __init__(self) -> None:
            super().__init__()
            self.inner = morse
            self.descriptors, self.configuration = morse.descriptors, morse.configuration

        def energies(self, graph: Graph) -> torch.Tensor:
            factor = torch.where(graph.periodic_b3.any(dim=1), 1.0, float("nan"))
            return self.inner.energies(graph) * factor

    potential: Potential = Spoilt()
    results = relax(potential, starts, fmax=0.01)
    assert [result.converged for result in results] == [True, True, False, True]
    assert not np.isfinite(results[2].energy)
    assert results[2].num_steps == 0
    assert np.isfinite(results[2].atoms.positions).all()


def test_nothing_to_relax_gives_nothing(morse: MorsePotential) -> None:
    assert relax(morse, []) == []


def test_lbfgs_takes_fewer_steps_than_fire_and_than_ase_s_fire(
    morse: MorsePotential, starts: list[Atoms], as_calculator: Callable[[Potential], Calculator]
) -> None:
    fire, lbfgs = (relax(morse, starts[1:3], fmax=1e-3, optimiser=name) for name in ("fire", "lbfgs"))
    for start, slow, fast in zip(starts[1:3], fire, lbfgs, strict=True):
        reference = start.copy()
        reference.calc = as_calculator(morse)
        optimizer = FIRE(reference, logfile=None)
        optimizer.run(fmax=1e-3, steps=2000)
        assert fast.converged
        assert fast.num_steps < 0.6 * slow.num_steps
        assert fast.num_steps < 0.6 * optimizer.nsteps
        assert fast.energy == pytest.approx(slow.energy, abs=1e-5)


@pytest.mark.parametrize("with_cell", [False, True])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("max_atoms", [1, 16, 24])
def test_in_small_batches_that_are_filled_up_the_results_and_their_order_are_the_same(
    morse: MorsePotential,
    make_alloy: Callable[..., Atoms],
    optimiser: str,
    with_cell: bool,
    max_atoms: int,
) -> None:
    """Some end soon and some late, so that newcomers join those which are half way."""
    structures = [
        make_alloy((1 + number % 2, 1, 1), rattle=0.02 + 0.05 * (number % 3), seed=number)
        for number in range(6)
    ]
    structures[2].set_constraint(FixAtoms([0]))
    together = relax(morse, structures, optimiser=optimiser, with_cell=with_cell, fmax=0.005)
    order: list[int] = []
    largest = 0

    def on_done(number: int, result: Relaxed) -> None:
        order.append(number)

    counted = morse.energies

    def energies(graph: Graph) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(graph.numbers_n))
        return counted(graph)

    morse.energies = energies  # type: ignore[method-assign]
    filled = relax(
        morse,
        structures,
        optimiser=optimiser,
        with_cell=with_cell,
        fmax=0.005,
        max_atoms=max_atoms,
        on_done=on_done,
    )
    assert sorted(order) == list(range(6))
    assert largest <= max(max_atoms, 8)  # one that is larger than the limit comes alone
    if max_atoms == 24:
        assert order != sorted(order)
    for a, b in zip(together, filled, strict=True):
        assert (a.num_steps, a.converged) == (b.num_steps, b.converged)
        assert a.energy_start == pytest.approx(b.energy_start, abs=1e-10)
        np.testing.assert_allclose(a.atoms.positions, b.atoms.positions, atol=1e-9)
        np.testing.assert_allclose(a.atoms.cell.array, b.atoms.cell.array, atol=1e-9)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_fixed_atoms_stay_where_they_are_to_the_last_bit(
    morse: MorsePotential, starts: list[Atoms], optimiser: str
) -> None:
    start = starts[1]
    start.set_constraint([FixAtoms([0, 2]), FixAtoms(mask=np.arange(len(start)) == 5)])
    (end,) = relax(morse, [start], optimiser=optimiser)
    fixed = [0, 2, 5]
    assert end.converged
    assert np.array_equal(end.atoms.positions[fixed], start.positions[fixed])
    assert (np.delete(end.atoms.positions, fixed, axis=0) != np.delete(start.positions, fixed, axis=0)).all()
    assert sorted(i for c in end.atoms.constraints for i in c.index) == fixed
    real = evaluate(morse, build_graph([end.atoms], morse.cutoff)).forces_n3.numpy()
    assert np.abs(real[fixed]).max() > 0.01
    real[fixed] = 0.0
    np.testing.assert_allclose(end.forces, real, atol=1e-10)


def test_a_structure_of_which_everything_is_fixed_is_at_rest(
    morse: MorsePotential, starts: list[Atoms]
) -> None:
    starts[1].set_constraint(FixAtoms(range(len(starts[1]))))
    (end,) = relax(morse, [starts[1]])
    assert (end.converged, end.num_steps, end.max_force) == (True, 0, 0.0)


def test_another_constraint_is_refused_and_the_structure_is_named(
    morse: MorsePotential, starts: list[Atoms]
) -> None:
    starts[2].set_constraint(FixBondLength(0, 1))
    with pytest.raises(
        UserError, match=r"structure 2 \(AlCu3\) has the constraint FixBondLengths?; only fixed"
    ):
        relax(morse, starts)


def test_an_optimiser_that_does_not_exist_is_an_error_that_names_those_that_do(morse: MorsePotential) -> None:
    with pytest.raises(ValueError, match="no optimiser 'bfgs'; choose one of fire, lbfgs"):
        relax(morse, [], optimiser="bfgs")


def test_a_cell_that_is_not_there_cannot_relax(morse: MorsePotential, starts: list[Atoms]) -> None:
    with pytest.raises(ValueError, match="not periodic or its cell vectors span no volume"):
        relax(morse, starts[2:3], with_cell=True)


@pytest.mark.parametrize("with_cell", [False, True])
def test_in_single_precision_what_is_at_rest_keeps_every_bit(
    morse: MorsePotential, starts: list[Atoms], with_cell: bool
) -> None:
    """Fails if positions or cells go through float32 and back."""
    atoms = starts[0]
    atoms.info["name"] = "kept"
    before = atoms.copy()
    (end,) = relax(morse.float(), [atoms], fmax=1e-2, max_stress=1.0, with_cell=with_cell)
    assert (end.converged, end.num_steps) == (True, 0)
    assert np.array_equal(end.atoms.positions, before.positions)
    assert np.array_equal(end.atoms.cell.array, before.cell.array)
    assert end.atoms.info == before.info
    assert (before.positions != before.positions.astype(np.float32)).any()


def test_without_a_step_the_end_is_the_start(morse: MorsePotential, starts: list[Atoms]) -> None:
    for result, start in zip(relax(morse, starts, max_steps=0, fmax=1e-9), starts, strict=True):
        assert (result.num_steps, result.converged) == (0, False)
        assert result.energy == result.energy_start
        assert np.array_equal(result.atoms.positions, start.positions)


def test_the_examples_of_the_documentation_run_one_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "relaxation.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 4
    (tmp_path / "examples.py").write_text("\n".join(examples))
    runpy.run_path(str(tmp_path / "examples.py"))
    assert len(capsys.readouterr().out.splitlines()) >= 4

"""Everything that runs on a GPU, on a pretended one: no tensor is left behind, and few steps wait for answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from pretended_gpu import DEVICE, MixedDevices, pretended_gpu, waits_a_step
from small_models import alloy, small_mace, small_morse

from hpcft.md import Dynamics, Ramp, Replica, Simulation, thermal_velocities
from hpcft.md.motion import Motion
from hpcft.models.committee import ENERGIES, SPREAD, Committee
from hpcft.models.graph import build_graph
from hpcft.models.protocol import Potential, device_of, evaluate
from hpcft.relaxation import (
    Descent,
    Fire,
    RelaxationPair,
    StepSize,
    Stop,
    delta_q,
    relax,
    relaxed_implicitly,
    unroll,
)
from hpcft.selection.q_residual import q_observer, space_of_structures
from hpcft.storage.frames import FrameBlock
from hpcft.training.data import LabelledSet
from hpcft.training.loss import Unrolling, Weights
from hpcft.training.settings import BpttSettings, TrainingData, TrainingSettings
from hpcft.training.trainer import Trainer

DYNAMICS = {
    "nve": Dynamics(thermostat="none"),
    "nvt": Dynamics(),
    "nvt, centre held, heated": Dynamics(Ramp(300, 600, 10), fix_centre_of_mass=True),
    "svr": Dynamics(thermostat="svr"),
    "npt": Dynamics(thermostat="svr", barostat="isotropic"),
    "npt-full": Dynamics(barostat="full"),
}
# What a batch of any size may wait for in a step: the edges within the cutoff and whether the list is complete, which come at
# the same moment, and the signs of life.
A_STEP = {"nonzero": 1, "_local_scalar_dense": 1, "device to host": 1}


def replicas(number: int = 2, *, fixed: bool = False) -> list[Replica]:
    found = []
    for index in range(number):
        atoms, random = alloy(rattle=0.05, seed=index), np.random.default_rng([1, index])
        if fixed and index == 0:
            atoms.set_constraint(FixAtoms([0]))
        found.append(Replica(index, atoms, thermal_velocities(atoms, 300, random), random))
    return found


def structures(number: int = 3) -> list[Atoms]:
    """Labelled, the first with a fixed atom."""
    found = [alloy(seed=index) for index in range(number)]
    for index, atoms in enumerate(found):
        atoms.info["REF_energy"], atoms.info["REF_stress"] = float(index), 0.01 * np.eye(3)
        atoms.arrays["REF_forces"] = 0.1 * atoms.positions
    found[0].set_constraint(FixAtoms([1]))
    return found


def on_both(compute: Callable[[Any], Sequence[Any]], make: Callable[[], Any] = small_morse) -> None:
    """What is computed with a model on the processor and with one on the GPU is the same."""
    expected = compute(make())
    with pretended_gpu():
        model = make().to(DEVICE)
        assert device_of(model) == DEVICE
        found = [values.cpu() if isinstance(values, torch.Tensor) else values for values in compute(model)]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-9, atol=1e-10)


def test_a_tensor_that_was_left_behind_is_found() -> None:
    """Fails if the pretended GPU forgives what a real one does not."""
    with pretended_gpu():
        here, there = torch.ones(3), torch.ones(3, device=DEVICE)
        with pytest.raises(MixedDevices, match="of the processor meets one of the GPU"):
            there + here
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        motion = Motion(small_morse().to(DEVICE), replicas(), [Dynamics()] * 2)
        motion.step()
        motion.mass_n1 = motion.mass_n1.cpu()
        with pytest.raises(MixedDevices):
            motion.step()


def test_energies_forces_stress_and_descriptors_are_those_of_the_processor(
    mixed_structures: list[Atoms],
) -> None:
    def compute(model: Potential) -> Sequence[Any]:
        graph = build_graph(mixed_structures, model.cutoff).to(device_of(model))
        result = evaluate(model, graph, stress=True)
        back = graph.to("cpu")
        assert back.positions_n3.device.type == "cpu"
        assert result.stress_b33 is not None
        found = (result.energies_b, result.forces_n3, result.stress_b33, model.descriptors(graph))
        return *found, back.positions_n3

    on_both(compute, small_mace)


@pytest.mark.parametrize("dynamics", DYNAMICS.values(), ids=DYNAMICS)
def test_each_thermostat_and_barostat_moves_atoms_as_on_the_processor(dynamics: Dynamics) -> None:
    def compute(model: Any) -> Sequence[Any]:
        moving = replicas(fixed=dynamics.barostat == "none")
        blocks: list[FrameBlock] = Simulation(
            model.requires_grad_(False), moving, dynamics, keep_last=True
        ).run(7, 3)
        ends = [(replica.atoms.positions, replica.velocities, replica.random.random()) for replica in moving]
        frames = [(b.positions, b.velocities, b.forces, b.cell, b.potential_energy) for b in blocks]
        return [values for row in (*ends, *frames) for values in row]

    on_both(compute, small_mace if dynamics == DYNAMICS["npt"] else small_morse)


def test_what_is_observed_of_frames_is_that_of_the_processor() -> None:
    def compute(model: Any) -> Sequence[Any]:
        graph = build_graph([alloy(seed=3)], model.cutoff, device=device_of(model))
        seen = Committee([model, model]).observe(graph)
        seen |= q_observer(model, space_of_structures(model, structures()))(graph)
        return [seen[SPREAD], seen[ENERGIES], seen["q_residual"]]

    on_both(compute)


@pytest.mark.parametrize("optimiser", ["fire", "lbfgs"])
@pytest.mark.parametrize("with_cell", [False, True])
def test_relaxations_go_the_same_way(optimiser: str, with_cell: bool) -> None:
    def compute(model: Any) -> Sequence[Any]:
        options = {"max_steps": 6, "fmax": 0.3, "max_atoms": 16, "with_cell": with_cell}
        ends = relax(model, structures(), optimiser=optimiser, **options)  # type: ignore[arg-type]
        return [
            v for end in ends for v in (end.atoms.positions, end.atoms.cell.array, end.forces, end.energy)
        ]

    on_both(compute)


@pytest.mark.parametrize(
    ("engine", "with_cell"),
    [
        ("plain", False),
        ("checkpoint", False),
        ("adjoint", True),
        ("finite-difference", False),
        ("implicit", False),
    ],
)
def test_the_gradient_of_a_relaxation_is_that_of_the_processor(engine: str, with_cell: bool) -> None:
    def compute(model: Any) -> Sequence[Any]:
        graph = build_graph(structures(2), model.cutoff, device=device_of(model))
        movable = torch.arange(len(graph.numbers_n), device=device_of(model)) != 1
        options: dict[str, Any] = {"movable_n": movable, "with_cell": with_cell}
        if engine == "implicit":
            end, _ = relaxed_implicitly(model, graph, fmax=1e-2, **options)
        else:
            step_size = StepSize(0.01, model.elements).double().to(device_of(model))
            map = Descent(step_size, momentum=0.5)
            end = unroll(model, graph, map, 4, engine=engine, stop=Stop(fmax=0.1), last=3, **options)
        delta_q(end.positions_n3, graph.positions_n3, graph).sum().backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert found
        return [end.positions_n3.detach(), end.cell_b33.detach(), *found]

    on_both(compute, small_mace if engine == "adjoint" else small_morse)


def trainer(model: Any) -> Trainer:
    """On energies, forces, stresses and relaxations."""
    labels = LabelledSet(structures(), model.cutoff, torch.float64)
    pairs = [RelaxationPair(alloy(rattle=0.1, seed=5), alloy(rattle=0.0))]
    bptt = BpttSettings(weight=0.1, every=1, batch_size=1, steps=3, unrolling=Unrolling(Fire()))
    settings = TrainingSettings(2, 3, 3, weights=Weights(1.0, 1.0, 1.0), relaxation=bptt, ema=0.9)
    return Trainer(model, TrainingData(labels, relaxations=pairs), settings)


def test_a_step_of_training_changes_the_weights_as_on_the_processor() -> None:
    def compute(model: Any) -> Sequence[Any]:
        training = trainer(model)
        for step in range(2):
            parts = training._step(step, training.batches.pieces(step))
        return [*parts.values(), *(p.detach() for p in model.parameters())]

    on_both(compute, small_mace)


@pytest.mark.parametrize(
    ("dynamics", "more"),
    [
        (DYNAMICS["nve"], 0),
        (DYNAMICS["nvt"], 0),
        (DYNAMICS["nvt, centre held, heated"], 0),
        (DYNAMICS["svr"], 1),  # the kinetic energy
        (DYNAMICS["npt"], 2),  # and what drives the cell
    ],
    ids=["nve", "nvt", "held and heated", "svr", "npt"],
)
@pytest.mark.parametrize("number", [1, 5])
def test_a_step_of_dynamics_waits_as_often_for_many_replicas_as_for_one(
    dynamics: Dynamics, more: int, number: int
) -> None:
    def run(steps: int, frame_every: int = 1000) -> None:
        model = small_morse().to(DEVICE)
        Simulation(model, replicas(number), dynamics, keep_last=True).run(steps, frame_every)

    expected = {**A_STEP, "device to host": 1 + more}
    assert waits_a_step(run) == expected
    with_frames = waits_a_step(lambda steps: run(steps, frame_every=1))
    cells = dynamics.barostat != "none"
    assert with_frames == {**expected, "device to host": 1 + more + 4 + cells}


@pytest.mark.parametrize("with_cell", [False, True])
def test_a_step_of_a_relaxation_waits_three_times(with_cell: bool) -> None:
    def run(steps: int) -> None:
        model = small_morse().to(DEVICE)
        relax(model, structures(), fmax=1e-9, max_steps=steps, with_cell=with_cell)

    assert waits_a_step(run) == A_STEP


def test_a_step_of_an_unrolled_relaxation_waits_three_times_and_once_more_on_the_way_back() -> None:
    def run(steps: int) -> None:
        model = small_morse().to(DEVICE)
        graph = build_graph(structures(), model.cutoff, device=DEVICE)
        map = Descent(StepSize(1e-4, model.elements).double().to(DEVICE))
        end = unroll(model, graph, map, steps, stop=Stop(fmax=1e-9))
        delta_q(end.positions_n3, graph.positions_n3, graph).sum().backward()

    assert waits_a_step(run) == {**A_STEP, "nonzero": 2}


def test_a_step_of_training_on_labels_waits_once() -> None:
    def run(steps: int) -> None:
        model = small_mace().to(DEVICE)
        training = Trainer(
            model, TrainingData(LabelledSet(structures(), model.cutoff, torch.float64)), TrainingSettings(1)
        )
        for step in range(steps):
            training._step(step, training.batches.pieces(step))

    assert waits_a_step(run, 1, 2) == {"device to host": 1}

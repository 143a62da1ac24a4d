"""Replicas in one batch: independent of how they are packed, continued bit for bit, guarded one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms

from hpcft.errors import UserError
from hpcft.md import AT_STOP, Dynamics, Guards, Replica, Simulation, thermal_velocities
from hpcft.md.committed import Stretch
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import Potential
from hpcft.storage.trajectory import FrameBlock

SETTINGS = Dynamics(temperature_K=900, timestep=2.0, friction_per_ps=20)


def cell_of(index: int, make_alloy: Callable[..., Atoms]) -> Atoms:
    """Structures of different sizes; the third is open."""
    if index == 2:
        return Atoms("Cu3Al", positions=[[0, 0, 0], [2.6, 0, 0], [0, 2.6, 0.3], [1, 1, 2.4]])
    return make_alloy((1 + index % 2, 1, 1), rattle=0.05, seed=index)


def replicas_of(make_alloy: Callable[..., Atoms], *indices: int) -> list[Replica]:
    found = []
    for index in indices:
        atoms = cell_of(index, make_alloy)
        random = np.random.default_rng([7, index])
        found.append(Replica(index, atoms, thermal_velocities(atoms, 900, random), random))
    return found


def same_frames(a: FrameBlock, b: FrameBlock) -> bool:
    left, right = vars(a), vars(b)
    return all(
        np.array_equal(np.asarray(left[name]), np.asarray(right[name]))
        for name in left
        if name != "observables"
    )


def test_a_trajectory_does_not_depend_on_which_replicas_share_its_batch(
    morse: MorsePotential, make_alloy: Callable[..., Atoms]
) -> None:
    together = Simulation(morse, replicas_of(make_alloy, 0, 1, 2), SETTINGS).run(40, 10)
    reordered = Simulation(morse, replicas_of(make_alloy, 2, 0), SETTINGS).run(40, 10)
    alone = [Simulation(morse, replicas_of(make_alloy, index), SETTINGS).run(40, 10)[0] for index in range(3)]
    for block in (*together, *reordered):
        other = alone[block.replica]
        np.testing.assert_allclose(block.positions, other.positions, atol=1e-10)
        np.testing.assert_allclose(block.velocities, other.velocities, atol=1e-11)
        np.testing.assert_allclose(block.forces, other.forces, atol=1e-9)
        np.testing.assert_allclose(block.potential_energy, other.potential_energy, atol=1e-10)
    assert np.abs(together[0].positions[-1] - cell_of(0, make_alloy).positions).max() > 0.1  # they did move


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_continued_from_its_saved_state_is_bit_for_bit_the_run_that_went_on(
    morse: MorsePotential, make_alloy: Callable[..., Atoms], dtype: torch.dtype
) -> None:
    potential = morse.to(dtype)
    first = replicas_of(make_alloy, 0, 1, 2)
    first[2].velocities *= 50  # stops in the first half, and must stay stopped in the second
    simulation = Simulation(potential, first, SETTINGS, Guards(max_temperature_K=20_000))
    simulation.run(25, 5)
    states = [replica.state() for replica in first]
    uninterrupted = simulation.run(25, 5)

    second = replicas_of(make_alloy, 0, 1, 2)
    for replica, state in zip(second, states, strict=True):
        replica.restore(state)
    continued = Simulation(potential, second, SETTINGS, Guards(max_temperature_K=20_000)).run(25, 5)
    assert [block.replica for block in continued] == [0, 1]
    assert all(same_frames(a, b) for a, b in zip(uninterrupted, continued, strict=True))
    for a, b in zip(first, second, strict=True):
        assert a.state().keys() == b.state().keys()
        for name, value in a.state().items():
            assert np.array_equal(np.asarray(value), np.asarray(b.state()[name])), name
    assert [block.step.tolist() for block in continued] == [[30, 35, 40, 45, 50]] * 2


def test_the_saved_random_state_is_text_that_a_file_can_hold(make_alloy: Callable[..., Atoms]) -> None:
    (replica,) = replicas_of(make_alloy, 0)
    assert json.loads(replica.state()["random"])["bit_generator"] == "PCG64"


class Spoilt:
    """Ways to make replica 1 fail, each with the cause that must be written down."""

    @staticmethod
    def hot(replica: Replica) -> None:
        replica.velocities *= 50

    @staticmethod
    def overlapping(replica: Replica) -> None:
        replica.atoms.positions[1] = replica.atoms.positions[0] + [0.4, 0.0, 0.0]
        replica.velocities[:2] = 0.0

    @staticmethod
    def not_a_number(replica: Replica) -> None:
        replica.velocities[0, 0] = np.nan


@pytest.mark.parametrize(
    ("spoil", "guards", "cause"),
    [
        (Spoilt.hot, Guards(max_temperature_K=20_000), "temperature"),
        (Spoilt.overlapping, Guards(min_distance=1.0), "distance"),
        (Spoilt.overlapping, Guards(max_force=10.0), "force"),
        (Spoilt.not_a_number, Guards(), "non-finite"),
    ],
)
def test_a_replica_that_explodes_stops_with_its_cause_and_the_others_go_on(
    morse: MorsePotential,
    make_alloy: Callable[..., Atoms],
    spoil: Callable[[Replica], None],
    guards: Guards,
    cause: str,
) -> None:
    replicas = replicas_of(make_alloy, 0, 1, 2)
    spoil(replicas[1])
    simulation = Simulation(morse, replicas, SETTINGS, guards)
    blocks = simulation.run(30, 4)
    assert [replica.stopped for replica in replicas] == ["", cause, ""]
    assert replicas[1].step < 30
    assert [replicas[0].step, replicas[2].step] == [30, 30]
    others = {block.replica: block for block in blocks if block.replica != 1}
    assert [others[0].step.tolist(), others[2].step.tolist()] == [[4, 8, 12, 16, 20, 24, 28]] * 2
    for index in (0, 2):
        (alone,) = Simulation(morse, replicas_of(make_alloy, index), SETTINGS, guards).run(30, 4)
        np.testing.assert_allclose(others[index].positions, alone.positions, atol=1e-9)
    stopped_at = replicas[1].step
    simulation.run(4, 4)
    assert (replicas[1].step, replicas[0].step) == (stopped_at, 34)


def test_the_frames_before_an_explosion_are_kept_and_the_frame_of_it_is_not(
    morse: MorsePotential, make_alloy: Callable[..., Atoms]
) -> None:
    class Cliff(torch.nn.Module):
        """A Morse potential until the atoms have moved 0.3 Å: then its energy is not a number."""

        architecture, cutoff, elements = "cliff", morse.cutoff, morse.elements

        def __init__(self, start: Atoms) -> None:
            super().__init__()
            self.inner, self.start_n3 = morse, torch.from_numpy(start.get_positions())
            self.descriptors, self.configuration = morse.descriptors, morse.configuration

        def energies(self, graph: object) -> torch.Tensor:
            moved = (graph.positions_n3 - self.start_n3).detach().abs().max()  # type: ignore[attr-defined]
            return self.inner.energies(graph) * (1.0 if moved < 0.3 else float("nan"))  # type: ignore[arg-type]

    (replica,) = replicas_of(make_alloy, 0)
    potential: Potential = Cliff(replica.atoms)
    (block,) = Simulation(potential, [replica], SETTINGS).run(2000, 1)
    assert replica.stopped == "non-finite"
    assert block.step.tolist() == list(range(1, replica.step))
    assert replica.step > 5
    for values in (block.positions, block.velocities, block.forces, block.potential_energy):
        assert np.isfinite(values).all()


@pytest.mark.parametrize("frame_every", [1, 7])
def test_the_last_frame_before_a_stop_is_kept_and_marked(
    morse: MorsePotential, make_alloy: Callable[..., Atoms], frame_every: int
) -> None:
    def run(steps: int, keep: bool) -> list[FrameBlock]:
        replicas = replicas_of(make_alloy, 0, 1)
        replicas[0].velocities *= 3
        guards = Guards(min_distance=2.05)
        simulation = Simulation(morse, replicas, SETTINGS, guards, keep_last=keep)
        return simulation.run(steps, frame_every)

    marked = run(200, keep=True)[0]
    plain = run(200, keep=False)[0]
    mark = marked.observables[AT_STOP]
    assert mark.tolist() == [False] * (len(mark) - 1) + [True]
    assert len(marked.step) == len(plain.step) + (marked.step[-1] % frame_every > 0)
    (replica,) = replicas_of(make_alloy, 0)  # where it stood one step before
    replica.velocities *= 3
    Simulation(morse, [replica, *replicas_of(make_alloy, 1)], SETTINGS).run(int(marked.step[-1]), 10**6)
    np.testing.assert_array_equal(marked.positions[-1], replica.atoms.positions)


def test_a_stop_at_the_first_step_of_a_segment_repeats_no_frame_of_the_one_before(
    morse: MorsePotential, make_alloy: Callable[..., Atoms]
) -> None:
    """Fails if the frame before the stop is written twice, which no trajectory takes: steps must rise."""
    replicas = replicas_of(make_alloy, 0)
    simulation = Simulation(morse, replicas, SETTINGS, Guards(max_temperature_K=20_000), keep_last=True)
    (block,) = simulation.run(4, 2)
    replicas[0].velocities *= 50
    assert simulation.run(4, 2) == []
    assert (block.step.tolist(), replicas[0].step, replicas[0].stopped) == ([2, 4], 5, "temperature")


def test_of_a_replica_that_explodes_in_its_very_first_step_the_start_is_kept(
    morse: MorsePotential, make_alloy: Callable[..., Atoms]
) -> None:
    """Fails if it leaves no frame, and so no trace in the file."""
    replicas = replicas_of(make_alloy, 0, 1)
    start = replicas[0].atoms.get_positions()
    dynamics = [replace(SETTINGS, timestep=1000.0), SETTINGS]
    simulation = Simulation(morse, replicas, dynamics, Guards(max_temperature_K=20_000), keep_last=True)
    first, second = simulation.run(4, 2)
    assert (first.step.tolist(), first.observables[AT_STOP].tolist()) == ([0], [True])
    np.testing.assert_allclose(first.positions[0], start)
    assert np.isfinite(first.forces).all()
    assert second.step.tolist() == [2, 4]


def test_no_frame_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="no frame would be kept: one is every 10 steps, and there are 5"):
        Stretch(5, 10, 1)


def test_a_replica_stops_where_what_is_observed_passes_its_limit(
    morse: MorsePotential, make_alloy: Callable[..., Atoms]
) -> None:
    def observe(graph: object) -> dict[str, np.ndarray]:
        """Grows along the way, and only for the larger structure."""
        count["frames"] += 1
        return {"spread": (graph.num_atoms_b.numpy() > 4) * 0.1 * count["frames"]}  # type: ignore[attr-defined]

    count = {"frames": 0}
    replicas = replicas_of(make_alloy, 0, 1)
    guards = Guards(max_observed={"spread": 0.25})
    every = {"forces": 10, "velocities": 100}
    blocks = Simulation(morse, replicas, SETTINGS, guards, observe, keep_last=True, every=every).run(50, 5)
    assert [r.stopped for r in replicas] == ["", "spread"]
    assert [r.step for r in replicas] == [50, 15]
    assert blocks[1].step.tolist() == [
        5,
        10,
        15,
    ]  # the frame that went too far is what the reference shall see
    assert blocks[1].observables[AT_STOP].tolist() == [False, False, True]
    has = {name: np.isfinite(getattr(blocks[1], name)[:, 0, 0]).tolist() for name in every}
    assert has == {"forces": [False, True, True], "velocities": [False, False, True]}  # and it has everything


def test_what_ends_makes_room_for_the_next_and_nothing_else_changes(
    morse: MorsePotential, make_alloy: Callable[..., Atoms]
) -> None:
    def run(max_atoms: int | None) -> tuple[list[Replica], list[FrameBlock], list[int]]:
        replicas = replicas_of(make_alloy, 0, 1, 2, 3)
        replicas[1].velocities *= 50
        sizes: list[int] = []

        def observe(graph: object) -> dict[str, np.ndarray]:
            sizes.append(len(graph.numbers_n))  # type: ignore[attr-defined]
            return {}

        guards = Guards(max_temperature_K=20_000)
        simulation = Simulation(morse, replicas, SETTINGS, guards, observe, max_atoms=max_atoms)
        return replicas, simulation.run(12, 4), sizes

    together, few = run(None), run(10)
    assert [(r.step, r.stopped) for r in together[0]] == [(r.step, r.stopped) for r in few[0]]
    assert max(few[2]) <= 10 < max(together[2])
    for a, b in zip(together[1], few[1], strict=True):
        np.testing.assert_array_equal(a.step, b.step)
        np.testing.assert_allclose(a.positions, b.positions, atol=1e-9)
    lonely = run(1)  # a replica that is larger than the room goes in alone
    assert [r.step for r in lonely[0]] == [r.step for r in together[0]]


def test_observables_are_recorded_with_each_frame(
    morse: MorsePotential, make_alloy: Callable[..., Atoms]
) -> None:
    def observe(graph: object) -> dict[str, np.ndarray]:
        return {"num_atoms": graph.num_atoms_b.numpy()}  # type: ignore[attr-defined]

    blocks = Simulation(morse, replicas_of(make_alloy, 0, 1), SETTINGS, observe=observe).run(4, 2)
    assert [block.observables["num_atoms"].tolist() for block in blocks] == [[4, 4], [8, 8]]


def test_nothing_moves_in_a_run_of_no_steps(morse: MorsePotential, make_alloy: Callable[..., Atoms]) -> None:
    (replica,) = replicas_of(make_alloy, 0)
    before = replace(replica, atoms=replica.atoms.copy())
    assert Simulation(morse, [replica], SETTINGS).run(0, 1) == []
    assert np.array_equal(replica.atoms.positions, before.atoms.positions)

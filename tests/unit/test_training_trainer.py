"""The trainer learns, follows its schedule, and stops when numbers stop being numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ase import Atoms
from ase.build import bulk

from hpcft.errors import UserError
from hpcft.models.graph import build_graph
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import evaluate
from hpcft.relaxation import Descent, RelaxationPair, StepSize, relax
from hpcft.training.data import LabelledSet
from hpcft.training.loss import Unrolling, Weights
from hpcft.training.schedule import scheduled
from hpcft.training.trainer import (
    BpttSettings,
    NotFinite,
    ReplaySettings,
    Trainer,
    TrainingData,
    TrainingSettings,
)


def morse(depth: float = 0.3, length: float = 2.8) -> MorsePotential:
    return MorsePotential([29], cutoff=4.0, depth=depth, length=length).double()


def labelled(count: int = 6, teacher: MorsePotential | None = None) -> list[Atoms]:
    teacher = teacher or morse(0.4, 2.6)
    found = []
    for number in range(count):
        atoms = bulk("Cu", a=3.6, cubic=True)
        atoms.rattle(0.15, seed=number)
        result = evaluate(teacher, build_graph([atoms], teacher.cutoff))
        atoms.info["REF_energy"] = float(result.energies_b[0])
        atoms.arrays["REF_forces"] = result.forces_n3.numpy()
        found.append(atoms)
    return found


def data_of(structures: list[Atoms]) -> LabelledSet:
    return LabelledSet(structures, 4.0, torch.float64)


def test_a_student_learns_from_the_labels_of_its_teacher(tmp_path: Path) -> None:
    student = morse()
    settings = TrainingSettings(100, batch_size=3, learning_rate=0.1, weights=Weights(1.0, 1.0))
    history = Trainer(student, TrainingData(data_of(labelled())), settings).run(tmp_path)
    assert history[-1]["loss"] < 5e-3 * history[0]["loss"]
    assert float(student.length.detach()) == pytest.approx(2.6, abs=0.08)  # from 2.8


def test_a_student_that_sees_relaxed_structures_only_learns_to_end_in_them(tmp_path: Path) -> None:
    teacher, student = morse(0.4, 2.6), morse(0.4, 2.7)
    starts = []
    for seed in range(2):
        atoms = bulk("Cu", a=3.6, cubic=True).repeat((2, 1, 1))
        del atoms[0]
        atoms.rattle(0.05, seed=seed)
        starts.append(atoms)
    ends = [result.atoms for result in relax(teacher, starts, fmax=1e-3)]
    pairs = [RelaxationPair(start, end) for start, end in zip(starts, ends, strict=True)]
    bptt = BpttSettings(
        weight=1.0, batch_size=2, steps=15, unrolling=Unrolling(Descent(step_size=0.03, momentum=0.5))
    )
    nothing = Weights(energy=0.0, forces=0.0)
    settings = TrainingSettings(
        1, 1, steps_per_epoch=20, learning_rate=0.01, weights=nothing, relaxation=bptt
    )
    trainer = Trainer(
        student, TrainingData(data_of(labelled(1)), relaxations=pairs), replace(settings, epochs=2)
    )
    history = trainer.run(tmp_path)
    assert history[1]["relaxation/delta_q"] < 0.5 * history[0]["relaxation/delta_q"]
    assert float(student.length.detach()) == pytest.approx(2.6, abs=0.05)


def test_the_learning_rate_warms_up_and_then_falls_like_a_cosine_to_a_hundredth(tmp_path: Path) -> None:
    settings = TrainingSettings(40, batch_size=1, steps_per_epoch=1, learning_rate=0.1)
    history = Trainer(morse(), TrainingData(data_of(labelled(2))), settings).run(tmp_path)
    rates = [row["learning_rate"] for row in history]
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1])  # a warm-up of one twentieth: two steps
    expected = [0.1 * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (s - 2) / 38))) for s in range(2, 40)]
    assert rates[2:] == pytest.approx(expected, rel=1e-12)
    assert rates[-1] < 0.0012


def test_an_epoch_is_one_pass_unless_a_number_of_steps_is_asked_for() -> None:
    data = TrainingData(data_of(labelled(5)))
    assert Trainer(morse(), data, TrainingSettings(1, batch_size=2)).steps_per_epoch == 3
    assert Trainer(morse(), data, TrainingSettings(1, batch_size=2, steps_per_epoch=7)).steps_per_epoch == 7


def test_history_has_every_part_of_the_loss_and_the_relaxation_only_where_it_took_part(
    tmp_path: Path,
) -> None:
    structures = labelled(3)
    data = TrainingData(
        data_of(structures), data_of(structures), [RelaxationPair(structures[0], structures[1])]
    )
    settings = TrainingSettings(
        4,
        batch_size=2,
        steps_per_epoch=1,
        replay=ReplaySettings(batch_size=1, weight=0.5),
        relaxation=BpttSettings(weight=0.1, every=3, steps=1),
    )
    history = Trainer(morse(), data, settings).run(tmp_path)
    assert [("relaxation/delta_q" in row) for row in history] == [True, False, False, True]
    for row in history:
        parts = (
            row["labels/energy"] + row["labels/forces"] + 0.5 * (row["replay/energy"] + row["replay/forces"])
        )
        parts += 0.1 * row.get("relaxation/delta_q", 0.0)
        assert row["loss"] == pytest.approx(parts, rel=1e-12)


def test_delta_q_is_reported_for_the_relaxations_that_did_not_diverge(tmp_path: Path) -> None:
    good, end = labelled(2)
    overlapping = good.copy()
    overlapping.positions[1] = overlapping.positions[0] + [0.01, 0.0, 0.0]
    pairs = {
        "both": [(good, end), (overlapping, overlapping)],
        "good": [(good, end)],
        "bad": [(overlapping, overlapping)],
    }
    rows = {}
    for name, chosen in pairs.items():
        bptt = BpttSettings(
            0.1, batch_size=len(chosen), steps=3, unrolling=Unrolling(Descent(step_size=0.001))
        )
        settings = TrainingSettings(1, batch_size=1, steps_per_epoch=1, relaxation=bptt)
        data = TrainingData(data_of([good]), relaxations=[RelaxationPair(*pair) for pair in chosen])
        (tmp_path / name).mkdir()
        (rows[name],) = Trainer(morse(depth=6.0), data, settings).run(tmp_path / name)
    assert [rows[name]["relaxation/dropped"] for name in pairs] == [0.5, 0.0, 1.0]
    assert rows["both"]["relaxation/delta_q"] == pytest.approx(rows["good"]["relaxation/delta_q"], rel=1e-12)
    assert "relaxation/delta_q" not in rows["bad"]


def test_the_gradient_is_clipped_to_the_norm_that_was_asked_for(tmp_path: Path) -> None:
    norms = []
    for clip in (None, 1e-3):
        student = morse()
        settings = TrainingSettings(1, batch_size=1, steps_per_epoch=1, gradient_clip=clip)
        folder = tmp_path / str(clip)
        folder.mkdir()
        Trainer(student, TrainingData(data_of(labelled(1))), settings).run(folder)
        norms.append(
            float(torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm())
        )
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(1e-3, rel=1e-4)


def spoil_energy(atoms: Atoms) -> None:
    atoms.info["REF_energy"] = float("nan")


def spoil_forces(atoms: Atoms) -> None:
    atoms.arrays["REF_forces"][1, 2] = float("nan")


@pytest.mark.parametrize("spoil", [spoil_energy, spoil_forces])
def test_a_label_that_is_not_a_number_stops_the_training_and_names_step_and_structures(
    tmp_path: Path, spoil: Callable[[Atoms], None]
) -> None:
    structures = labelled(4)
    spoil(structures[3])
    student = morse()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    settings = TrainingSettings(1, batch_size=4)
    with pytest.raises(
        NotFinite, match=r"loss is nan at step 0 on structures \[[0-3, ]*3[0-3, ]*\] of the labels"
    ):
        Trainer(student, TrainingData(data_of(structures)), settings).run(tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("clip", [None, 10.0])
def test_a_gradient_that_is_not_a_number_stops_the_training_before_it_reaches_the_weights(
    tmp_path: Path, clip: float | None
) -> None:
    student = morse()
    student.length.register_hook(lambda gradient: gradient * float("nan"))
    settings = TrainingSettings(1, batch_size=2, steps_per_epoch=1, gradient_clip=clip)
    with pytest.raises(NotFinite, match="gradient's norm is nan at step 0"):
        Trainer(student, TrainingData(data_of(labelled(2))), settings).run(tmp_path)
    assert all(torch.isfinite(p).all() for p in student.parameters())
    assert list(tmp_path.iterdir()) == []


def test_weights_and_steps_follow_their_schedules(tmp_path: Path) -> None:
    """Force loss first, then relaxations of more and more steps; what weighs nothing is not even computed."""
    structures = labelled(3)
    data = TrainingData(data_of(structures), relaxations=[RelaxationPair(structures[0], structures[1])])
    settings = TrainingSettings(
        4,
        batch_size=2,
        steps_per_epoch=1,
        weights=Weights(energy=scheduled([[2, 1], [3, 0]]), forces=scheduled([[2, 1], [3, 0]])),
        relaxation=BpttSettings(weight=scheduled([[0, 0], [1, 0.1]]), steps=scheduled([[1, 2], [3, 4]])),
    )
    history = Trainer(morse(), data, settings).run(tmp_path)
    assert ["labels/forces" in row for row in history] == [True, True, True, False]
    assert [row.get("relaxation/steps") for row in history] == [None, 2, 3, 4]


def test_a_step_size_is_learned_beside_the_model_and_resumed_with_it(tmp_path: Path) -> None:
    structures = labelled(3)
    data = TrainingData(data_of(structures), relaxations=[RelaxationPair(structures[0], structures[1])])

    def settings(epochs: int) -> TrainingSettings:
        how = Unrolling(Descent(StepSize(0.02, [29])))
        bptt = BpttSettings(weight=1.0, steps=4, unrolling=how)
        return TrainingSettings(epochs, 1, steps_per_epoch=2, learning_rate=0.05, relaxation=bptt)

    for name in ("through", "stopped"):
        (tmp_path / name).mkdir()
    through = Trainer(morse(), data, settings(4)).run(tmp_path / "through")
    sizes = [row["relaxation/step_size"] for row in through]
    assert len(set(sizes)) == 4
    stopped = Trainer(morse(), data, settings(4))
    with pytest.raises(KeyboardInterrupt):
        stopped.run(tmp_path / "stopped", on_epoch=interrupt_after(2))
    assert Trainer(morse(), data, settings(4)).run(tmp_path / "stopped") == through


def interrupt_after(epochs: int) -> Callable[[dict[str, float]], None]:
    def on_epoch(row: dict[str, float]) -> None:
        if row["epoch"] == epochs:
            raise KeyboardInterrupt

    return on_epoch


def test_what_is_no_target_is_refused_before_anything_is_trained() -> None:
    structures = labelled(2)
    other = structures[1].copy()
    other.numbers[0] = 13
    data = TrainingData(data_of(structures), relaxations=[RelaxationPair(structures[0], other)])
    with pytest.raises(UserError, match="relaxation 0 starts with Cu as atom 0 and ends with Al"):
        Trainer(morse(), data, TrainingSettings(1, relaxation=BpttSettings(weight=1.0)))

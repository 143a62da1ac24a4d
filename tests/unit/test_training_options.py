"""What a training may be told beyond its loss: averages, rates, pieces, validation, checkpoints within an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from hpcft.errors import UserError
from hpcft.models.graph import build_graph
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import evaluate
from hpcft.relaxation import RelaxationPair
from hpcft.training.checkpoint import load_latest
from hpcft.training.data import LabelledSet
from hpcft.training.loss import Huber, Weights
from hpcft.training.measure import errors_of
from hpcft.training.trainer import BpttSettings, ReplaySettings, Trainer, TrainingData, TrainingSettings

CUTOFF = 4.0


def morse(length: float = 2.8) -> MorsePotential:
    return MorsePotential([13, 29], cutoff=CUTOFF, depth=0.3, length=length).double()


def labelled(number: int, first: int = 0) -> list[Atoms]:
    """Cells of four and of eight atoms by turns."""
    teacher = morse(2.6)
    found = []
    for seed in range(first, first + number):
        atoms = bulk("Cu", a=3.6, cubic=True).repeat((1, 1, 1 + seed % 2))
        atoms.numbers[::3] = 13
        atoms.rattle(0.15, seed=seed)
        result = evaluate(teacher, build_graph([atoms], CUTOFF))
        atoms.info["REF_energy"] = float(result.energies_b[0])
        atoms.arrays["REF_forces"] = result.forces_n3.numpy()
        found.append(atoms)
    return found


def data_of(structures: list[Atoms]) -> LabelledSet:
    return LabelledSet(structures, CUTOFF, torch.float64)


def everything() -> TrainingData:
    structures = labelled(7)
    pairs = [RelaxationPair(structures[0], structures[0].copy())]
    pairs[0].relaxed.rattle(0.05, seed=9)
    return TrainingData(data_of(structures), data_of(labelled(3, 20)), pairs, data_of(labelled(4, 40)))


SETTINGS = TrainingSettings(
    6,
    batch_size=3,
    learning_rate=0.05,
    weights=Weights(1.0, 1.0),
    replay=ReplaySettings(batch_size=2, weight=0.5),
    relaxation=BpttSettings(0.1, every=2, steps=3),
    ema=0.9,
)


def parameters(trainer: Trainer) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in trainer.objective.named_parameters()}


def test_pieces_of_a_batch_add_up_to_the_gradient_of_the_whole(tmp_path: Path) -> None:
    """Fails if a piece is weighted by its own size, or counted twice."""
    rows = []
    for name, most in (("whole", None), ("pieces", 100), ("one by one", 1)):
        trainer = Trainer(morse(), everything(), replace(SETTINGS, max_edges=most))
        if most is not None:
            assert len(trainer.batches.pieces(0)) > 3
        rows.append(trainer.run(tmp_path / name))
        assert math.isfinite(rows[-1][-1]["loss"])
    for row in rows[1:]:
        for ours, whole in zip(row, rows[0], strict=True):
            assert ours == pytest.approx(whole, rel=1e-9, abs=1e-12)


def test_a_batch_that_is_made_beforehand_is_the_same_batch(tmp_path: Path) -> None:
    runs = []
    for ahead in (False, True):
        trainer = Trainer(morse(), everything(), replace(SETTINGS, prefetch=ahead))
        runs.append((trainer.run(tmp_path / str(ahead)), parameters(trainer)))
    assert runs[0] == runs[1]


def test_what_is_frozen_keeps_its_bits_and_slow_parameters_move_less(tmp_path: Path) -> None:
    moved = {}
    settings = replace(SETTINGS, ema=None, relaxation=None, epochs=1)
    for name, rates in (("all", {}), ("slow", {"length": 1e-3}), ("frozen", {"length": 0.0, "log_*": 1.0})):
        student = morse()
        before = {key: p.detach().clone() for key, p in student.named_parameters()}
        Trainer(student, everything(), replace(settings, rates=rates)).run(tmp_path / name)
        moved[name] = {
            key: float((p.detach() - before[key]).abs().max()) for key, p in student.named_parameters()
        }
    assert moved["frozen"]["length"] == 0.0
    assert 0 < moved["slow"]["length"] < 0.01 * moved["all"]["length"]
    assert all(moved[name]["log_depth"] > 0 for name in moved)


@pytest.mark.parametrize(
    ("rates", "message"),
    [({"lenght": 0.5}, "no parameter of the model is called lenght.*length"), ({"*": 0.0}, "frozen")],
)
def test_rates_for_nothing_and_of_nothing_are_refused(rates: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(morse(), everything(), replace(SETTINGS, rates=rates))


def test_the_average_follows_its_formula_and_is_what_is_returned(tmp_path: Path) -> None:
    settings = replace(SETTINGS, relaxation=None, replay=None, steps_per_epoch=1, epochs=12)
    data = replace(everything(), validation=None)
    plain, student = morse(), morse()
    lengths: list[torch.Tensor] = []
    Trainer(plain, data, replace(settings, ema=None)).run(
        tmp_path / "plain", lambda _: lengths.append(plain.length.detach().clone())
    )
    Trainer(student, data, settings).run(tmp_path / "averaged")
    average = morse().length.detach()
    for number, length in enumerate(lengths):
        decay = min(0.9, (1 + number) / (10 + number))
        average = decay * average + (1 - decay) * length
    torch.testing.assert_close(student.length.detach(), average, rtol=1e-12, atol=0)
    assert float((average - lengths[-1]).abs().min()) > 1e-4


def test_the_model_of_the_best_epoch_is_returned_and_patience_ends_the_training(tmp_path: Path) -> None:
    """The validation set has another teacher: what is learned takes the model first towards it, then away."""
    data = everything()
    away = data_of(labelled(4, 40))
    other = morse(2.74)
    for atoms in away.structures:
        result = evaluate(other, build_graph([atoms], CUTOFF))
        atoms.info["REF_energy"], atoms.arrays["REF_forces"] = (
            float(result.energies_b[0]),
            result.forces_n3.numpy(),
        )
    settings = replace(SETTINGS, epochs=60, learning_rate=0.02, relaxation=None, patience=4, ema=None)
    student = morse()
    history = Trainer(student, replace(data, validation=away), settings).run(tmp_path)
    losses = [row["valid/loss"] for row in history]
    best = int(np.argmin(losses))
    assert 0 < best < 55
    assert len(losses) == best + 1 + 4
    found = errors_of(student, away, weights=settings.weights)
    assert found["loss"] == pytest.approx(losses[best], rel=1e-12)
    # Run again, it knows that it is over, and gives the same model.
    again = morse()
    assert Trainer(again, replace(data, validation=away), settings).run(tmp_path) == history
    assert again.length.tolist() == student.length.tolist()


def test_patience_without_validation_is_refused() -> None:
    with pytest.raises(UserError, match="patience needs validation data"):
        Trainer(morse(), replace(everything(), validation=None), replace(SETTINGS, patience=3))


class Stop(Exception):
    """The training is interrupted here."""


def stop_after(steps: int) -> Iterator[bool]:
    for number in count(1):
        if number > steps:
            raise Stop
        yield True  # and a checkpoint after each step before


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_a_training_stopped_within_an_epoch_goes_on_bit_for_bit(tmp_path: Path, steps: int) -> None:
    """Average, best epoch and half an epoch's means included; three steps make an epoch."""
    undisturbed = Trainer(morse(), everything(), SETTINGS)
    expected = undisturbed.run(tmp_path / "undisturbed")
    (tmp_path / "stopped").mkdir()
    asked = stop_after(steps)
    with pytest.raises(Stop):
        Trainer(morse(), everything(), SETTINGS).run(tmp_path / "stopped", save_now=lambda: next(asked))
    checkpoint = load_latest(tmp_path / "stopped")
    assert checkpoint is not None
    assert checkpoint.step > 0
    again = Trainer(morse(), everything(), SETTINGS)
    assert again.run(tmp_path / "stopped") == expected
    assert parameters(again) == parameters(undisturbed)


def test_the_checkpoint_of_another_training_is_refused_and_kept(tmp_path: Path) -> None:
    settings = replace(SETTINGS, epochs=1)
    Trainer(morse(), everything(), settings).run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = Trainer(morse(), everything(), replace(settings, batch_size=2))
    with pytest.raises(UserError, match=r"another training.*batch_size: 2, not 3"):
        other.run(tmp_path)
    larger = Trainer(MorsePotential([13, 29, 47], cutoff=CUTOFF).double(), everything(), settings)
    with pytest.raises(UserError, match=r"another training.*model: morse"):
        larger.run(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_huber_counts_small_errors_squared_and_large_ones_linearly(tmp_path: Path) -> None:
    structures = labelled(1)
    atoms = structures[0]
    predicted = evaluate(morse(), build_graph([atoms], CUTOFF)).forces_n3.numpy()
    errors = np.zeros_like(predicted)
    errors[0, 0], errors[1, 2] = 0.05, -3.0
    atoms.arrays["REF_forces"] = predicted - errors
    found = errors_of(morse(), data_of(structures), weights=Weights(0.0, 1.0), huber=Huber(forces=0.1))
    expected = (0.05**2 + 0.1 * (2 * 3.0 - 0.1)) / (3 * len(atoms))
    assert found["loss"] == pytest.approx(expected, rel=1e-9)


def test_a_configuration_counts_as_much_as_it_says(tmp_path: Path) -> None:
    structures = labelled(2)
    loss = {}
    for name, weights in (
        ("first", [{}, {"config_weight": 0.0}]),
        ("both", [{}, {}]),
        ("half", [{}, {"config_energy_weight": 0.5, "config_forces_weight": 0.5}]),
    ):
        for atoms, info in zip(structures, weights, strict=True):
            atoms.info = {"REF_energy": atoms.info["REF_energy"], **info}
        loss[name] = errors_of(morse(), data_of(structures))["loss"]
    assert loss["first"] < loss["half"] < loss["both"]
    assert loss["half"] == pytest.approx((loss["first"] + loss["both"]) / 2, rel=1e-12)


def test_graphs_are_kept_within_a_bound_and_built_again_beyond_it() -> None:
    structures = labelled(6)
    bounded = LabelledSet(structures, CUTOFF, torch.float64, cache_MiB=0.02)
    free = data_of(structures)
    for indices in ([0, 1, 2], [3, 4, 5], [0, 5]):
        ours, theirs = bounded.batch(indices), free.batch(indices)
        assert torch.equal(ours.graph.senders_e, theirs.graph.senders_e)
    assert 1 <= len(bounded._samples) < 6 == len(free._samples)

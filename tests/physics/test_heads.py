"""Replay data on a head of their own: they hold the messages in place and leave the labels' readouts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from small_models import small_mace

from hpcft.errors import UserError
from hpcft.models.files import load_model, save_model
from hpcft.models.graph import build_graph
from hpcft.models.heads import on_head, own_parameters, second_head
from hpcft.models.mace import build_mace
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import Potential, as_module, evaluate
from hpcft.training.data import LabelledSet
from hpcft.training.settings import ReplaySettings
from hpcft.training.trainer import Trainer, TrainingData, TrainingSettings


def crystals(number: int = 4) -> list[Atoms]:
    found = []
    for seed in range(number):
        atoms = bulk("Cu", a=3.7, cubic=True)
        atoms.numbers[:2] = 13
        atoms.rattle(0.1, seed=seed)
        found.append(atoms)
    return found


def labelled(model: Potential, shift: float) -> LabelledSet:
    """As the model sees them, but for the energy (eV/atom)."""
    found = crystals()
    for atoms in found:
        result = evaluate(model, build_graph([atoms], model.cutoff))
        atoms.info["REF_energy"] = float(result.energies_b[0]) + shift * len(atoms)
        atoms.arrays["REF_forces"] = result.forces_n3.numpy()
    return LabelledSet(found, model.cutoff, torch.float64)


def two_headed() -> Any:
    """A MACE whose heads differ in energies of atoms, scales, shifts and readouts."""
    configuration = small_mace().configuration()
    torch.manual_seed(1)
    return build_mace(
        {
            **configuration,
            "heads": ["pt_head", "Default"],
            "atomic_energies": [[1.0, -2.0], [3.0, 0.5]],
            "atomic_inter_scale": [10.0, 6.0],
            "atomic_inter_shift": [0.1, -0.3],
        }
    )


def settings(head: str, epochs: int = 60) -> TrainingSettings:
    return TrainingSettings(
        epochs, batch_size=2, learning_rate=0.02, replay=ReplaySettings(2, 1.0, head), seed=(3, 1)
    )


def test_a_view_is_what_mace_makes_of_the_head() -> None:
    model = two_headed()
    graph = build_graph(crystals(2), model.cutoff)
    batch: dict[str, torch.Tensor] = {}
    forward = model.model.forward
    model.model.forward = lambda data, **options: batch.update(data) or forward(data, **options)
    wanted = evaluate(model, graph)
    del model.model.forward
    mixed = model.model({**batch, "head": torch.tensor([0, 1])}, training=True, compute_force=False)["energy"]
    other = evaluate(on_head(model, "pt_head"), graph)
    torch.testing.assert_close(
        mixed.detach(), torch.stack([other.energies_b[0], wanted.energies_b[1]]), rtol=0, atol=1e-10
    )
    assert float((other.forces_n3 - wanted.forces_n3).abs().max()) > 1e-3


def test_a_second_head_starts_equal_and_shares_all_but_its_readouts() -> None:
    model = small_mace()
    head, graph = second_head(model), build_graph(crystals(2), model.cutoff)
    torch.testing.assert_close(
        evaluate(head, graph).forces_n3, evaluate(model, graph).forces_n3, rtol=0, atol=0
    )
    own = own_parameters(head, model)
    assert own and all(name.startswith("model.readouts.") for name in own)
    before = evaluate(model, graph).energies_b
    with torch.no_grad():
        for parameter in own.values():
            parameter.mul_(2)
    torch.testing.assert_close(evaluate(model, graph).energies_b, before, rtol=0, atol=0)
    assert float((evaluate(head, graph).energies_b - before).abs().max()) > 1e-3
    with torch.no_grad():
        model.model.interactions[0].linear_up.weight.mul_(1.5)
    assert float((evaluate(model, graph).energies_b - before).abs().max()) > 1e-6
    assert set(model.state_dict()) == set(small_mace().state_dict())


def trained(head: str, folder: Path) -> tuple[Any, list[dict[str, float]]]:
    """On data that contradict each other: the same structures, half an eV/atom apart."""
    model = small_mace()
    data = TrainingData(labelled(model, 0.5), labelled(model, 0.0))
    trainer = Trainer(model, data, settings(head))
    history = trainer.run(folder)
    return model, history


@pytest.mark.nightly
def test_contradicting_replay_data_do_no_harm_on_a_head_of_their_own(tmp_path: Path) -> None:
    names = set(small_mace().state_dict())
    shared, of_shared = trained("shared", tmp_path / "shared")
    own, of_own = trained("own", tmp_path / "own")
    assert set(own.state_dict()) == set(shared.state_dict()) == names
    # One readout can at best end half way between the two: an error of 0.25 eV/atom in both.
    assert of_shared[-1]["labels/energy"] > 0.03
    assert of_own[-1]["labels/energy"] < 0.5 * of_shared[-1]["labels/energy"]
    assert of_own[-1]["replay/energy"] < 0.5 * of_shared[-1]["replay/energy"]


def test_the_head_of_the_foundation_that_has_several(tmp_path: Path) -> None:
    model = two_headed()
    replay, labels = labelled(on_head(model, "pt_head"), 0.0), labelled(model, 0.2)
    Trainer(model, TrainingData(labels, replay), settings("pt_head", 3)).run(tmp_path)
    save_model(tmp_path / "model.pt", model)
    again, graph = load_model(tmp_path / "model.pt"), build_graph(crystals(1), model.cutoff)
    for name in ("pt_head", "Default"):
        torch.testing.assert_close(
            evaluate(on_head(again, name), graph).forces_n3,
            evaluate(on_head(model, name), graph).forces_n3,
            rtol=0,
            atol=1e-12,
        )
    fresh = two_headed()
    moved = evaluate(on_head(model, "pt_head"), graph).forces_n3
    assert float((moved - evaluate(on_head(fresh, "pt_head"), graph).forces_n3).abs().max()) > 1e-6


def test_a_training_with_a_second_head_is_taken_up_again_bit_for_bit(tmp_path: Path) -> None:
    save_model(tmp_path / "start.pt", small_mace())

    class Stop(Exception):
        pass

    def stop(row: dict[str, float]) -> None:
        if row["epoch"] == 2:
            raise Stop

    def train(folder: str, stopped: bool = False) -> dict[str, bytes]:
        model = load_model(tmp_path / "start.pt")
        data = TrainingData(labelled(model, 0.5), labelled(model, 0.0))
        trainer = Trainer(model, data, settings("own", 4))
        trainer.run(tmp_path / folder, stop if stopped else None)
        kept = {**as_module(model).state_dict(), **trainer.scaffold.state_dict()}
        return {name: np.asarray(value).tobytes() for name, value in kept.items()}

    with pytest.raises(Stop):
        train("stopped", stopped=True)
    assert train("stopped") == train("undisturbed")


def test_heads_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match="no head 'pt_head'; its heads are Default"):
        on_head(small_mace(), "pt_head")
    with pytest.raises(UserError, match="heads are for MACE models"):
        second_head(MorsePotential([29], cutoff=4.0))

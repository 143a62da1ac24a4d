"""LoRA over MACE: starts as nothing, learns little matrices only, ends as an ordinary model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from small_models import small_mace

from hpcft.errors import UserError
from hpcft.models.files import load_model, save_model
from hpcft.models.graph import build_graph
from hpcft.models.mace import MacePotential
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import evaluate
from hpcft.training.data import LabelledSet
from hpcft.training.trainer import Lora, Trainer, TrainingData, TrainingSettings


def labelled(model: MacePotential, number: int = 4) -> list[Atoms]:
    random = np.random.default_rng(0)
    found = []
    for seed in range(number):
        atoms = bulk("Cu", a=3.7, cubic=True)
        atoms.numbers[:] = [model.elements[seed % 2]] * 4
        atoms.rattle(0.1, seed=seed)
        result = evaluate(model, build_graph([atoms], model.cutoff))
        atoms.info["REF_energy"] = float(result.energies_b[0]) + 0.1
        atoms.arrays["REF_forces"] = result.forces_n3.numpy() + random.normal(0, 0.1, (4, 3))
        found.append(atoms)
    return found


SETTINGS = TrainingSettings(4, batch_size=2, learning_rate=0.02, lora=Lora(2, 2.0), ema=0.9, seed=(3, 1))


def test_it_learns_and_what_is_saved_is_an_ordinary_model(tmp_path: Path) -> None:
    mace_model = small_mace()
    structures = labelled(mace_model)
    names = set(mace_model.state_dict())
    num_parameters = sum(p.numel() for p in mace_model.parameters())
    before = evaluate(mace_model, build_graph(structures, mace_model.cutoff)).energies_b
    data = TrainingData(LabelledSet(structures, mace_model.cutoff, torch.float64))
    trainer = Trainer(mace_model, data, SETTINGS)
    assert sum(p.numel() for p in trainer.parameters) < num_parameters
    learned = [name for name, p in mace_model.named_parameters() if p.requires_grad]
    assert learned and all("lora_" in name for name in learned)
    started = evaluate(mace_model, build_graph(structures, mace_model.cutoff)).energies_b
    torch.testing.assert_close(started, before, rtol=0, atol=1e-10)
    history = trainer.run(tmp_path / "run")
    assert history[-1]["loss"] < history[0]["loss"]
    after = evaluate(mace_model, build_graph(structures, mace_model.cutoff))
    assert float((after.energies_b - before).abs().max()) > 1e-3
    assert set(mace_model.state_dict()) == names
    save_model(tmp_path / "model.pt", mace_model)
    loaded = evaluate(load_model(tmp_path / "model.pt"), build_graph(structures, mace_model.cutoff))
    torch.testing.assert_close(loaded.forces_n3, after.forces_n3, rtol=0, atol=1e-12)


def test_a_training_of_lora_is_taken_up_again_bit_for_bit(tmp_path: Path) -> None:
    mace_model = small_mace()
    save_model(tmp_path / "start.pt", mace_model)
    structures = labelled(mace_model)

    class Stop(Exception):
        pass

    def stop(row: dict[str, float]) -> None:
        raise Stop

    def train(folder: str, stopped: bool = False) -> dict[str, bytes]:
        model = load_model(tmp_path / "start.pt")
        data = TrainingData(LabelledSet(structures, model.cutoff, torch.float64))
        Trainer(model, data, SETTINGS).run(tmp_path / folder, stop if stopped else None)
        assert isinstance(model, MacePotential)
        return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}

    with pytest.raises(Stop):
        train("stopped", stopped=True)
    assert train("stopped") == train("undisturbed")


def test_another_architecture_is_refused() -> None:
    model = MorsePotential([29], cutoff=4.0).double()
    atoms = bulk("Cu")
    atoms.info["REF_energy"], atoms.arrays["REF_forces"] = 0.0, np.zeros((1, 3))
    data = TrainingData(LabelledSet([atoms], 4.0, torch.float64))
    with pytest.raises(UserError, match="LoRA is for MACE models"):
        Trainer(model, data, SETTINGS)

"""Faster kernels: the same forces, or they are not used; and an ordinary model in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ase.build import bulk
from small_models import small_mace, small_morse

from hpcft.errors import UserError
from hpcft.models import acceleration
from hpcft.models.acceleration import use_cuequivariance, use_e3nn, use_tf32
from hpcft.models.files import export_mace, load_model, save_model
from hpcft.models.fused_convolution import FusedTensorProduct
from hpcft.models.graph import build_graph
from hpcft.models.protocol import evaluate
from hpcft.training.data import LabelledSet
from hpcft.training.settings import ReplaySettings
from hpcft.training.trainer import Trainer, TrainingData, TrainingSettings


def crystals(number: int = 4) -> list[Any]:
    """Copper and aluminium, with labels that are off the model's by design."""
    found = []
    for seed in range(number):
        atoms = bulk("Cu", a=3.7, cubic=True)
        atoms.numbers[:2] = 13
        atoms.rattle(0.1, seed=seed)
        atoms.info["REF_energy"], atoms.arrays["REF_forces"] = 10.0 * seed, 0.1 * atoms.positions
        found.append(atoms)
    return found


def gradient(model: Any, structures: list[Any]) -> dict[str, torch.Tensor]:
    """Of the summed squared forces, with respect to the weights: a double backward."""
    forces = evaluate(model, build_graph(structures, model.cutoff), create_graph=True).forces_n3
    (forces**2).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_there_and_back_it_is_the_same_model() -> None:
    model, structures = small_mace(), crystals()
    graph, before = build_graph(structures, model.cutoff), dict(model.state_dict())
    wanted, slope = evaluate(model, graph), gradient(model, structures)
    error = use_cuequivariance(model, graph)
    assert 0 < error < 1e-9
    assert set(model.state_dict()) != set(before), "nothing was converted"
    found = evaluate(model, graph)
    torch.testing.assert_close(found.energies_b, wanted.energies_b, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.forces_n3, wanted.forces_n3, rtol=1e-8, atol=1e-10)
    shared = {name: value for name, value in gradient(model, structures).items() if name in slope}
    assert len(shared) > 5
    for name, value in shared.items():
        if value.shape == slope[name].shape:
            torch.testing.assert_close(value, slope[name], rtol=1e-7, atol=1e-9)
    use_e3nn(model)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in before.items()
    }
    again = evaluate(model, graph)
    torch.testing.assert_close(again.forces_n3, wanted.forces_n3, rtol=1e-8, atol=1e-10)
    assert isinstance(model.model.interactions[0].conv_tp, FusedTensorProduct)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("head", [pytest.param("shared", marks=pytest.mark.nightly), "own"])
def test_training_with_it_ends_in_an_ordinary_model(tmp_path: Path, head: str) -> None:
    def train(kind: str) -> tuple[Any, list[dict[str, float]]]:
        model = small_mace()
        data = LabelledSet(crystals(), model.cutoff, torch.float64)
        replay = LabelledSet(crystals(2), model.cutoff, torch.float64)
        settings = TrainingSettings(
            4, 4, learning_rate=1e-3, acceleration=kind, replay=ReplaySettings(2, 0.5, head), ema=0.9
        )
        return model, Trainer(model, TrainingData(data, replay), settings).run(tmp_path / kind)

    plain, of_plain = train("none")
    fast, of_fast = train("cuequivariance")
    assert of_fast[0]["loss"] == pytest.approx(of_plain[0]["loss"], rel=1e-9)
    assert of_fast[-1]["loss"] < of_fast[0]["loss"]
    assert set(fast.state_dict()) == set(plain.state_dict())
    graph = build_graph(crystals(2), fast.cutoff)
    save_model(tmp_path / "model.pt", fast)
    export_mace(fast, tmp_path / "model.model")
    torch.testing.assert_close(
        evaluate(load_model(tmp_path / "model.pt"), graph).forces_n3,
        evaluate(fast, graph).forces_n3,
        rtol=0,
        atol=1e-12,
    )


def test_a_training_that_is_taken_up_with_other_kernels_is_refused(tmp_path: Path) -> None:
    def trainer(kind: str) -> Trainer:
        model = small_mace()
        data = TrainingData(LabelledSet(crystals(), model.cutoff, torch.float64))
        return Trainer(model, data, TrainingSettings(1, 4, acceleration=kind))

    trainer("cuequivariance").run(tmp_path)
    with pytest.raises(UserError, match="acceleration: none, not cuequivariance"):
        trainer("none").run(tmp_path)


def test_kernels_that_are_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_mace()
    graph, names = build_graph(crystals(1), model.cutoff), set(model.state_dict())
    wanted = evaluate(model, graph).forces_n3
    from mace.cli import convert_e3nn_cueq

    right = convert_e3nn_cueq.run

    def wrong(*given: Any, **options: Any) -> Any:
        converted = right(*given, **options)
        with torch.no_grad():
            converted.interactions[0].linear_up.weight.mul_(1.0001)
        return converted

    monkeypatch.setattr(convert_e3nn_cueq, "run", wrong)
    with pytest.raises(UserError, match=r"the forces differ by .* more than 1e-09"):
        use_cuequivariance(model, graph)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(evaluate(model, graph).forces_n3, wanted, rtol=0, atol=0)


def test_what_is_missing_or_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, morse = small_mace(), small_morse()
    graph = build_graph(crystals(1), model.cutoff)
    with pytest.raises(UserError, match="cuEquivariance is for MACE models; this one is 'morse'"):
        use_cuequivariance(morse, graph)
    with pytest.raises(UserError, match="tf32 needs an NVIDIA GPU"):
        use_tf32(model, graph)
    monkeypatch.setattr(acceleration, "has_cuequivariance", lambda device: False)
    with pytest.raises(UserError, match="needs the packages cuequivariance and cuequivariance-torch"):
        use_cuequivariance(model, graph)


def test_auto_is_none_without_a_gpu() -> None:
    model = small_mace()
    data = TrainingData(LabelledSet(crystals(), model.cutoff, torch.float64))
    assert Trainer(model, data, TrainingSettings(1, acceleration="auto")).scaffold.acceleration == "none"

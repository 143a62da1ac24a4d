"""Evaluate: which relaxations the model is judged by."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from ase import Atoms
from ase.build import bulk

from hpcft.labelling.label import Relaxation
from hpcft.stages import evaluate
from hpcft.storage.structures import write_structures


def relaxation(start: Atoms, relaxed: Atoms) -> Relaxation:
    return Relaxation(start, relaxed, -1.0, -2.0, "energy", 5, True, 0.001)


def test_a_target_that_training_would_refuse_judges_no_model_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the nearest image is taken where it is ambiguous: Delta Q would be too small."""
    start = bulk("Cu", a=3.6, cubic=True).repeat((2, 1, 1))
    near, far = start.copy(), start.copy()
    near.positions[1] += [0.1, 0, 0]
    far.positions[1] += [1.7, 1.7, 0]  # 2.1 Å, once the drift is off, in a cell 3.6 Å wide
    targets = {0: relaxation(start, near), 1: relaxation(start, far)}
    ends = []
    for number in (0, 1, 2):  # the reference did not converge for the last
        end = start.copy()
        end.info |= {"relaxation": number, "converged": int(number != 0), "model_energy": -2.0}
        ends.append(end)
    write_structures(tmp_path / "relaxed.h5", ends)
    monkeypatch.setattr(evaluate, "relaxation_results_by_index", lambda *_: targets)
    context = SimpleNamespace(
        tasks_of=lambda stage: [SimpleNamespace(path=tmp_path)],
        campaign=SimpleNamespace(relaxations=SimpleNamespace(cell=False)),
    )
    judged, wanted, refused = evaluate._relaxations(context)  # type: ignore[arg-type]
    assert [atoms.info["relaxation"] for atoms in judged] == [0]
    assert wanted == [targets[0]]
    assert len(refused) == 1 and "relaxation 1: atom 1 moves by 2.1" in refused[0]

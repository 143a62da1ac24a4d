"""What a block of frames accepts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcft.storage.frames import FrameBlock


def fields(**changes: Any) -> dict[str, Any]:
    good: dict[str, Any] = {
        "replica": 3,
        "numbers": np.array([29, 79]),
        "masses": np.array([63.5, 197.0]),
        "pbc": np.array([True, True, True]),
        "step": np.array([10, 20, 30]),
        "time_fs": np.array([5.0, 10.0, 15.0]),
        "positions": np.zeros((3, 2, 3)),
        "velocities": np.zeros((3, 2, 3)),
        "forces": np.zeros((3, 2, 3)),
        "cell": np.zeros((3, 3, 3)),
        "potential_energy": np.zeros(3),
        "temperature_K": np.zeros(3),
    }
    return good | changes


def test_a_block_knows_its_numbers_of_frames_and_atoms() -> None:
    block = FrameBlock(**fields())
    assert (block.num_frames, block.num_atoms) == (3, 2)


def test_a_block_may_have_no_frames() -> None:
    rows = {name: values[:0] for name, values in FrameBlock(**fields()).per_frame().items()}
    assert FrameBlock(**fields(**rows)).num_frames == 0


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (
            {"forces": np.zeros((3, 3, 3))},
            r"replica 3: forces must have shape \(3, 2, 3\), but it has shape \(3, 3, 3\)",
        ),
        ({"masses": np.zeros(3)}, r"masses must have shape \(2,\)"),
        ({"cell": np.zeros((3, 3))}, r"cell must have shape \(3, 3, 3\)"),
        ({"step": np.array([1.0, 2.0, 3.0])}, "step must be integers"),
        ({"step": np.array([10, 20, 20])}, "step must rise from frame to frame"),
        ({"observables": {"sane": np.ones(2, dtype=bool)}}, "sane must have 3 frames"),
        ({"observables": {"label": np.array(["a", "b", "c"])}}, "label must hold numbers or booleans"),
        ({"observables": {"temperature": np.zeros(3)}}, "temperature is a field of its own"),
    ],
)
def test_a_field_that_does_not_fit_is_named(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        FrameBlock(**fields(**changes))

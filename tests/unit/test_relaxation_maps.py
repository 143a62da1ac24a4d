"""The maps of relaxations, apart from any potential."""

from __future__ import annotations

import json

import pytest
import torch

from hpcft.relaxation import StepSize


@pytest.mark.parametrize("elements", [(), (13, 29)])
def test_a_step_size_comes_back_from_its_plain_values(elements: tuple[int, ...]) -> None:
    learned = StepSize(0.04, elements).double()
    with torch.no_grad():
        learned.log_eta.add_(torch.arange(1.0, len(learned.log_eta) + 1))
    again = StepSize.from_values(json.loads(json.dumps(learned.values())))
    numbers = torch.tensor([29, 13, 0])
    torch.testing.assert_close(again(numbers).double(), learned(numbers), rtol=1e-6, atol=0)


def test_a_strain_moves_by_the_mean_of_the_elements_and_an_unknown_element_is_refused() -> None:
    learned = StepSize(0.04, (13, 29))
    with torch.no_grad():
        learned.log_eta.copy_(torch.tensor([0.01, 0.04]).log())
    assert learned(torch.tensor([13, 0, 29])).ravel().tolist() == pytest.approx([0.01, 0.02, 0.04])
    with pytest.raises(ValueError, match="for the elements"):
        learned(torch.tensor([14]))
    with pytest.raises(ValueError, match="must be positive"):
        StepSize(0.0)

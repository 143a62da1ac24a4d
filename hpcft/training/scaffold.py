"""What stands around a model only while it is trained: faster kernels, low-rank matrices, a second head for the replay data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hpcft.errors import UserError
from hpcft.models.acceleration import has_cuequivariance, use_cuequivariance, use_e3nn, use_tf32
from hpcft.models.graph import Graph
from hpcft.models.heads import on_head, own_parameters, second_head
from hpcft.models.lora import add_lora, merge_lora
from hpcft.models.protocol import Potential
from hpcft.training.settings import TrainingSettings


class Scaffold:
    """Built around `potential` in place, and taken down when the training is over.

    `replay` is the potential that replay data are compared with. `checked`: by how much the forces changed, relative, with each
    option that computes the same thing faster. `example`: a graph of the data, to check such options on.
    """

    def __init__(self, potential: Potential, settings: TrainingSettings, example: Graph) -> None:
        self._potential, self._has_lora = potential, settings.lora is not None
        self.checked: dict[str, float] = {}
        self.acceleration = _chosen(settings, potential, example)
        if settings.tf32:
            self.checked["tf32"] = use_tf32(potential, example)
        if self.acceleration == "cuequivariance":
            try:
                self.checked["cuequivariance"] = use_cuequivariance(potential, example)
            except UserError:  # nobody has asked for it
                if settings.acceleration != "auto":
                    raise
                self.acceleration = "none"
        if settings.lora is not None:
            add_lora(potential, settings.lora.rank, settings.lora.alpha, seed=sum(settings.seed))
        head = "shared" if settings.replay is None else settings.replay.head
        self.replay = potential
        if head == "own":
            self.replay = second_head(potential)
        elif head != "shared":
            self.replay = on_head(potential, head)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights beside those of the potential itself."""
        own = own_parameters(self.replay, self._potential)
        return {name: parameter.detach().clone() for name, parameter in own.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, parameter in own_parameters(self.replay, self._potential).items():
            parameter.data.copy_(state[name])

    def take_down(self) -> None:
        """The potential is an ordinary model again, with the weights as they are now."""
        if self._has_lora:
            merge_lora(self._potential)
        if self.acceleration == "cuequivariance":
            use_e3nn(self._potential)
            self.acceleration = "none"


def _chosen(settings: TrainingSettings, potential: Potential, example: Graph) -> str:
    if settings.acceleration != "auto":
        return settings.acceleration
    on_gpu = example.positions_n3.device.type == "cuda"
    possible = potential.architecture == "mace" and settings.lora is None
    return "cuequivariance" if on_gpu and possible and has_cuequivariance("cuda") else "none"

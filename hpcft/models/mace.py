"""MACE behind the `Potential` protocol."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from hpcft.errors import UserError
from hpcft.models.fused_convolution import fuse
from hpcft.models.graph import Graph
from hpcft.models.libraries import extract_config_mace_model, mace_modules, o3

# TorchScript's profiling runs make the first calls of a process up to a second slow, and let the order of
# fusion decisions depend on them.
torch._C._jit_set_profiling_executor(False)
# Without profiling TorchScript falls back on a fuser of its early days, which writes CUDA source for each device at run
# time and which nobody maintains; on a CPU it does nothing.
torch._C._jit_override_can_fuse_on_gpu(False)

_CLASSES = ("interaction_cls", "interaction_cls_first", "readout_cls")
_IRREPS = ("hidden_irreps", "MLP_irreps", "edge_irreps")
_BUFFERS = ("atomic_energies", "atomic_inter_scale", "atomic_inter_shift", "atomic_numbers")
_ACCELERATION = ("cueq_config", "oeq_config")


class MacePotential(torch.nn.Module):
    """A `ScaleShiftMACE` (the class of all MACE foundation models) as hpcft uses it; one head is active."""

    architecture = "mace"
    _element_index: Tensor

    def __init__(self, model: torch.nn.Module, head: str | None = None) -> None:
        super().__init__()
        if type(model).__name__ != "ScaleShiftMACE":
            raise UserError(
                f"the model is a {type(model).__name__}; hpcft fine-tunes ScaleShiftMACE, the class of the MACE "
                "foundation models. Convert it, or implement hpcft.models.protocol.Potential for it."
            )
        self.model = model
        fuse(model)
        self.head = head_index(model, head)
        numbers = [int(z) for z in cast(Tensor, model.atomic_numbers)]
        index = torch.full((max(numbers) + 1,), -1, dtype=torch.int64)
        index[torch.tensor(numbers)] = torch.arange(len(numbers))
        self.register_buffer("_element_index", index, persistent=False)
        self._elements = tuple(numbers)
        self._cutoff = float(cast(Tensor, model.r_max))

    @property
    def cutoff(self) -> float:
        return self._cutoff

    @property
    def elements(self) -> tuple[int, ...]:
        return self._elements

    def energies(self, graph: Graph) -> Tensor:
        energies: Tensor = self._forward(graph)["energy"]
        return energies

    def descriptors(self, graph: Graph) -> Tensor:
        """The scalar (l = 0) node features of all layers, [n, d]."""
        # Detached first: MACE turns `requires_grad` on in place, and the caller's positions would keep it.
        with torch.no_grad():
            features = self._forward(graph.with_positions(graph.positions_n3.detach()))["node_feats"]
        return features[:, self._scalar_columns().to(features.device)].detach()

    def _scalar_columns(self) -> Tensor:
        columns: list[int] = []
        start = 0
        for product in cast(torch.nn.ModuleList, self.model.products):
            for multiplicity, irrep in o3.Irreps(str(cast(torch.nn.Module, product.linear).irreps_out)):
                if irrep.l == 0:
                    columns += range(start, start + multiplicity)
                start += multiplicity * irrep.dim
        return torch.tensor(columns)

    def _forward(self, graph: Graph) -> dict[str, Tensor]:
        index = self._element_index[graph.numbers_n]
        counts = graph.num_atoms_b
        data = {
            "positions": graph.positions_n3,
            "cell": graph.cell_b33.reshape(-1, 3),
            "batch": graph.structure_n,
            "ptr": torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            "edge_index": torch.stack([graph.senders_e, graph.receivers_e]),
            "shifts": graph.shift_vectors_e3,
            "unit_shifts": graph.shifts_e3,
            "node_attrs": torch.nn.functional.one_hot(index, len(self._elements)).to(
                graph.positions_n3.dtype
            ),
            "head": torch.full((graph.num_structures,), self.head, device=counts.device),
        }
        output: dict[str, Tensor] = self.model(data, training=True, compute_force=False)
        return output

    def shift_energies(self, shifts: Mapping[int, float]) -> None:
        # [heads, elements], or [elements] without heads
        energies = cast(Any, self.model).atomic_energies_fn.atomic_energies
        row = energies[self.head] if energies.dim() == 2 else energies
        for number, shift in shifts.items():
            row[self._elements.index(number)] += shift

    def configuration(self) -> Mapping[str, Any]:
        raw = extract_config_mace_model(self.model)
        config: dict[str, Any] = {}
        for key, value in raw.items():
            if key in _CLASSES:
                config[key] = value.__name__
            elif key in _IRREPS:
                config[key] = None if value is None else str(value)
            elif key in _BUFFERS:
                config[key] = torch.as_tensor(value).tolist()
            elif key == "gate":
                config[key] = None if value is None else value.__name__
            elif key not in _ACCELERATION:
                config[key] = value
        config["num_polynomial_cutoff"] = float(config["num_polynomial_cutoff"])
        config["avg_num_neighbors"] = float(config["avg_num_neighbors"])
        config["heads"] = list(config["heads"])
        config["radial_MLP"] = [int(width) for width in config["radial_MLP"]]
        config["use_reduced_cg"] = True  # as mace records it, and not to be trusted: the weights' shapes tell
        return config


def head_index(model: torch.nn.Module, name: str | None = None) -> int:
    """Where a head stands among those of a MACE; of no name, the last. UserError for one that it does not have."""
    heads: list[str] = list(cast(Any, model).heads) if getattr(model, "heads", None) else ["Default"]
    if name is not None and name not in heads:
        raise UserError(f"the model has no head '{name}'; its heads are {', '.join(heads)}")
    return heads.index(name) if name is not None else len(heads) - 1


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def build_mace(
    configuration: Mapping[str, Any], dtype: torch.dtype = torch.float64, *, reduced: bool = False
) -> MacePotential:
    """A MACE with fresh weights from the settings that `MacePotential.configuration` returns.

    `reduced`: with the smaller basis of products that mace 0.3.16 takes by itself wherever cuequivariance is installed, so that
    the same settings give other weights on another machine. Here they do not, unless a file is of that kind.
    """
    config = {**configuration, "use_reduced_cg": reduced}
    for key in _CLASSES:
        table = mace_modules.readout_classes if key == "readout_cls" else mace_modules.interaction_classes
        config[key] = table[config[key]]
    for key in _IRREPS:
        config[key] = None if config.get(key) is None else o3.Irreps(config[key])
    config["gate"] = (
        None if config["gate"] is None else getattr(torch.nn.functional, config["gate"], torch.abs)
    )
    with default_dtype(dtype), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript on e3nn's annotations, dozens of times
        for key in ("atomic_inter_scale", "atomic_inter_shift"):
            config[key] = torch.tensor(config[key], dtype=dtype).numpy()
        config["atomic_energies"] = torch.tensor(config["atomic_energies"], dtype=dtype).numpy()
        model = mace_modules.ScaleShiftMACE(**config)
    return MacePotential(model)

"""Faster kernels for a MACE model, checked against the model itself before they are used."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch

from hpcft.errors import UserError
from hpcft.models.graph import Graph
from hpcft.models.protocol import Potential, as_module, dtype_of, evaluate

# Largest error of the forces, relative to their norm, that faster kernels may make.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# The same for matrix products in TF32, which has a mantissa of ten bits.
TF32_TOLERANCE = 1e-2


def has_cuequivariance(device: str = "cpu") -> bool:
    """Whether its packages are installed, on a GPU with the kernels that are a package of their own."""
    names = ["cuequivariance", "cuequivariance_torch"]
    names += ["cuequivariance_ops_torch"] if device == "cuda" else []
    return all(importlib.util.find_spec(name) for name in names)


def use_cuequivariance(potential: Potential, graph: Graph) -> float:
    """Put NVIDIA's cuEquivariance kernels under the model, in place; returns the relative error of the forces on `graph`.

    The weights have other names and shapes until `use_e3nn`. UserError where the packages are missing, for another
    architecture, or when the forces are not the same: then the model is as it was.
    """
    from hpcft.models.mace import default_dtype

    holder = _holder(potential)
    device = graph.positions_n3.device
    if not has_cuequivariance(device.type):
        raise UserError(
            "acceleration: cuequivariance needs the packages cuequivariance and cuequivariance-torch (and on a GPU "
            "cuequivariance-ops-torch); install them, or write acceleration: auto"
        )
    from hpcft.models.fused_convolution import fuse, separate

    graph, wanted = _disturbed(graph), holder.model
    before = evaluate(potential, graph).forces_n3
    separate(wanted)
    try:
        with default_dtype(dtype_of(potential)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mace.cli.convert_e3nn_cueq import run

            # It asks for a kind of device, by which it chooses kernels, and would put the model on the first of that kind.
            holder.model = run(wanted, device=device.type).to(device)
        found = evaluate(potential, graph).forces_n3
    except (RuntimeError, ImportError, ValueError, KeyError, IndexError) as error:
        holder.model = wanted
        raise UserError(
            f"this model cannot be turned into cuEquivariance's kernels ({error}); write acceleration: none"
        ) from error
    finally:
        fuse(wanted)
    deviation = _relative(found, before)
    if not deviation <= TOLERANCE[dtype_of(potential)]:
        holder.model = wanted
        raise UserError(
            f"with cuEquivariance the forces differ by {deviation:.1e} of their norm, more than "
            f"{TOLERANCE[dtype_of(potential)]:g}; write acceleration: none, and tell us about this model"
        )
    return deviation


def use_e3nn(potential: Potential) -> None:
    """The ordinary model again, with the weights as they are now."""
    from mace.cli.convert_cueq_e3nn import run

    from hpcft.models.fused_convolution import fuse
    from hpcft.models.mace import default_dtype

    holder = _holder(potential)
    device = next(as_module(potential).parameters()).device
    with default_dtype(dtype_of(potential)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        holder.model = run(holder.model).to(device)
    fuse(holder.model)


def use_tf32(potential: Potential, graph: Graph) -> float:
    """Matrix products of this process in TF32 from now on; returns the relative error of the forces on `graph`.

    UserError without a GPU that has it, for a model in float64, or when the forces are off by more than 1 %.
    """
    device = graph.positions_n3.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError("tf32 needs an NVIDIA GPU from Ampere on; write tf32: false")
    if dtype_of(potential) != torch.float32:
        raise UserError("tf32 is for models in float32; write precision: float32, or tf32: false")
    graph = _disturbed(graph)
    before = evaluate(potential, graph).forces_n3
    torch.set_float32_matmul_precision("high")
    error = _relative(evaluate(potential, graph).forces_n3, before)
    if not error <= TF32_TOLERANCE:
        torch.set_float32_matmul_precision("highest")
        raise UserError(
            f"with TF32 the forces differ by {error:.1e} of their norm, more than {TF32_TOLERANCE:g}; write tf32: false"
        )
    return error


def _disturbed(graph: Graph) -> Graph:
    """Forces that are zero by symmetry would compare nothing but noise."""
    random = torch.Generator().manual_seed(0)
    shift_n3 = 0.02 * torch.randn(graph.positions_n3.shape, generator=random, dtype=torch.float64)
    return graph.with_positions(graph.positions_n3.detach() + shift_n3.to(graph.positions_n3))


def _relative(forces: torch.Tensor, wanted: torch.Tensor) -> float:
    scale = torch.linalg.norm(wanted).clamp_min(torch.finfo(wanted.dtype).tiny)
    return float(torch.linalg.norm(forces - wanted) / scale)


def _holder(potential: Potential) -> Any:
    if potential.architecture != "mace":
        raise UserError(
            f"cuEquivariance is for MACE models; this one is '{potential.architecture}': write acceleration: none"
        )
    return as_module(potential)

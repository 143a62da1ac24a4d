"""Memory of a gradient through k relaxation steps: it grows with k in one engine, and hardly in the other.

Run as a script, this file measures: `python test_bptt_memory.py ENGINE:STEPS:STRUCTURES ...` prints peak bytes for each.
"""

from __future__ import annotations

import copy
import gc
import os
import resource
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import bulk

from hpcft.models.graph import build_graph
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import Potential, as_module
from hpcft.relaxation import Descent, delta_q, engines, unroll

FEW, MANY = 8, 40


def peaks(wishes: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, *wishes]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    return dict(zip(wishes, map(float, output.split()), strict=True))


def test_the_adjoint_engine_needs_nearly_the_same_memory_for_five_times_the_steps() -> None:
    peak = peaks([f"{engine}:{steps}:1" for engine in ("plain", "adjoint") for steps in (FEW, MANY)])
    growth = {
        engine: peak[f"{engine}:{MANY}:1"] - peak[f"{engine}:{FEW}:1"] for engine in ("plain", "adjoint")
    }
    assert peak[f"plain:{MANY}:1"] > 3.5 * peak[f"plain:{FEW}:1"]
    assert growth["adjoint"] < 0.15 * growth["plain"]
    assert peak[f"adjoint:{MANY}:1"] < 0.25 * peak[f"plain:{MANY}:1"]


def test_the_adjoint_engine_recomputes_large_structures_one_after_the_other() -> None:
    peak = peaks([f"{engine}:{FEW}:{n}" for engine in ("plain", "adjoint") for n in (1, 4)])
    assert peak[f"plain:{FEW}:4"] > 3 * peak[f"plain:{FEW}:1"]
    assert peak[f"adjoint:{FEW}:4"] < 2.2 * peak[f"adjoint:{FEW}:1"]


@pytest.mark.parametrize("engine", ["adjoint", "finite-difference"])
@pytest.mark.parametrize("with_cell", [False, True], ids=["fixed cell", "with the cell"])
def test_structures_recomputed_one_after_the_other_give_the_gradient_of_all_at_once(
    potential: Potential,
    make_alloy: Callable[..., Atoms],
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    with_cell: bool,
) -> None:
    starts = [make_alloy((1, 1, 1), rattle=0.1, seed=seed) for seed in range(3)]
    graph = build_graph(starts, potential.cutoff)
    movable = torch.arange(len(graph.numbers_n)) % 4 > 0
    start = graph.positions_n3.clone().requires_grad_(True)
    inputs = [start, *as_module(potential).parameters()]
    gradients = []
    for edges in (1, 10**9):
        monkeypatch.setattr(engines, "_EDGES_AT_ONCE", edges)
        end = unroll(
            potential,
            graph.with_positions(start),
            Descent(0.02, momentum=0.5),
            3,
            engine=engine,
            movable_n=movable,
            with_cell=with_cell,
        )
        loss = (end.positions_n3**2).sum() + (end.cell_b33**3).sum()
        found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([g.ravel() for g in found]))
    assert gradients[0].abs().max() > 1e-2
    # A finite difference magnifies rounding.
    bound = 1e-12 if engine == "adjoint" else 1e-8
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < bound


def test_weights_that_change_before_the_gradient_passes_are_an_error(
    morse: MorsePotential, make_alloy: Callable[..., Atoms]
) -> None:
    graph = build_graph([make_alloy()], morse.cutoff)
    end = unroll(morse, graph, Descent(0.02), 2)
    with torch.no_grad():
        morse.length.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        end.positions_n3.sum().backward()  # type: ignore[no-untyped-call]


def test_the_forces_leave_every_parameter_as_trainable_as_it_was(
    morse: MorsePotential, make_alloy: Callable[..., Atoms]
) -> None:
    morse.log_width.requires_grad_(False)
    end = unroll(morse, build_graph([make_alloy()], morse.cutoff), Descent(0.02), 2)
    (end.positions_n3**3).sum().backward()  # type: ignore[no-untyped-call]
    trainable = {name: p.requires_grad for name, p in morse.named_parameters()}
    assert trainable == {"log_depth": True, "log_width": False, "length": True, "atomic_energy": True}
    assert morse.length.grad is not None
    assert morse.log_width.grad is None


def test_one_double_precision_twin_follows_its_model_and_dies_with_it(morse: MorsePotential) -> None:
    single: Any = copy.deepcopy(morse).float()
    twin: Any = engines.float64_twin(single)
    with torch.no_grad():
        single.length.add_(0.5)
    single.log_width.requires_grad_(False)
    updated: Any = engines.float64_twin(single)
    assert updated is twin
    assert torch.equal(twin.length, single.length.double())
    assert not twin.log_width.requires_grad
    single.length = torch.nn.Parameter(torch.ones(3))
    assert engines.float64_twin(single) is not twin
    last = weakref.ref(engines.float64_twin(single))
    del single
    gc.collect()
    assert last() is None


@pytest.mark.parametrize("which", ["morse", "mace"])
def test_finite_differences_are_exact_enough_for_single_precision_too(
    morse: MorsePotential, tiny_mace: Any, make_alloy: Callable[..., Atoms], which: str
) -> None:
    """Against the exact gradient of the same float32 weights in float64."""
    single: Any = copy.deepcopy(morse if which == "morse" else tiny_mace).float()
    double: Any = copy.deepcopy(single).double()
    gradients = []
    for potential, engine in ((single, "finite-difference"), (double, "adjoint")):
        dtype = next(potential.parameters()).dtype
        graph = build_graph([make_alloy(rattle=0.1)], potential.cutoff, dtype=dtype)
        end = unroll(potential, graph, Descent(0.02), 3, engine=engine)
        found = torch.autograd.grad(
            (end.positions_n3**2).sum(),
            list(potential.parameters()),
            allow_unused=True,
            materialize_grads=True,
        )
        assert end.accuracy.largest_error < 1e-6
        assert not end.accuracy.fell_back
        gradients.append(torch.cat([g.double().ravel() for g in found]))
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-4


def measure(engine: str, steps: int, num_structures: int) -> float:
    """Bytes by which the gradient of one relaxation raises this process's largest size in memory."""
    potential = MorsePotential([29]).double()
    atoms = bulk("Cu", a=3.7, cubic=True).repeat(5)
    target = torch.from_numpy(atoms.get_positions()).repeat(num_structures, 1)
    atoms.rattle(0.1, seed=0)
    graph = build_graph([atoms] * num_structures, potential.cutoff)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    end = unroll(potential, graph, Descent(0.02), steps, engine=engine)
    delta_q(end.positions_n3, target, graph).sum().backward()  # type: ignore[no-untyped-call]
    assert potential.length.grad is not None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0 - before


def in_a_child(engine: str, steps: int, num_structures: int) -> float:
    """Measured in a fork, so that one measurement's peak is not the next one's start."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, str(measure(engine, steps, num_structures)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        found = stream.read()
    os.wait()
    return float(found)


if __name__ == "__main__":
    measure("adjoint", 1, 1)  # what torch allocates once and keeps
    for wish in sys.argv[1:]:
        name, number, structures = wish.split(":")
        print(in_a_child(name, int(number), int(structures)))

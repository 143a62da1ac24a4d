"""What the gradient of a relaxation costs: peak memory, time and accuracy of each engine, by the number of its steps.

    python benchmarks/bptt.py [--json FILE] [--quick]

Two periodic Al-Cu vacancy cells of 30 atoms, float64, one thread; MACE with random weights, weak on top of a Morse potential
that gives the cells a minimum. Every measurement is a process of its own, forked after everything is imported and compiled:
its peak is counted from where it is after a first gradient. The engines take turns, so that what else the machine does
meets all of them. Seconds are those of the processor.

The implicit engine has no number of steps. In the row of k it relaxes with the same map until the largest force is what k
steps leave, and takes the place for a minimum: a different gradient, unless k steps do converge.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.build import bulk
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hpcft.models.allocator import keep_freed_memory
from hpcft.models.graph import Graph, build_graph, rebuild_edges
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import evaluate
from hpcft.relaxation import (
    ENGINES,
    Coordinates,
    Descent,
    Fire,
    RelaxationMap,
    delta_q,
    relaxed_implicitly,
    unroll,
)

MAPS: dict[str, RelaxationMap] = {
    "heavy ball": Descent(0.03, momentum=0.8),
    "plain": Descent(0.03),
    "FIRE": Fire(),
}
# All steps are measured with this map, the others in one place.
MAIN_MAP = "heavy ball"
LAST = 20
TRUNCATED, IMPLICIT = f"adjoint, last {LAST}", "implicit"
CONTENDERS = [*ENGINES, TRUNCATED, IMPLICIT]
# What would need more is not run.
LIMIT_MIB = 10 * 1024.0


@dataclass(frozen=True)
class Size:
    """How large, and how often: repetitions by number of steps."""

    hidden_irreps: str
    max_ell: int
    radial_MLP: int
    cutoff: float
    repeat: tuple[int, int, int]
    repetitions: dict[int, int]
    steps_of_other_maps: int


FULL = Size("32x0e", 3, 32, 5.0, (2, 2, 2), {5: 3, 20: 3, 80: 1, 200: 1}, 20)
QUICK = Size("4x0e", 1, 8, 4.0, (2, 1, 1), {5: 1, 20: 1}, 5)


@dataclass(frozen=True)
class Row:
    """One engine with one map and k steps: medians over the repetitions, None where it was not run or is the reference.

    `grad_rel_diff` is |g - g_ref| / |g_ref| over all parameters, against the plain engine, or the adjoint where that was not
    run. `note` says why there is no figure.
    """

    engine: str
    map: str
    k: int
    peak_mib: float | None
    seconds: float | None
    wall_seconds: float | None
    grad_rel_diff: float | None
    reference: str
    repetitions: int
    note: str = ""


# ---- what is relaxed -----------------------------------------------------------------------------------------------


class WithMinimum(torch.nn.Module):
    """A MACE that nobody has trained, and a Morse potential that holds the atoms together."""

    architecture = "mace on morse"

    def __init__(self, size: Size) -> None:
        super().__init__()
        from hpcft.models.mace import build_mace

        block = "RealAgnosticResidualInteractionBlock"
        torch.manual_seed(0)
        self.mace = build_mace(
            {
                "r_max": size.cutoff,
                "num_bessel": 8,
                "num_polynomial_cutoff": 5.0,
                "max_ell": size.max_ell,
                "interaction_cls": block,
                "interaction_cls_first": "RealAgnosticInteractionBlock",
                "num_interactions": 2,
                "num_elements": 2,
                "hidden_irreps": size.hidden_irreps,
                "MLP_irreps": "16x0e",
                "gate": "silu",
                "readout_cls": "NonLinearReadoutBlock",
                "atomic_energies": [[0.0, 0.0]],
                "avg_num_neighbors": 40.0,
                "atomic_numbers": [13, 29],
                "correlation": 2,
                "radial_type": "bessel",
                "radial_MLP": [size.radial_MLP] * 3,
                "atomic_inter_scale": 0.05,
                "atomic_inter_shift": 0.0,
                "heads": ["Default"],
            },
            torch.float64,
        )
        self.morse = MorsePotential([13, 29], cutoff=size.cutoff).double()

    @property
    def cutoff(self) -> float:
        return self.mace.cutoff

    @property
    def elements(self) -> tuple[int, ...]:
        return self.mace.elements

    def energies(self, graph: Graph) -> Tensor:
        return self.mace.energies(graph) + self.morse.energies(graph)

    def descriptors(self, graph: Graph) -> Tensor:
        return self.mace.descriptors(graph)

    def configuration(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Problem:
    potential: WithMinimum
    graph: Graph
    target_n3: Tensor

    @staticmethod
    def of(size: Size) -> Problem:
        potential = WithMinimum(size)
        ideal = [vacancy_cell(size, b) for b in range(2)]
        target = torch.cat([torch.from_numpy(atoms.positions.copy()) for atoms in ideal])
        for b, atoms in enumerate(ideal):
            atoms.rattle(0.15, seed=b)
        return Problem(potential, build_graph(ideal, potential.cutoff), target)

    def gradient(self, engine: str, map: RelaxationMap, k: int, fmax: float) -> Tensor | None:
        """Of Delta Q in all parameters, as one vector; None where the implicit engine finds no minimum."""
        if engine == IMPLICIT:
            end, report = relaxed_implicitly(self.potential, self.graph, fmax=fmax, max_steps=k + 1, map=map)
        else:
            end, report = self.unrolled(engine, map, k), None
        delta_q(end.positions_n3, self.target_n3, self.graph).sum().backward()  # type: ignore[no-untyped-call]
        if report is not None and (report.left_out or not bool(end.valid_b.all())):
            return None
        gradients = [
            p.grad if p.grad is not None else torch.zeros_like(p) for p in self.potential.parameters()
        ]
        return torch.cat([g.ravel() for g in gradients])

    def unrolled(self, engine: str, map: RelaxationMap, k: int) -> Any:
        if engine == TRUNCATED:
            return unroll(self.potential, self.graph, map, k, engine="adjoint", last=LAST)
        return unroll(self.potential, self.graph, map, k, engine=engine)

    def largest_force(self, map: RelaxationMap, k: int) -> float:
        """After k steps."""
        with torch.no_grad():
            there = self.graph.with_positions(unroll(self.potential, self.graph, map, k).positions_n3)
            forces = evaluate(self.potential, rebuild_edges(there, self.potential.cutoff)).forces_n3
        return float(Coordinates.of(there).largest(forces).max())


def vacancy_cell(size: Size, number: int) -> Atoms:
    """fcc, every third atom Al, two atoms missing."""
    atoms = bulk("Cu", a=3.8, cubic=True).repeat(size.repeat)
    atoms.numbers[::3] = 13
    del atoms[[number, len(atoms) // 2 + 1]]
    return atoms


# ---- one measurement -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    peak_mib: float
    seconds: float
    wall_seconds: float
    gradient: Tensor | None


def measure(problem: Problem, engine: str, map: RelaxationMap, k: int, fmax: float) -> Measured:
    """In a process that does nothing else."""
    problem.potential.zero_grad()
    like = "adjoint" if engine == IMPLICIT else engine
    problem.unrolled(like, map, 1).positions_n3.sum().backward()
    problem.potential.zero_grad()
    before = start_of_peak()
    cpu, wall = time.process_time(), time.perf_counter()
    gradient = problem.gradient(engine, map, k, fmax)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Measured(memory_MiB("VmHWM") - before, cpu, wall, gradient)


def start_of_peak() -> float:
    """Give back what is free, and let the kernel's peak begin at what is left (MiB)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory_MiB("VmRSS")


def memory_MiB(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def in_fresh_process(measurement: Callable[[], Measured]) -> Measured:
    """Forked, so that the problem is there, compiled, and nobody's peak is another's start."""
    fork = get_context("fork")
    receiving, sending = fork.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(1)
        keep_freed_memory()  # as every job of hpcft; the peak begins at memory that was given back all the same
        found = measurement()
        # As NumPy: a tensor would travel through shared memory that ends with this process.
        gradient = None if found.gradient is None else found.gradient.numpy()
        sending.send((found.peak_mib, found.seconds, found.wall_seconds, gradient))

    process = fork.Process(target=child)
    process.start()
    sending.close()
    try:
        peak, cpu, wall, gradient = receiving.recv()
    except EOFError:
        raise SystemExit("a measurement died; its message is above, or it ran out of memory") from None
    finally:
        process.join()
    return Measured(peak, cpu, wall, None if gradient is None else torch.from_numpy(gradient))


# ---- all of them ---------------------------------------------------------------------------------------------------


def measure_all(size: Size, progress: Callable[[str], None]) -> list[Row]:
    """Rows by map and k, every engine in each."""
    problem = Problem.of(size)
    for engine in ENGINES:  # TorchScript compiles what it meets twice
        for _ in range(2):
            problem.gradient(engine, MAPS[MAIN_MAP], 1, 0.0)
    cells = [(MAIN_MAP, k) for k in size.repetitions]
    cells += [(map, size.steps_of_other_maps) for map in MAPS if map != MAIN_MAP]
    rows: list[Row] = []
    for map, k in cells:
        expected = expected_plain_MiB(rows, k) if map == MAIN_MAP else 0.0
        contenders = [engine for engine in CONTENDERS if engine != "plain" or expected < LIMIT_MIB]
        if k <= LAST:
            contenders.remove(TRUNCATED)
        fmax = 1.001 * problem.largest_force(MAPS[map], k)
        found: dict[str, list[Measured]] = {engine: [] for engine in contenders}
        for _ in range(size.repetitions.get(k, 1)):
            for engine in contenders:
                found[engine].append(in_fresh_process(partial(measure, problem, engine, MAPS[map], k, fmax)))
                last = found[engine][-1]
                progress(f"{map}, k={k}, {engine}: {last.peak_mib:.0f} MiB, {last.seconds:.1f} s")
        if "plain" not in found:
            rows.append(
                Row("plain", map, k, None, None, None, None, "adjoint", 0, f"(about {expected:,.0f})")
            )
        rows += rows_of(map, k, found)
    return rows


def expected_plain_MiB(rows: list[Row], k: int) -> float:
    """On the line through the two largest k that were run."""
    known = [
        (row.k, row.peak_mib)
        for row in rows
        if (row.engine, row.map) == ("plain", MAIN_MAP) and row.peak_mib is not None
    ]
    if len(known) < 2:
        return 0.0
    (k1, mib1), (k2, mib2) = known[-2:]
    return mib2 + (k - k2) * (mib2 - mib1) / (k2 - k1)


def rows_of(map: str, k: int, found: dict[str, list[Measured]]) -> list[Row]:
    reference = "plain" if "plain" in found else "adjoint"
    expected = found[reference][0].gradient
    assert expected is not None
    rows = []
    for engine, measured in found.items():
        gradient = measured[0].gradient
        if gradient is None:
            rows.append(Row(engine, map, k, None, None, None, None, reference, 0, "no minimum"))
            continue
        rows.append(
            Row(
                engine,
                map,
                k,
                statistics.median(m.peak_mib for m in measured),
                statistics.median(m.seconds for m in measured),
                statistics.median(m.wall_seconds for m in measured),
                None if engine == reference else float((gradient - expected).norm() / expected.norm()),
                reference,
                len(measured),
            )
        )
    return rows


# ---- the command ---------------------------------------------------------------------------------------------------


def table_of(rows: list[Row]) -> Table:
    table = Table("map", "k", "engine", "MiB", "CPU s", "MiB : plain", "s : plain", "off by")
    for column in table.columns:
        column.no_wrap = True
    for index, row in enumerate(rows):
        beside = next(r for r in rows if (r.engine, r.map, r.k) == ("plain", row.map, row.k))
        if row.peak_mib is None or row.seconds is None:
            texts = [row.note, "", "", "", ""]
        else:
            ratios = ["", ""]
            if beside.peak_mib is not None and beside.seconds is not None:
                ratios = [f"{row.peak_mib / beside.peak_mib:.3f}", f"{row.seconds / beside.seconds:.2f}"]
            difference = "reference" if row.grad_rel_diff is None else f"{row.grad_rel_diff:.1e}"
            texts = [f"{row.peak_mib:.0f}", f"{row.seconds:.2f}", *ratios, difference]
        ends = index + 1 == len(rows) or (rows[index + 1].map, rows[index + 1].k) != (row.map, row.k)
        table.add_row(row.map, str(row.k), row.engine, *texts, end_section=ends)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows, as a list of objects")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and few steps, to see that it runs"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    log = Console(stderr=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript's
        rows = measure_all(QUICK if options.quick else FULL, lambda line: log.print(line, style="dim"))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    console = Console()
    console.width = max(console.width, 100)  # the table's; a file is 80 wide otherwise
    console.print(table_of(rows))


if __name__ == "__main__":
    main()

"""Memory of a gradient through k relaxation steps: it grows with k in one engine, and hardly in the other.

Run as a script, this file measures: `python test_bptt_memory.py ENGINE:STEPS ...` prints peak bytes for each.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

FEW, MANY = 8, 40


def test_the_adjoint_engine_needs_nearly_the_same_memory_for_five_times_the_steps() -> None:
    wishes = [f"{engine}:{steps}" for engine in ("plain", "adjoint") for steps in (FEW, MANY)]
    command = [sys.executable, __file__, *wishes]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    peak = dict(zip(wishes, map(float, output.split()), strict=True))
    growth = {engine: peak[f"{engine}:{MANY}"] - peak[f"{engine}:{FEW}"] for engine in ("plain", "adjoint")}
    assert peak[f"plain:{MANY}"] > 3.5 * peak[f"plain:{FEW}"]
    assert growth["adjoint"] < 0.15 * growth["plain"]
    assert peak[f"adjoint:{MANY}"] < 0.25 * peak[f"plain:{MANY}"]


def measure(engine: str, steps: int) -> float:
    """Bytes by which the gradient of one relaxation raises this process's largest size in memory."""
    import torch
    from ase.build import bulk

    from hpcft.models.graph import build_graph
    from hpcft.models.morse import MorsePotential
    from hpcft.relaxation import MapSettings, delta_q, unroll

    potential = MorsePotential([29]).double()
    atoms = bulk("Cu", a=3.7, cubic=True).repeat(5)
    target = torch.from_numpy(atoms.get_positions())
    atoms.rattle(0.1, seed=0)
    graph = build_graph([atoms], potential.cutoff)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    final = unroll(potential, graph, MapSettings(steps=steps, step_size=0.02), engine)
    delta_q(final, target, graph).sum().backward()
    assert potential.length.grad is not None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0 - before


def in_a_child(engine: str, steps: int) -> float:
    """Measured in a fork, so that one measurement's peak is not the next one's start."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, str(measure(engine, steps)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        found = stream.read()
    os.wait()
    return float(found)


if __name__ == "__main__":
    measure("adjoint", 1)  # what torch allocates once and keeps
    for wish in sys.argv[1:]:
        name, _, number = wish.partition(":")
        print(in_a_child(name, int(number)))

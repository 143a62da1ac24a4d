"""Freed memory stays with the process, and nothing that is computed changes."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import json, resource, sys, torch
from hpcft.models.allocator import keep_freed_memory
torch.set_num_threads(1)
known = keep_freed_memory() if sys.argv[1] == "keep" else None
torch.manual_seed(0)
a = torch.randn(2**23, dtype=torch.float64)
def work():
    return float((torch.cos(a) * a).sum())
value = work()
for _ in range(4):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    assert work() == value
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps({"known": known, "value": value, "faults": faults}))
"""


def test_blocks_are_not_faulted_in_again_and_values_are_the_same() -> None:
    """Two blocks of 64 MiB, ten times over: some 300,000 page faults when each comes afresh from the kernel."""
    found = {}
    for how in ("plain", "keep"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True
        )
        found[how] = json.loads(done.stdout)
    assert found["keep"]["known"] is True
    assert found["keep"]["value"] == found["plain"]["value"]
    assert found["keep"]["faults"] < 0.1 * found["plain"]["faults"]

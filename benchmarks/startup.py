"""How long `hpcft status` takes to start, beside what it must not import: python benchmarks/startup.py CAMPAIGN_DIR

Whole processes in turn, several rounds of them; medians and ratios to a bare interpreter, since machines differ.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

ROUNDS = 7


def main(campaign: str) -> None:
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "hpcft status": [sys.executable, "-m", "hpcft", "status", campaign],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - start)
    table = Table("command", "median (s)", "min (s)", "x bare python")
    bare = statistics.median(times["python -c pass"])
    for name, measured in times.items():
        median = statistics.median(measured)
        table.add_row(name, f"{median:.2f}", f"{min(measured):.2f}", f"{median / bare:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1])

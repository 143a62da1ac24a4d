"""Everything that only a GPU can show, in a few minutes of one: are the results right, what does it cost, where does it wait.

    python benchmarks/on_gpu.py --json FILE [--folder DIR] [--budget-s 480] [--only PART ...] [--torch-sim PYTHON]
    python benchmarks/on_gpu.py --device cpu --tiny

The parts run in the order of their worth, each by itself: one that fails is told and leaves the others, one for which no time is
left is left out, and FILE is written after each figure. `--device cpu --tiny` runs them all without a GPU, to see that they run.
The model is trained on the processor first, for a minute, unless DIR holds it (`--prepare` makes it, and needs no GPU).

correct    energies, forces and stress on the GPU in float64 and float32 against the CPU in float64; the GPU's neighbour list
           against matscipy's; molecular dynamics on both, and continued from a checkpoint; the gradient of a relaxation on both.
md         microseconds per step and atom for more and more replicas, beside ASE's loop (up to 64 replicas, as it moves one after
           another) and torch-sim: the engines of md.py, which says what is equal and what is not. Shares outside of the model;
           how busy nvidia-smi finds the GPU; how often a step waits (torch's own count, `torch.cuda.set_sync_debug_mode`).
neighbours a new list of all replicas, by matscipy and by nvalchemi-toolkit-ops.
largest    as many replicas as `atoms_that_fit` allows, and what memory they took.
training   structures per second of `Trainer`: prefetch, cuEquivariance, TF32 on and off.
mace       `train.py --only mace`: an epoch beside mace's own program.
bptt       seconds and peak memory of the gradient of a relaxation, adjoint beside plain.
fusers     a force evaluation with TorchScript as hpcft sets it, with its old fuser, and with its profiling executor; each in a
           process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from on_gpu_parts import FULL, PARTS, TINY, Bench, prepare
from rich.console import Console
from rich.table import Table
from timing import Found


def measure_all(bench: Bench, parts: Sequence[str], budget_s: float, keep: Callable[[Found], None]) -> Found:
    """Figures by part, told to `keep` one by one; `failed` and `left out` beside them."""
    begun = time.perf_counter()
    found: Found = {"machine": machine_told(bench.device), "failed": {}, "left out": []}
    prepare(bench)
    for part in parts:
        if time.perf_counter() - begun > budget_s:
            found["left out"].append(part)
            keep(found)
            continue
        figures: Found = {}
        found[part] = figures
        try:
            for figure in PARTS[part](bench):
                figures |= figure
                bench.progress(f"{time.perf_counter() - begun:4.0f} s {part}: {figure}")
                keep(found)
                if time.perf_counter() - begun > budget_s:
                    found["left out"].append(f"what follows in {part}")
                    break
        except (Exception, SystemExit) as error:  # the others go on
            found["failed"][part] = "".join(traceback.format_exception(error)[-3:])
            bench.progress(f"{part} FAILED: {error}")
        found["seconds"] = time.perf_counter() - begun
        keep(found)
    return found


def machine_told(device: str) -> Found:
    told = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if device == "cpu":
        return told
    return told | {"gpu": torch.cuda.get_device_name(0), "cuda": str(torch.version.cuda)}


def table_of(found: Found) -> Table:
    table = Table("part", "", "", title=", ".join(f"{k} {v}" for k, v in found["machine"].items()))
    for part in PARTS:
        figures = found.get(part, {})
        for number, (name, value) in enumerate(figures.items()):
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row("" if number else part, name, text, end_section=number + 1 == len(figures))
    for part, why in found["failed"].items():
        table.add_row(part, "FAILED", why.strip().split("\n")[-1])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, written one by one")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keeps the model, for another time")
    parser.add_argument("--prepare", action="store_true", help="make the model in DIR, and nothing else")
    parser.add_argument(
        "--budget-s", type=float, default=480.0, metavar="S", help="after which nothing new begins"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts, and no others")
    parser.add_argument(
        "--torch-sim", metavar="PYTHON", help="of an environment with torch-sim-atomistic 0.3"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="hardly anything, to see that it runs")
    options = parser.parse_args()
    if options.device == "cuda" and not options.prepare and not torch.cuda.is_available():
        raise SystemExit(
            "torch sees no GPU here, and this measures one: run it where there is one, or see that it runs with "
            "--device cpu --tiny"
        )
    if options.prepare and options.folder is None:
        raise SystemExit("--prepare makes the model in a folder: name it with --folder")
    torch.set_num_threads(1)
    log = Console(stderr=True)

    def keep(found: Found) -> None:
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))

    parts = [part for part in PARTS if part in (options.only or PARTS)]
    kept = nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory(prefix="hpcft-gpu-")
    with warnings.catch_warnings(), kept as folder:
        warnings.simplefilter("ignore")  # TorchScript's
        bench = Bench(
            Path(folder),
            TINY if options.tiny else FULL,
            options.device,
            options.torch_sim,
            lambda line: log.print(line, style="dim", soft_wrap=True),
        )
        if options.prepare:
            prepare(bench)
            return
        found = measure_all(bench, parts, options.budget_s, keep)
    console = Console()
    console.width = max(console.width, 110)
    console.print(table_of(found))
    if found["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

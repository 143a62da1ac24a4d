"""What training costs: beside mace's own program, on two ranks beside one, and what its checkpoints take of it.

    python benchmarks/train.py [--json FILE] [--quick] [--only mace|ddp|checkpoint] [--device cpu|cuda] [--repetitions N]

Cu-Ag cells of 32 atoms labelled with EMT, a small MACE that has seen a few of them, float64, one thread a process.

mace: `mace_run_train` (single head, no replay) and hpcft's `fine_tune` (all that `hpcft train` does) on the same foundation
and the same files. Whole processes take turns. An epoch is what lies between two of a program's epoch lines: training, the
validation pass, and what each writes to disk; the first, which compiles, is left out. Memory is the peak of the process.
Errors are those of the final models on the validation set, by hpcft's `errors_of` for both.

Equal, and checked: the starting model and what its loss is, by the figures that mace prints before it trains (`start_rel_diff`).
Equal: batch size, also in validation; weights of energy per atom and forces (both take means of squares); Adam with amsgrad,
no weight decay; a constant learning rate; clipping at 10; EMA, of which the best epoch becomes the model; a checkpoint at
most once an epoch.
Not equal: hpcft's learning rate warms up over a twentieth of the steps; the order of the structures; the first steps of the EMA
(its decay is a step behind in hpcft); hpcft writes a checkpoint every epoch, mace one for every better epoch and a line of
metrics every step; hpcft lets the C library keep freed memory.

ddp: a whole training on one process and on two (gloo) that share each batch. Structures per second by the clock, to which
other work on the machine adds: on two cores that are not idle, the speed-up is a lower bound. By the processor's time of the
slower rank it shows what sharing itself costs. With batches of 4, and of 16. `grad_rel_diff_2` is |g2 - g1| / |g1| of one batch
of unequal shares.

checkpoint: the seconds of `Trainer.checkpoint` and `save_checkpoint`, which ends with fsync, as a share of an epoch's.

On a GPU (`--device`) only `mace` is measured there; its programs' memory is then not the peak that counts.

Ratios are medians over repetitions, each with its range. Seconds are medians over all epochs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from timing import Found, Mark, between, in_processes, spanned, typical
from train_problem import (
    BATCH_SIZE,
    CHECKPOINTS,
    CUTOFF,
    EMA,
    FULL,
    LEARNING_RATE,
    QUICK,
    SAME,
    VALIDATED_TOGETHER,
    WEIGHTS,
    Size,
    errors_on_validation,
    labels_of,
    prepare,
)

from hpcft.models.allocator import keep_freed_memory
from hpcft.models.files import load_model
from hpcft.training.checkpoint import save_checkpoint
from hpcft.training.distributed import process_group
from hpcft.training.rank import Rank
from hpcft.training.trainer import Trainer, TrainingData, TrainingSettings

# ---- beside mace ---------------------------------------------------------------------------------------------------

# What `hpcft train` does; its own lines are for people, and not one for each epoch where those are short.
FINE_TUNE = """
import sys
from pathlib import Path
import torch
from hpcft.config.training import load_training
from hpcft.models.allocator import keep_freed_memory
from hpcft.training.fine_tune import Request, fine_tune

keep_freed_memory()
torch.set_num_threads(1)
model, train, valid, folder, settings = map(Path, sys.argv[1:6])
request = Request(model, [train], [valid], folder, load_training(settings), sys.argv[6])
fine_tune(request, on_row=lambda row: print(f"Epoch {row['epoch']:.0f}:", flush=True))
"""
EPOCH = re.compile(r"\bEpoch \d+:")


class Program(NamedTuple):
    """How a program is started, and the model that it leaves."""

    command: list[str]
    model: Path


@dataclass(frozen=True)
class Trained:
    """One run of a program."""

    program: str
    seed: int
    epochs: list[Mark]
    peak_MiB: float
    valid_force_mae: float


def hpcft_program(folder: Path, size: Size, seed: int) -> Program:
    here = folder / f"hpcft-{seed}"
    here.mkdir()
    settings = {
        "epochs": size.epochs,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "schedule": "constant",
        "weights": {"energy": WEIGHTS.energy, "forces": WEIGHTS.forces},
        "precision": "float64",
        "ema": EMA,
        "seed": seed,
    }
    (here / "settings.yaml").write_text(json.dumps(settings))  # JSON is YAML too
    files = [folder / "foundation.pt", folder / "train.extxyz", folder / "valid.extxyz", here / "out"]
    arguments = [str(path) for path in [*files, here / "settings.yaml", size.device]]
    return Program([sys.executable, "-W", "ignore", "-c", FINE_TUNE, *arguments], here / "out" / "model.pt")


def mace_program(folder: Path, size: Size, seed: int) -> Program:
    here = folder / f"mace-{seed}"
    here.mkdir()
    options = {
        "name": "tuned",
        "work_dir": here,
        "foundation_model": folder / "foundation.model",
        "multiheads_finetuning": False,
        "E0s": "foundation",
        "train_file": folder / "train.extxyz",
        "valid_file": folder / "valid.extxyz",
        "default_dtype": "float64",
        "device": size.device,
        "batch_size": BATCH_SIZE,
        "valid_batch_size": VALIDATED_TOGETHER,
        "max_num_epochs": size.epochs,
        "lr": LEARNING_RATE,
        "weight_decay": 0.0,
        "loss": "weighted",
        "energy_weight": WEIGHTS.energy,
        "forces_weight": WEIGHTS.forces,
        "ema_decay": EMA,
        "seed": seed,
        "plot": False,
    }
    arguments = ["--ema", *(f"--{name}={value}" for name, value in options.items())]
    return Program(
        [sys.executable, "-W", "ignore", "-m", "mace.cli.run_train", *arguments], here / "tuned.model"
    )


PROGRAMS = {"hpcft": hpcft_program, "mace": mace_program}


def run_to_end(command: Sequence[str]) -> tuple[list[Mark], float]:
    """Follow a program's lines: its epochs but the first, and its peak of memory in MiB."""
    lines: list[str] = []
    marks: list[Mark] = []
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **one_thread},
    )
    try:
        assert process.stdout is not None
        observed = psutil.Process(process.pid)
        for line in process.stdout:
            lines.append(line)
            if EPOCH.search(line):
                used = observed.cpu_times()
                marks.append(Mark(time.perf_counter(), used.user + used.system))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
    if process.returncode or len(marks) < 2:
        raise SystemExit(f"{' '.join(command)}\nhas not trained; its last lines:\n{''.join(lines[-30:])}")
    return between(marks), usage.ru_maxrss / 1024


def beside_mace(folder: Path, size: Size, progress: Callable[[str], None]) -> Found:
    (before,) = in_processes(errors_on_validation, (folder, folder / "foundation.pt"))
    runs: list[Trained] = []
    difference = 0.0
    for seed in range(1, size.repetitions + 1):
        for name, program_of in PROGRAMS.items():
            program = program_of(folder, size, seed)
            epochs, peak = run_to_end(program.command)
            (errors,) = in_processes(errors_on_validation, (folder, program.model))
            after = errors["force_mae_meV_per_A"]
            runs.append(Trained(name, seed, epochs, peak, after))
            wall, cpu = typical(epochs)
            speed = f"{wall:.2f} s and {cpu:.2f} CPU s an epoch"
            progress(f"{name}, seed {seed}: {speed}, {peak:.0f} MiB, {after:.1f} meV/Å")
        difference = max(difference, difference_at_start(folder / f"mace-{seed}", before, size))
    return {
        **compared(runs),
        "valid_force_mae_before": before["force_mae_meV_per_A"],
        "start_rel_diff": difference,
        "repetitions_mace": [asdict(run) for run in runs],
    }


def difference_at_start(folder: Path, before: dict[str, float], size: Size) -> float:
    """Of what mace says of its model before it trains, from what hpcft says of the same; SystemExit if they are not the same."""
    (log,) = folder.glob("results/*_train.txt")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    first = next(row for row in rows if row["mode"] == "eval" and row["epoch"] is None)
    # mace divides a sum of batches' means by the number of structures.
    num_batches = -(-size.num_valid // VALIDATED_TOGETHER)
    theirs = {
        "loss": first["loss"] * size.num_valid / num_batches,
        "force_mae_meV_per_A": 1e3 * first["mae_f"],
        "energy_mae_meV_per_atom": 1e3 * first["mae_e_per_atom"],
    }
    difference: float = max(abs(value / before[name] - 1) for name, value in theirs.items())
    if difference > SAME:
        raise SystemExit(f"the programs do not start from the same: mace says {theirs}, hpcft {before}")
    return difference


def compared(runs: Sequence[Trained]) -> Found:
    """Seconds: medians over all epochs of a program. Ratios: of the two runs of each seed."""
    of = {name: [run for run in runs if run.program == name] for name in PROGRAMS}
    found: Found = {}
    for name, mine in of.items():
        epoch = typical(epoch for run in mine for epoch in run.epochs)
        found |= {f"epoch_seconds_{name}": epoch.wall, f"epoch_cpu_seconds_{name}": epoch.cpu}
        found |= spanned(f"peak_MiB_{name}", [run.peak_MiB for run in mine])
        found |= spanned(f"valid_force_mae_{name}", [run.valid_force_mae for run in mine])
    pairs = [
        (typical(ours.epochs), typical(theirs.epochs))
        for ours, theirs in zip(of["hpcft"], of["mace"], strict=True)
    ]
    found |= spanned("epoch_ratio", [ours.wall / theirs.wall for ours, theirs in pairs])
    return found | spanned("epoch_cpu_ratio", [ours.cpu / theirs.cpu for ours, theirs in pairs])


# ---- two ranks -----------------------------------------------------------------------------------------------------


class Ranked(NamedTuple):
    """What one rank has seen: its epochs, and the gradient of one global batch as a vector."""

    epochs: list[Mark]
    gradient: NDArray[np.float64]


def of_rank(folder: Path, size: Size, batch_size: int, rank: Rank) -> Ranked:
    torch.set_num_threads(1)
    keep_freed_memory()
    here = folder / f"ranks-{rank.token}"
    here.mkdir(exist_ok=True)
    data = TrainingData(labels_of(folder, "train"))
    with process_group(rank, here, torch.device("cpu"), timeout_s=120):
        gradient = gradient_of(Trainer(load_model(folder / "foundation.pt"), data, ONE_STEP, rank), here)
        marks: list[Mark] = []
        trainer = Trainer(load_model(folder / "foundation.pt"), data, settings_of(size, batch_size), rank)
        trainer.run(here / "epochs", lambda row: marks.append(Mark.now()))
    return Ranked(between(marks), gradient)


LARGER_BATCH = 4 * BATCH_SIZE

# One structure more than usual, so that the ranks' shares are unequal.
ONE_STEP = TrainingSettings(
    epochs=1, steps_per_epoch=1, batch_size=BATCH_SIZE + 1, weights=WEIGHTS, gradient_clip=None
)


def settings_of(size: Size, batch_size: int = BATCH_SIZE) -> TrainingSettings:
    return TrainingSettings(
        size.epochs, batch_size=batch_size, learning_rate=LEARNING_RATE, weights=WEIGHTS, ema=EMA
    )


def gradient_of(trainer: Trainer, folder: Path) -> NDArray[np.float64]:
    """Of the last step, in all parameters."""
    trainer.run(folder / "gradient")
    # What no output depends on has no gradient in one process, and a zero one under DDP.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainer.parameters]
    return torch.cat([gradient.ravel() for gradient in gradients]).numpy()


def on_two_ranks(folder: Path, size: Size, progress: Callable[[str], None]) -> Found:
    """Of the usual batches, and of larger ones, as the names say: what a step costs however small it is weighs less there."""
    columns: dict[str, list[float]] = {}
    for number in range(size.repetitions):
        for suffix, batch_size in (("", BATCH_SIZE), (f"_batch_{LARGER_BATCH}", LARGER_BATCH)):
            (alone,), both = (
                in_processes(
                    of_rank,
                    *(
                        (folder, size, batch_size, Rank(r, n, r, token=f"{number}-{n}{suffix}"))
                        for r in range(n)
                    ),
                )
                for n in (1, 2)
            )
            row = sped_up(alone, both, size.num_train)
            progress(", ".join(f"{name}{suffix} {value:.3g}" for name, value in row.items()))
            for name, value in row.items():
                columns.setdefault(f"{name}{suffix}", []).append(value)
    differences = [value for name in list(columns) if name.startswith("grad_") for value in columns.pop(name)]
    found: Found = {"repetitions_ddp": columns, "grad_rel_diff_2": max(differences)}
    for name, values in columns.items():
        found |= spanned(name, values)
    return found


def sped_up(alone: Ranked, both: Sequence[Ranked], num_structures: int) -> dict[str, float]:
    """The ranks work in step, so by the clock they are equal, and of the processor's time the slower one's counts."""
    one, two = typical(alone.epochs), [typical(rank.epochs) for rank in both]
    wall, cpu = (max(getattr(rank, kind) for rank in two) for kind in ("wall", "cpu"))
    norm = np.linalg.norm(alone.gradient)
    return {
        "structures_per_s_1": num_structures / one.wall,
        "structures_per_s_2": num_structures / wall,
        "ddp_speedup_2": one.wall / wall,
        "ddp_cpu_speedup_2": one.cpu / cpu,
        "grad_rel_diff_2": max(float(np.linalg.norm(r.gradient - alone.gradient) / norm) for r in both),
    }


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def timed_checkpoints(folder: Path, size: Size) -> tuple[list[Mark], list[Mark]]:
    """Epochs with validation but the first, and checkpoints that are written between them."""
    torch.set_num_threads(1)
    keep_freed_memory()
    data = TrainingData(labels_of(folder, "train"), validation=labels_of(folder, "valid"))
    trainer = Trainer(load_model(folder / "foundation.pt"), data, settings_of(size))
    epochs: list[Mark] = []
    checkpoints: list[Mark] = []
    begun = Mark.now()

    def after_epoch(row: dict[str, float]) -> None:
        nonlocal begun
        epochs.append(Mark.now().since(begun))
        for _ in range(CHECKPOINTS):
            start = Mark.now()
            save_checkpoint(folder / "aside", trainer.checkpoint(int(row["epoch"])))
            checkpoints.append(Mark.now().since(start))
        begun = Mark.now()

    trainer.run(folder / "with-checkpoints", after_epoch)
    return epochs[1:], checkpoints


def of_checkpoints(folder: Path, size: Size, progress: Callable[[str], None]) -> Found:
    (folder / "aside").mkdir()
    ((epochs, checkpoints),) = in_processes(timed_checkpoints, (folder, size))
    epoch = typical(epochs)
    progress(f"checkpoint: {1e3 * typical(checkpoints).wall:.1f} ms of an epoch of {epoch.wall:.2f} s")
    return {
        **spanned("checkpoint_seconds", [checkpoint.wall for checkpoint in checkpoints]),
        **spanned("checkpoint_share", [checkpoint.wall / epoch.wall for checkpoint in checkpoints]),
        **spanned("checkpoint_cpu_share", [checkpoint.cpu / epoch.cpu for checkpoint in checkpoints]),
        "repetitions_checkpoint": {"epochs": epochs, "checkpoints": checkpoints},
    }


# ---- the command ---------------------------------------------------------------------------------------------------

MEASURES = {"mace": beside_mace, "ddp": on_two_ranks, "checkpoint": of_checkpoints}


def measure_all(size: Size, parts: Sequence[str], progress: Callable[[str], None]) -> Found:
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="hpcft-train-") as name:
        folder = Path(name)
        in_processes(prepare, (folder, size))
        progress("labels and foundation are there")
        found: Found = {"settings": settings_told(size)}
        for part in parts:
            found |= MEASURES[part](folder, size, progress)
    return found | {"load_average": {"before": load, "after": os.getloadavg()}}


def settings_told(size: Size) -> Found:
    fixed = {"batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "ema": EMA, "cutoff": CUTOFF}
    return {
        **asdict(size),
        **fixed,
        "weights": asdict(WEIGHTS),
        "torch": torch.__version__,
        "mace": version("mace-torch"),
    }


def tables_of(found: Found) -> list[Table]:
    tables = []
    if "epoch_ratio" in found:
        before = f"before training: {found['valid_force_mae_before']:.1f} meV/Å"
        caption = f"{before}, the same in both to {found['start_rel_diff']:.0e}"
        table = Table("beside mace", "hpcft", "mace", "hpcft : mace", "range", caption=caption)
        for title, key, ratio, form in BESIDE_MACE:
            ours, theirs = found[f"{key}_hpcft"], found[f"{key}_mace"]
            span = f"{found[f'{ratio}_range'][0]:.2f} to {found[f'{ratio}_range'][1]:.2f}" if ratio else ""
            quotient = found[ratio] if ratio else ours / theirs
            table.add_row(title, form.format(ours), form.format(theirs), f"{quotient:.2f}", span)
        tables.append(table)
    rest = [row for row in ALONE if row[1] in found]
    if rest:
        table = Table("hpcft", "median", "range")
        for title, key, form in rest:
            span = " to ".join(form.format(end) for end in found.get(f"{key}_range", []))
            table.add_row(title, form.format(found[key]), span)
        tables.append(table)
    return tables


BESIDE_MACE = (
    ("epoch, s", "epoch_seconds", "epoch_ratio", "{:.2f}"),
    ("epoch, CPU s", "epoch_cpu_seconds", "epoch_cpu_ratio", "{:.2f}"),
    ("peak memory, MiB", "peak_MiB", None, "{:.0f}"),
    ("validation force MAE, meV/Å", "valid_force_mae", None, "{:.1f}"),
)
ALONE = (
    ("structures per s, 1 rank", "structures_per_s_1", "{:.3g}"),
    ("structures per s, 2 ranks", "structures_per_s_2", "{:.3g}"),
    ("2 ranks, times as fast", "ddp_speedup_2", "{:.2f}"),
    ("the same by CPU time of a rank", "ddp_cpu_speedup_2", "{:.2f}"),
    (f"2 ranks, batches of {LARGER_BATCH}", f"ddp_speedup_2_batch_{LARGER_BATCH}", "{:.2f}"),
    ("the same by CPU time of a rank", f"ddp_cpu_speedup_2_batch_{LARGER_BATCH}", "{:.2f}"),
    ("gradient of 2 ranks off by (largest)", "grad_rel_diff_2", "{:.1e}"),
    ("checkpoint, s", "checkpoint_seconds", "{:.3f}"),
    ("checkpoint by epoch", "checkpoint_share", "{:.2%}"),
    ("the same by CPU time", "checkpoint_cpu_share", "{:.2%}"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, as one object")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few data, to see that it runs")
    parser.add_argument("--only", choices=MEASURES, help="one of the three measurements")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repetitions", type=int, metavar="N", help="instead of 3, or of 1 with --quick")
    options = parser.parse_args()
    torch.set_num_threads(1)
    log = Console(stderr=True)
    size = replace(QUICK if options.quick else FULL, device=options.device)
    size = replace(size, repetitions=options.repetitions or size.repetitions)
    parts = [options.only] if options.only else list(MEASURES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript's
        found = measure_all(size, parts, lambda line: log.print(line, style="dim"))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    console = Console()
    console.width = max(console.width, 100)  # the table's; a file is 80 wide otherwise
    for table in tables_of(found):
        console.print(table)


if __name__ == "__main__":
    main()

"""Does training through relaxations pay? Foundation, energies and forces, BPTT, and both, at one label budget.

    python benchmarks/relaxation_study.py --json FILE [--quick] [--systems ...] [--methods ...] [--seeds 1 2 3]
                                          [--only main|data|robustness] [--resume] [--cache FOLDER]

A label is one energy with forces by the reference. For each of N training structures the reference relaxes it, and every
method may use all that this has produced and nothing else: the labels of all frames on the way (`forces`), the end as the
target of the model's own relaxation (`bptt`), or both (`combined`); `forces-long` is `forces` with as many steps as take the
processor time of `combined`. So `num_labels` is the same for all methods of a row's
system, seed and N, though BPTT looks at the ends alone. The data of the foundation (replay) are free: it comes with them.

Foundations are small MACEs that have seen pristine crystals only, strained and rattled, under the same reference. A seed
stands for a foundation, its training and test structures, and the order of training. Delta Q (amu^1/2 Å, arXiv 2512.01067)
is judged on relaxations that no model has seen, after k steps of the heavy-ball map and at convergence (L-BFGS, 0.002 eV/Å);
errors of forces (meV/Å) and energies (meV/atom) along the test relaxations, and out of domain (`_out`) on pristine crystals
that were held out. `wrong_minimum`: the share of ends from which the reference itself relaxes to another minimum.

Every finished row is in FILE at once; with --resume those there are not done again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from study_systems import SYSTEMS, System
from study_training import METHODS, Problem, Sizes, fine_tuned, judged, problem_of

from hpcft.bias import Interval
from hpcft.models.allocator import keep_freed_memory
from hpcft.storage.atomic import read_json, write_json

QUICK = Sizes(
    per_crystal=16,
    pretraining_steps=200,
    num_train=6,
    num_test=6,
    force_steps=60,
    force_steps_first=30,
    force_steps_long=120,
    bptt_steps=10,
)
DATA_EFFICIENCY = (5, 10, 20, 50)
STEP_SIZE_FACTORS = (0.5, 2.0)
STEPS = (10, 40, 80)
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One row to be: a training and its judgement."""

    kind: str
    system: System
    method: str
    seed: int
    sizes: Sizes

    @property
    def identity(self) -> Row:
        return {
            "kind": self.kind,
            "system": self.system.name,
            "method": self.method,
            "seed": self.seed,
            "num_relaxations": self.sizes.num_train,
            "step_size": self.system.step_size * self.sizes.step_size_factor,
            "steps": self.sizes.steps,
            "settings": asdict(self.sizes),
        }


def runs(options: argparse.Namespace, sizes: Sizes) -> Iterator[Run]:
    """What the options ask for, a whole seed of all systems before the next."""
    systems = [SYSTEMS[name] for name in options.systems]
    trained = [method for method in options.methods if method != "none"]
    if options.only in (None, "main"):
        for seed in options.seeds:
            for system in systems:
                yield from (Run("main", system, method, seed, sizes) for method in options.methods)
    if options.only in (None, "data"):
        for seed in options.seeds:
            for number in DATA_EFFICIENCY:
                changed = replace(sizes, num_train=number)
                yield from (Run("data-efficiency", systems[0], method, seed, changed) for method in trained)
    if options.only in (None, "robustness"):
        variants = [replace(sizes, step_size_factor=factor) for factor in STEP_SIZE_FACTORS]
        variants += [replace(sizes, steps=steps) for steps in STEPS]
        through = [method for method in trained if method in ("bptt", "combined")]
        for seed in options.seeds:
            for changed in variants:
                yield from (Run("robustness", systems[0], method, seed, changed) for method in through)


class Study:
    """The rows so far, and the problem of the latest seed and system."""

    def __init__(self, path: Path, cache: Path, resume: bool) -> None:
        self.path, self.cache = path, cache
        self.rows: list[Row] = read_json(path) if resume and path.exists() else []
        self._problem: Problem | None = None
        self._before: dict[tuple[str, int], Row] = {}

    def is_done(self, run: Run) -> bool:
        return any(run.identity.items() <= row.items() for row in self.rows)

    def perform(self, run: Run) -> Row:
        problem, before = self._problem_of(run), self._before_of(run)
        started, cpu = time.perf_counter(), time.process_time()
        after = before
        if run.method != "none":
            potential = fine_tuned(problem, run.method, run.sizes)
            cpu_s, wall_s = time.process_time() - cpu, time.perf_counter() - started
            after = judged(potential, problem) | {"cpu_s": cpu_s, "wall_s": wall_s}
        used = problem.train[: run.sizes.num_train] if run.method != "none" else []
        counts = {"num_labels": sum(len(relaxation.frames) for relaxation in used)}
        row = run.identity | counts | after | {f"{name}_before": value for name, value in before.items()}
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.rows)
        return row

    def _problem_of(self, run: Run) -> Problem:
        found = self._problem
        wanted = (run.system, run.seed)
        if found is None or (found.system, found.seed) != wanted or len(found.train) < run.sizes.num_train:
            self._problem = found = problem_of(run.system, run.seed, run.sizes, self.cache)
        return found

    def _before_of(self, run: Run) -> Row:
        key = (run.system.name, run.seed)
        if key not in self._before:
            earlier = [row for row in self.rows if (row["system"], row["seed"]) == key]
            if earlier:
                ends = {name for name in earlier[0] if name.endswith("_before")}
                self._before[key] = {name.removesuffix("_before"): earlier[0][name] for name in ends}
            else:
                problem = self._problem_of(run)
                self._before[key] = judged(fine_tuned(problem, "none", run.sizes), problem)
        return self._before[key]


# ---- what came out -------------------------------------------------------------------------------------------------


def reduction(systems: Sequence[Sequence[Row]], name: str, samples: int = 2000) -> Interval:
    """By how much the mean of `name` has fallen in each system's rows (one for each seed), per cent; the mean over systems.

    Bootstrap over the seeds of each system and the test structures of each seed; a structure stays paired with itself
    before the training.
    """
    random = np.random.default_rng(0)
    resampled = np.mean([_resampled(rows, name, samples, random) for rows in systems], axis=0)
    low, high = np.percentile(resampled, [2.5, 97.5])
    values = [
        _reduction([(row[f"{name}_each"], row[f"{name}_each_before"]) for row in rows]) for rows in systems
    ]
    return Interval(float(np.mean(values)), float(low), float(high))


def _resampled(rows: Sequence[Row], name: str, samples: int, random: np.random.Generator) -> list[float]:
    pairs = [(np.asarray(row[f"{name}_each"]), np.asarray(row[f"{name}_each_before"])) for row in rows]
    found = []
    for _ in range(samples):
        chosen = []
        for seed in random.integers(0, len(pairs), len(pairs)):
            after, before = pairs[seed]
            picks = random.integers(0, len(after), len(after))
            chosen.append((after[picks], before[picks]))
        found.append(_reduction(chosen))
    return found


def _reduction(pairs: Sequence[tuple[Any, Any]]) -> float:
    """`pairs`: values after and before of each seed's structures."""
    after, before = (float(sum(np.mean(values) for values in side)) for side in zip(*pairs, strict=True))
    return 100 * (1 - after / before)


def report(rows: Sequence[Row]) -> list[Table]:
    """A table for each kind of run."""
    tables = []
    for kind in ("main", "data-efficiency", "robustness"):
        chosen = [row for row in rows if row["kind"] == kind]
        if chosen:
            tables.append(_table(kind, chosen))
    main = [row for row in rows if row["kind"] == "main" and row["method"] != "none"]
    return [*tables, _summary(main)] if main else tables


def _summary(rows: Sequence[Row]) -> Table:
    """The mean over systems, beside the paper's 32 %."""
    table = Table(title="mean over systems", caption="ratios of errors: after by before")
    table.add_column("method")
    for name in ("ΔQ(k) less, %", "ΔQ conv. less, %", "force MAE in", "force MAE out"):
        table.add_column(name, justify="right")
    for method in dict.fromkeys(row["method"] for row in rows):
        same = [row for row in rows if row["method"] == method]
        systems = [
            [row for row in same if row["system"] == name]
            for name in dict.fromkeys(r["system"] for r in same)
        ]
        less = [_shown(reduction(systems, name)) for name in ("delta_q_k", "delta_q_converged")]
        ratios = [
            np.mean([np.mean([row[name] / row[f"{name}_before"] for row in rows]) for rows in systems])
            for name in ("force_mae", "force_mae_out")
        ]
        table.add_row(method, *less, *(f"{ratio:.2f}" for ratio in ratios))
    return table


def _table(kind: str, rows: Sequence[Row]) -> Table:
    table = Table(title=kind, caption="in brackets: 95 % interval over seeds and test structures")
    table.add_column("system")
    table.add_column("method")
    for name in (
        "N",
        "eta",
        "k",
        "seeds",
        "labels",
        "ΔQ(k)",
        "ΔQ conv.",
        "ΔQ(k) less, %",
        "ΔQ conv. less, %",
    ):
        table.add_column(name, justify="right")
    for name in ("force MAE\nin", "out", "energy MAE\nin", "out", "wrong\nminimum", "CPU s"):
        table.add_column(name, justify="right")
    names = ("system", "method", "num_relaxations", "step_size", "steps")
    for identity in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        same = [row for row in rows if tuple(row[name] for name in names) == identity]
        table.add_row(*_cells(identity, same))
    return table


def _cells(identity: tuple[Any, ...], rows: Sequence[Row]) -> list[str]:
    def mean(name: str, digits: int) -> str:
        return f"{np.mean([row.get(name, 0.0) for row in rows]):.{digits}f}"

    def less(name: str) -> str:
        if identity[1] == "none":
            return "–"
        return _shown(reduction([rows], name))

    system, method, number, step_size, steps = identity
    return [
        str(system), str(method), str(number), f"{step_size:g}", str(steps), str(len(rows)), mean("num_labels", 0),
        mean("delta_q_k", 2), mean("delta_q_converged", 2), less("delta_q_k"), less("delta_q_converged"),
        mean("force_mae", 1), mean("force_mae_out", 1), mean("energy_mae", 1), mean("energy_mae_out", 1),
        mean("wrong_minimum", 2), mean("cpu_s", 0),
    ]  # fmt: skip


def _shown(interval: Interval) -> str:
    return f"{interval.value:.0f} [{interval.low:.0f}, {interval.high:.0f}]"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the rows go")
    parser.add_argument("--quick", action="store_true", help="one system, one seed, small sizes: two minutes")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--only", choices=("main", "data", "robustness"))
    parser.add_argument("--resume", action="store_true", help="keep the rows in FILE and do the others")
    parser.add_argument(
        "--cache", type=Path, help="foundations and reference relaxations (default: beside FILE)"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.systems, options.seeds, options.only = options.systems[:1], options.seeds[:1], "main"
    return options


def study(options: argparse.Namespace, sizes: Sizes) -> list[Row]:
    """All runs that the options ask for; the rows in the file, those of earlier times included."""
    cache = options.cache or options.json.parent / f"{options.json.stem}-cache"
    work = Study(options.json, cache, options.resume)
    for run in runs(options, sizes):
        if work.is_done(run):
            continue
        row = work.perform(run)
        print(
            f"{row['kind']} {row['system']} {row['method']} seed {row['seed']} N {row['num_relaxations']} "
            f"eta {row['step_size']:g} k {row['steps']}: Delta Q(k) {row['delta_q_k']:.2f} ({row['delta_q_k_before']:.2f}), "
            f"converged {row['delta_q_converged']:.2f} ({row['delta_q_converged_before']:.2f}), "
            f"force MAE {row['force_mae']:.1f} ({row['force_mae_before']:.1f}), {row.get('cpu_s', 0):.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return work.rows


def main() -> None:
    options = parse()
    torch.set_num_threads(1)  # more threads than free cores are slower by far
    keep_freed_memory()
    rows = study(options, QUICK if options.quick else Sizes())
    for table in report(rows):
        Console(width=200).print(table)


if __name__ == "__main__":
    main()

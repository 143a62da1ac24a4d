"""hpcft relax: structures of a file to their minima, by a model."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hpcft.cli.targets import Force, check_writable
from hpcft.errors import UserError

if TYPE_CHECKING:
    from ase import Atoms
    from rich.console import Console

    from hpcft.models.protocol import Potential
    from hpcft.relaxation import Relaxed

_MOST_ROWS = 40  # of the table on the terminal
_SAVE_EVERY_S = 60


class Optimiser(StrEnum):
    """The names of `hpcft.relaxation.OPTIMISERS`, without its imports."""

    fire = "fire"
    lbfgs = "lbfgs"


class Device(StrEnum):
    """Where to compute; auto: on a GPU if there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    """The names of torch's types."""

    float32 = "float32"
    float64 = "float64"


def relax(
    structures_file: Annotated[
        Path,
        typer.Argument(
            metavar="STRUCTURES", help="Any file that ASE reads; all its structures.", show_default=False
        ),
    ],
    model_file: Annotated[
        Path, typer.Option("--model", help="hpcft's .pt or MACE's .model.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Extended XYZ; default: NAME-relaxed.extxyz beside the input."),
    ] = None,
    table_file: Annotated[
        Path | None, typer.Option("--table", help="Write the table as CSV, with a row for each structure.")
    ] = None,
    force: Force = False,
    optimiser: Annotated[
        Optimiser, typer.Option(help="fire is patient; lbfgs takes fewer steps.")
    ] = Optimiser.fire,
    fmax: Annotated[float, typer.Option(help="Largest force of a structure at rest, eV/Å.")] = 0.01,
    max_steps: Annotated[int, typer.Option(min=0, help="After so many a structure is given up.")] = 500,
    with_cell: Annotated[bool, typer.Option("--cell", help="Relax the cells too.")] = False,
    max_stress_GPa: Annotated[
        float,
        typer.Option("--max-stress-GPa", help="With --cell: largest stress component of a cell at rest."),
    ] = 0.1,
    batch_atoms: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Atoms to compute together. Default: a GPU's fill; 2000 on a CPU.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="auto: a GPU if there is one.")] = Device.auto,
    precision: Annotated[
        Precision | None, typer.Option(help="Default: the model's.", show_default=False)
    ] = None,
) -> None:
    """Relax the structures of a file, many at a time, and write them with energies and forces of the model.

    Exit code 1 if one has not converged (all are written all the same), 130 if interrupted: what had ended is written.
    """
    for name, value in (("--fmax", fmax), ("--max-stress-GPa", max_stress_GPa)):
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name} is {value}; it must be positive")
    target = output or structures_file.with_name(f"{structures_file.stem}-relaxed.extxyz")
    _check_targets(target, table_file, force, structures_file, model_file)

    from ase.units import GPa
    from rich.console import Console

    from hpcft.models.allocator import keep_freed_memory
    from hpcft.models.batch_size import atoms_together
    from hpcft.storage.structures import read_any

    keep_freed_memory()
    structures = read_any(structures_file)
    potential = _load(model_file, device, precision)
    _check_structures(structures, structures_file, potential, with_cell)
    console = Console(highlight=False)
    options = {
        "fmax": fmax,
        "max_steps": max_steps,
        "optimiser": optimiser.value,
        "with_cell": with_cell,
        "max_stress": max_stress_GPa * GPa,
        "max_atoms": batch_atoms or atoms_together(potential, structures, stress=with_cell),
    }
    results: dict[int, Relaxed] = {}
    ended = _relax_all(potential, structures, console, options, _Keeper(target, results))
    _tell(console, structures, results, target, table_file, with_cell)
    if not ended:
        raise typer.Exit(130)
    if not all(result.converged for result in results.values()):
        raise typer.Exit(1)


def _tell(
    console: Console,
    structures: Sequence[Atoms],
    results: Mapping[int, Relaxed],
    target: Path,
    table_file: Path | None,
    with_cell: bool,
) -> None:
    """The tables, and how many have converged; of an interrupted run, what is missing."""
    left = len(structures) - len(results)
    if not results:
        console.print("interrupted before any structure had ended: nothing was written")
        return
    rows = [_row(number, structures[number], result, with_cell) for number, result in sorted(results.items())]
    if table_file is not None:
        _write_csv(table_file, rows)
    _show(console, rows)
    num_converged = sum(result.converged for result in results.values())
    num_steps = sum(result.num_steps for result in results.values())
    console.print(
        f"{num_converged} of {len(structures)} converged, {num_steps} steps in all: {target}", soft_wrap=True
    )
    if left:
        console.print(
            f"interrupted: {left} had not ended and are not in the file; input_index says which are"
        )


def _check_targets(target: Path, table_file: Path | None, force: bool, *inputs: Path) -> None:
    if target.suffix not in (".extxyz", ".xyz"):
        raise UserError(f"{target.name}: only extended XYZ is written; name it {target.stem}.extxyz")
    for path in (target, table_file):
        if path is not None:
            check_writable(path, force, *inputs)
    if table_file is not None and table_file.resolve() == target.resolve():
        raise UserError(f"{target} cannot hold both the structures and the table; give two names")


def _load(model_file: Path, device: Device, precision: Precision | None) -> Potential:
    import torch

    from hpcft.models.files import load_model
    from hpcft.training.distributed import choose_device
    from hpcft.training.rank import Rank

    dtype = None if precision is None else getattr(torch, precision.value)
    return load_model(model_file, dtype=dtype, device=choose_device(Rank(), device.value))


def _check_structures(structures: Sequence[Atoms], file: Path, potential: Potential, with_cell: bool) -> None:
    import numpy as np
    from ase.data import chemical_symbols

    from hpcft.relaxation import fixed_atoms

    for number, atoms in enumerate(structures):
        name = f"structure {number} of {file}"
        if len(atoms) == 0:
            raise UserError(f"{name} has no atoms; leave it out")
        unknown = sorted(set(atoms.numbers.tolist()) - set(potential.elements))
        if unknown:
            raise UserError(
                f"{name} ({atoms.get_chemical_formula()}) holds {', '.join(chemical_symbols[z] for z in unknown)}, "
                "which the model does not know; leave it out, or use another model (hpcft model info shows its elements)"
            )
        if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
            raise UserError(f"{name} has positions or cell vectors that are no numbers; leave it out")
        lengths = np.linalg.norm(atoms.cell.array, axis=1)
        if (atoms.pbc & (lengths == 0)).any() or (atoms.pbc.all() and atoms.cell.rank < 3):
            raise UserError(f"{name} is periodic but lacks a cell vector; give it one, or make it open (pbc)")
        if with_cell and not (atoms.pbc.any() and atoms.cell.rank == 3):
            raise UserError(f"{name} has no periodic cell to relax; relax it in another run, without --cell")
        fixed_atoms(atoms, name)


class _Keeper:
    """Writes what has ended: now and then, so that hours of work do not hang on the last structure, and at the end."""

    def __init__(self, target: Path, results: dict[int, Relaxed]) -> None:
        self.target, self.results = target, results
        self._saved_at = time.monotonic()

    def take(self, number: int, result: Relaxed) -> None:
        self.results[number] = result
        if time.monotonic() - self._saved_at > _SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Under names that ASE's reader leaves where they are; `energy` and `forces` it would move into a calculator."""
        from hpcft.storage.extxyz import write_extxyz

        for number, result in self.results.items():
            result.atoms.info |= {
                "input_index": number,
                "model_energy": result.energy,
                "converged": result.converged,
                "num_steps": result.num_steps,
            }
            result.atoms.arrays["model_forces"] = result.forces
        write_extxyz(self.target, [result.atoms for _, result in sorted(self.results.items())])
        self._saved_at = time.monotonic()


def _relax_all(
    potential: Potential,
    structures: Sequence[Atoms],
    console: Console,
    options: dict[str, Any],
    keeper: _Keeper,
) -> bool:
    """Whether it came to its end; interrupted by Ctrl-C or SIGTERM, it keeps what had ended by then."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from hpcft.relaxation import relax as relax_together

    columns = (TextColumn("relaxing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    failed = TextColumn("[red]{task.fields[failed]}")
    ended = False
    with Progress(
        *columns, failed, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task, num_failed = progress.add_task("", total=len(structures), failed=""), 0

        def on_done(number: int, result: Relaxed) -> None:
            nonlocal num_failed
            keeper.take(number, result)
            num_failed += not result.converged
            progress.update(task, advance=1, failed=f"{num_failed} not converged" if num_failed else "")

        polite_end = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            relax_together(potential, structures, on_done=on_done, **options)
            ended = True
        except KeyboardInterrupt:
            pass
        except torch.OutOfMemoryError as error:
            raise UserError(
                "a structure alone does not fit into the memory of the GPU; use --precision float32, a GPU with more memory, or "
                "smaller structures"
            ) from error
        finally:
            signal.signal(signal.SIGTERM, polite_end)
            if keeper.results:
                keeper.save()
    return ended


def _row(number: int, start: Atoms, result: Relaxed, with_cell: bool) -> dict[str, Any]:
    """By column of the CSV file. Where the cell moves too, an atom's displacement is the one within the cell."""
    import numpy as np
    from ase.units import GPa

    end = result.atoms
    before = start.positions
    if with_cell:
        before = end.cell.cartesian_positions(start.cell.scaled_positions(before))
    row = {
        "number": number,
        "formula": start.get_chemical_formula(),
        "atoms": len(start),
        "steps": result.num_steps,
        "energy_before_eV": result.energy_start,
        "energy_after_eV": result.energy,
        "max_force_eV_per_A": result.max_force,
        "max_displacement_A": float(np.linalg.norm(end.positions - before, axis=1).max()),
    }
    if with_cell:
        row["max_stress_GPa"] = result.max_stress / GPa
        row["volume_change_percent"] = 100 * (end.get_volume() / start.get_volume() - 1)
    return {**row, "converged": result.converged}


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import csv
    import io

    from hpcft.storage.atomic import write_text

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


_TITLES = {
    "number": ("#", "{}"),
    "formula": ("formula", "{}"),
    "atoms": ("atoms", "{}"),
    "steps": ("steps", "{}"),
    "energy_before_eV": ("energy\nbefore\n(eV)", "{:.4f}"),
    "energy_after_eV": ("energy\nafter\n(eV)", "{:.4f}"),
    "max_force_eV_per_A": ("max\nforce\n(eV/Å)", "{:.2g}"),
    "max_displacement_A": ("moved\nby\n(Å)", "{:.3f}"),
    "max_stress_GPa": ("max\nstress\n(GPa)", "{:.2g}"),
    "volume_change_percent": ("volume\nchange\n(%)", "{:+.2f}"),
    "converged": ("at\nrest", "{}"),
}


def _show(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Where there are too many, those first that have not converged."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    for name in rows[0]:
        justify: Literal["left", "right"] = "left" if name == "formula" else "right"
        table.add_column(_TITLES[name][0], justify=justify, no_wrap=True)
    shown = sorted(rows, key=lambda row: (row["converged"], row["number"]))[:_MOST_ROWS]
    for row in sorted(shown, key=lambda row: row["number"]):
        cells = [_TITLES[name][1].format(value) for name, value in row.items()]
        cells[-1] = "yes" if row["converged"] else "[red]no"
        table.add_row(*cells)
    # A number that is cut off is no number: rather let a narrow terminal wrap the line.
    console.width = max(
        console.width, console.measure(table, options=console.options.update(width=1000)).maximum
    )
    console.print(table)
    if len(rows) > len(shown):
        console.print(f"and {len(rows) - len(shown)} more; --table writes all of them", soft_wrap=True)

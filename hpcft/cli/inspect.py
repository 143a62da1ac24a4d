"""hpcft inspect: what is in an HDF5 file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpcft.cli.targets import Force, check_writable
from hpcft.errors import UserError

if TYPE_CHECKING:
    from ase import Atoms


def inspect(
    file: Annotated[
        Path,
        typer.Argument(help="Any HDF5 file of hpcft's: trajectory, structures, labels.", show_default=False),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
    datasets: Annotated[
        bool, typer.Option("--datasets", help="List every dataset with shape, type and unit.")
    ] = False,
    replica: Annotated[int | None, typer.Option(help="Which replica --extxyz and --h5md write.")] = None,
    extxyz: Annotated[
        Path | None, typer.Option(help="Write the structures (of one replica, or all) as extended XYZ.")
    ] = None,
    h5md: Annotated[
        Path | None, typer.Option(help="Write a small .h5md view of one replica, which MDAnalysis opens.")
    ] = None,
    force: Force = False,
) -> None:
    """Show what an HDF5 file holds: kind, provenance, replicas, frames, ranges; export it on request."""
    for target in (extxyz, h5md):
        if target is not None:
            check_writable(target, force, file)
    from hpcft.storage.inspection import inspect_file

    report = inspect_file(file)
    for warning in report["warnings"]:
        typer.echo(f"hpcft: warning: {warning}", err=True)
    if extxyz is not None:
        _export(file, report["kind"], replica, extxyz)
    if h5md is not None:
        _view(file, report["kind"], replica, h5md)
    if extxyz is not None or h5md is not None:
        return
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        _show(report, datasets)


def _export(file: Path, kind: str, replica: int | None, target: Path) -> None:
    from hpcft.storage.extxyz import without_long_info, write_extxyz

    structures, left_out = without_long_info(_structures(file, kind, replica))
    if not structures:
        which = "" if replica is None else f" of replica {replica}"
        raise UserError(f"{file} holds no frames{which}, so there is nothing to write")
    write_extxyz(target, structures)
    typer.echo(f"{target}: {len(structures)} structures")
    if left_out:
        names = ", ".join(f"{name} ({count} numbers)" for name, count in left_out.items())
        typer.echo(f"left out, as too long for a comment line: {names}")


def _structures(file: Path, kind: str, replica: int | None) -> list[Atoms]:
    """What an extended XYZ is made of; frames say of which replica they are, and have energy and forces as ASE reads them."""
    from hpcft.storage.extxyz import with_results
    from hpcft.storage.structures import read_structures
    from hpcft.storage.trajectory import Trajectory

    if kind == "structures":
        if replica is not None:
            raise UserError(f"{file} is of kind '{kind}', which has no replicas; leave --replica out")
        return read_structures(file)
    if kind != "trajectory":
        raise UserError(f"{file} is of kind '{kind}'; only trajectories and structures are written as extxyz")
    with Trajectory(file) as trajectory:
        chosen = trajectory.replicas if replica is None else [replica]
        frames = [with_results(atoms, replica=r) for r in chosen for atoms in trajectory.frames(r)]
    for atoms in frames:
        del atoms.info["potential_energy"]  # it is `energy` here
    return frames


def _view(file: Path, kind: str, replica: int | None, target: Path) -> None:
    from hpcft.storage.trajectory import write_h5md_view

    if kind != "trajectory":
        raise UserError(f"{file} is of kind '{kind}'; only a trajectory has replicas to view")
    if replica is None:
        raise UserError("say which replica the view shows, for example --replica 0")
    write_h5md_view(file, replica, target)
    typer.echo(f"{target}: MDAnalysis.Universe reads it; keep it beside {file.name}")


def _show(report: dict[str, Any], datasets: bool) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else 140
    console.print(f"{report['path']}: {report['kind']}, {report['num_bytes'] / 1e6:.2f} MB", soft_wrap=True)
    for key, value in report["provenance"].items():
        console.print(f"  {key}: {value}", soft_wrap=True)
    if "replicas" in report:
        console.print(_replica_table(report["replicas"]))
    if "structures" in report:
        for key, value in report["structures"].items():
            if value is None or _short(value) == "none":
                continue
            console.print(f"  {key.replace('_', ' ')}: {_short(value)}", soft_wrap=True)
    if datasets or not ({"replicas", "structures"} & report.keys()):
        console.print(_dataset_table(report["datasets"]))


def _replica_table(replicas: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table()
    for title in ("replica", "formula", "frames", "steps", "time (fs)", "energy (eV)", "temperature (K)"):
        table.add_column(title, justify="left" if title == "formula" else "right")
    for row in replicas:
        table.add_row(
            str(row["replica"]),
            row["formula"],
            str(row["num_frames"]),
            f"{row['first_step']} to {row['last_step']}",
            f"{row['first_time_fs']} to {row['last_time_fs']}",
            _short(row["potential_energy_eV"]),
            _short(row["temperature_K"]),
        )
    return table


def _dataset_table(entries: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("dataset", "shape", "type", "unit")
    for entry in entries:
        shape = " x ".join(map(str, entry["shape"])) or "scalar"
        table.add_row(entry["name"], shape, entry["dtype"], entry["unit"] or "")
    return table


def _short(value: Any) -> str:
    """A range as `min … max (mean m)`; everything else as it is."""
    if isinstance(value, dict) and {"min", "max"} <= value.keys():
        if value["min"] is None:
            return "none"
        middle = f" (mean {value['mean']:.4g})" if value.get("mean") is not None else ""
        return f"{value['min']:.4g} … {value['max']:.4g}{middle}"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""hpcft inspect: what is in an HDF5 file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hpcft.cli.targets import Force, check_writable
from hpcft.errors import UserError


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
    if extxyz is not None:
        typer.echo(f"{extxyz}: {_export(file, report['kind'], replica, extxyz)} structures")
    elif h5md is not None:
        _view(file, report["kind"], replica, h5md)
    elif as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        _show(report, datasets)


def _export(file: Path, kind: str, replica: int | None, target: Path) -> int:
    from hpcft.storage.extxyz import write_extxyz
    from hpcft.storage.structures import read_structures
    from hpcft.storage.trajectory import Trajectory

    if kind == "structures":
        structures = read_structures(file)
    elif kind == "trajectory":
        with Trajectory(file) as trajectory:
            chosen = trajectory.replicas if replica is None else [replica]
            structures = [atoms for r in chosen for atoms in trajectory.frames(r)]
    else:
        raise UserError(f"{file} is of kind '{kind}'; only trajectories and structures are written as extxyz")
    write_extxyz(target, structures)
    return len(structures)


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

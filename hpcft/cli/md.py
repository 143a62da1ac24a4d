"""hpcft md: molecular dynamics of the structures of a file, by a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpcft.cli.md_table import show_replicas
from hpcft.cli.relax import Device, Precision
from hpcft.cli.targets import check_model_file, check_run_folder
from hpcft.cli.train import use_threads
from hpcft.errors import UserError

if TYPE_CHECKING:
    from ase import Atoms

    from hpcft.md import Ramp
    from hpcft.md.run import MdRequest
    from hpcft.models.protocol import Potential
    from hpcft.training.rank import Rank


class Ensemble(StrEnum):
    """What is sampled, and how."""

    nve = "nve"
    nvt = "nvt"
    nvt_svr = "nvt-svr"
    npt = "npt"
    npt_full = "npt-full"


def md(
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
        Path, typer.Option("--output", "-o", help="Folder for the trajectory.", show_default=False)
    ],
    steps: Annotated[int, typer.Option(min=1, help="Time steps of each replica.", show_default=False)],
    ensemble: Annotated[
        Ensemble,
        typer.Option(
            help="nvt: Langevin. nvt-svr: stochastic velocity rescaling. npt, npt-full: and stochastic cell rescaling, of the "
            "volume or of the whole cell."
        ),
    ] = Ensemble.nvt,
    temperature: Annotated[str, typer.Option(help="K; a ramp as 300:1200.")] = "300",
    pressure: Annotated[str, typer.Option("--pressure-GPa", help="GPa; a ramp as 0:10.")] = "0",
    timestep: Annotated[float, typer.Option(help="fs")] = 1.0,
    friction: Annotated[float, typer.Option("--friction-per-ps", help="Of nvt.")] = 10.0,
    thermostat_fs: Annotated[float, typer.Option(help="Relaxation time of nvt-svr and npt.")] = 100.0,
    barostat_fs: Annotated[float, typer.Option(help="Relaxation time of the volume.")] = 1000.0,
    copies: Annotated[int, typer.Option(min=1, help="Replicas of each structure.")] = 1,
    rattle: Annotated[float, typer.Option(min=0, help="Of the start positions, Å.")] = 0.0,
    strain: Annotated[float, typer.Option(min=0, help="Of the start cells.")] = 0.0,
    frame_every: Annotated[int, typer.Option(min=1, help="Steps between two stored frames.")] = 10,
    velocities_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps between two frames with velocities. Default: all have them.",
            show_default=False,
        ),
    ] = None,
    forces_every: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps between two frames with forces. Default: all have them.", show_default=False
        ),
    ] = None,
    segment_frames: Annotated[
        int, typer.Option(min=1, help="Frames that are committed at once: a kill loses at most these.")
    ] = 100,
    max_temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Guard: a hotter replica has exploded, K. Default: 5 times the highest of --temperature.",
            show_default=False,
        ),
    ] = None,
    min_distance: Annotated[float, typer.Option(min=0, help="Guard: closest pair of atoms, Å.")] = 0.8,
    committee: Annotated[
        list[Path] | None,
        typer.Option(help="More models: their energies and how far the forces spread.", show_default=False),
    ] = None,
    mean_forces: Annotated[
        bool, typer.Option("--mean-forces", help="Move by the committee's mean, not by --model alone.")
    ] = False,
    max_spread: Annotated[
        float | None,
        typer.Option(
            help="Stop a replica where the committee's forces spread further, eV/Å.", show_default=False
        ),
    ] = None,
    q_reference: Annotated[
        Path | None,
        typer.Option(
            help="Structures that the model was trained on: how far each frame is from them (Q-residual).",
            show_default=False,
        ),
    ] = None,
    max_q_residual: Annotated[
        float | None,
        typer.Option(
            help="Stop a replica with an atom farther out; 1: as far as the farthest of --q-reference.",
            show_default=False,
        ),
    ] = None,
    batch_atoms: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Atoms to compute together. Default: a GPU's fill; all on a CPU.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[Device, typer.Option(help="auto: a GPU if there is one.")] = Device.auto,
    precision: Annotated[Precision, typer.Option(help="float32 is faster.")] = Precision.float32,
) -> None:
    """Run molecular dynamics of many replicas at once; srun, mpirun or torchrun in front of it spreads them over ranks.

    Writes OUTPUT/trajectory.h5 (`hpcft inspect`). The same command goes on where it was killed. Exit code 1 if a guard has
    stopped a replica.
    """
    from hpcft.cluster.ranks import rank_of_launcher
    from hpcft.md import ENSEMBLES, Dynamics, Guards
    from hpcft.md.committed import Stretch
    from hpcft.md.run import MdRequest
    from hpcft.models.committee import SPREAD
    from hpcft.selection.q_residual import Q_RESIDUAL
    from hpcft.storage.structures import read_any

    _check_numbers(timestep=timestep, thermostat_fs=thermostat_fs, barostat_fs=barostat_fs)
    _check_limits(max_spread, committee, max_q_residual, q_reference)
    check_run_folder(output)
    models = [model_file, *(committee or [])]
    for path in models:
        check_model_file(path)
    thermostat, barostat = ENSEMBLES[ensemble.value]
    dynamics = Dynamics(
        _ramp(temperature, steps, "temperature", lowest=0.0),
        timestep,
        friction,
        thermostat,
        thermostat_fs,
        barostat,
        _ramp(pressure, steps, "pressure-GPa", lowest=-math.inf),
        barostat_fs,
    )
    hottest = max(dynamics.temperature_at(0), dynamics.temperature_at(steps))
    limits = {SPREAD: max_spread, Q_RESIDUAL: max_q_residual}
    guards = Guards(
        max_temperature_K=max_temperature or 5 * hottest or math.inf,
        min_distance=min_distance,
        max_observed={name: most for name, most in limits.items() if most is not None},
    )
    structures = read_any(structures_file)
    known = None if q_reference is None else read_any(q_reference)
    about = _provenance(models, q_reference, mean_forces=mean_forces, precision=precision)
    request = MdRequest(
        structures, output, Stretch(steps, frame_every, segment_frames), dynamics, guards,
        copies, rattle, strain, seed, batch_atoms, about,
        _intervals(frame_every, velocities=velocities_every, forces=forces_every),
    )  # fmt: skip
    rank = rank_of_launcher()
    _run(request, models, mean_forces, known, device, precision, rank)


def _check_numbers(**positive: float) -> None:
    for name, value in positive.items():
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be positive")


def _check_limits(
    max_spread: float | None, committee: object, max_q_residual: float | None, q_reference: object
) -> None:
    if max_spread is not None and not committee:
        raise UserError("--max-spread is how far a committee may spread; name more models with --committee")
    if max_q_residual is not None and q_reference is None:
        raise UserError(
            "--max-q-residual is how far from the training structures a replica may go; name them with --q-reference"
        )


def _provenance(
    models: Sequence[Path], q_reference: Path | None, *, mean_forces: bool, precision: Precision
) -> dict[str, Any]:
    """What decides, beside the request, whether a folder holds this very run."""
    from hpcft.models.files import sha256_of

    about: dict[str, Any] = {
        "models_sha256": [sha256_of(path) for path in models],
        "mean_forces": mean_forces,
    }
    if q_reference is not None:
        about["q_reference_sha256"] = sha256_of(q_reference)
    return {**about, "precision": precision.value}


def _intervals(frame_every: int, **wanted: int | None) -> dict[str, int]:
    """Of what not all frames have: the steps between two that have it."""
    for name, steps in wanted.items():
        if steps is not None and steps % frame_every:
            raise UserError(
                f"--{name}-every is {steps}, and a frame is stored every {frame_every} steps; name a multiple of that"
            )
    return {name: steps for name, steps in wanted.items() if steps is not None and steps > frame_every}


def _ramp(text: str, steps: int, name: str, lowest: float) -> float | Ramp:
    from hpcft.md import Ramp

    try:
        values = [float(part) for part in text.split(":")]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or not all(map(math.isfinite, values)):
        raise UserError(f"--{name} is {text}; write a number, or two as START:END")
    if min(values) < lowest:
        raise UserError(f"--{name} is {text}; it must not be below {lowest:g}")
    return values[0] if len(values) == 1 else Ramp(values[0], values[1], steps)


def _run(
    request: MdRequest,
    models: Sequence[Path],
    mean: bool,
    known: Sequence[Atoms] | None,
    device: Device,
    precision: Precision,
    rank: Rank,
) -> None:
    from rich.console import Console

    from hpcft.md import Observe
    from hpcft.md.run import run_md
    from hpcft.md.simulation import together
    from hpcft.md.starts import warnings_of
    from hpcft.models.allocator import keep_freed_memory
    from hpcft.models.committee import Committee
    from hpcft.selection.q_residual import q_observer, space_of_structures

    keep_freed_memory()
    use_threads(rank)
    potential = _load(models, mean, device, precision, rank)
    console = Console(highlight=False)
    if rank.is_first:
        for warning in warnings_of(request.structures, request.dynamics):
            typer.echo(f"hpcft: warning: {warning}", err=True)

    def on_segment(done: int, of: int) -> None:
        if rank.is_first:
            console.print(f"segment {done} of {of}", soft_wrap=True)

    observers: list[Observe] = [potential.observe] if isinstance(potential, Committee) else []
    if known is not None:
        space = space_of_structures(potential, known)
        observers.append(q_observer(potential, space))
        if rank.is_first:
            console.print(space.told, soft_wrap=True)
    observe = together(observers) if observers else None
    trajectory = run_md(request, potential, rank, observe, on_segment)
    if rank.is_first and show_replicas(console, trajectory, request.dynamics):
        raise typer.Exit(1)


def _load(models: Sequence[Path], mean: bool, device: Device, precision: Precision, rank: Rank) -> Potential:
    import torch

    from hpcft.models.committee import Committee
    from hpcft.models.files import load_model
    from hpcft.models.protocol import as_module
    from hpcft.training.distributed import choose_device

    where, dtype = choose_device(rank, device.value), getattr(torch, precision.value)
    members = [load_model(path, dtype=dtype, device=where) for path in models]
    for member in members:
        as_module(member).requires_grad_(False)
    return members[0] if len(members) == 1 else Committee(members, mean=mean)

"""hpcft train: fine-tune a model on files of labels, without a campaign."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from hpcft.cli.relax import Device, Precision
from hpcft.cli.targets import check_run_folder
from hpcft.errors import UserError

if TYPE_CHECKING:
    from hpcft.config.training import TrainingRun
    from hpcft.training.fine_tune import Outcome, Request, Sets
    from hpcft.training.rank import Rank
    from hpcft.training.trainer import Trainer

Paths = list[Path]


class ManyFiles(TyperCommand):
    """A command whose --data, --valid and --committee take several files at once: `--data a.extxyz b.h5`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeated: list[str] = []
        option = None
        for argument in args:
            if argument.startswith("-"):
                option = argument if argument in ("--data", "--valid", "--committee") else None
            elif option is not None and repeated[-1] != option:
                repeated.append(option)
            repeated.append(argument)
        return super().parse_args(ctx, repeated)


def train(
    model_file: Annotated[
        Path, typer.Option("--model", help="hpcft's .pt or MACE's .model.", show_default=False)
    ],
    data: Annotated[
        Paths,
        typer.Option(
            "--data",
            help="Labelled structures, one file or several: extxyz with REF_energy and REF_forces, hpcft's or mace's HDF5.",
            show_default=False,
        ),
    ],
    valid: Annotated[
        Paths,
        typer.Option(
            "--valid", help="The same, never trained on: chooses the best epoch.", show_default=False
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder; started again, it goes on.", show_default=False)
    ],
    config: Annotated[
        Path | None,
        typer.Option("--config", help="YAML with any key of a training (docs/keys.md).", show_default=False),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            help="The foundation's own structures, mixed in against forgetting.", show_default=False
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the data.", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Structures in a batch, over all ranks.", show_default=False)
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At the start.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(min=0, show_default=False)] = None,
    precision: Annotated[Precision | None, typer.Option(show_default=False)] = None,
    device: Annotated[Device, typer.Option(help="auto: a GPU if there is one.")] = Device.auto,
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard", help="Write events to OUTPUT/tensorboard too (pip install tensorboard)."
        ),
    ] = False,
    energy_key: Annotated[str, typer.Option(help="Name of the energy in extxyz.")] = "REF_energy",
    forces_key: Annotated[str, typer.Option(help="Name of the forces in extxyz.")] = "REF_forces",
    stress_key: Annotated[str, typer.Option(help="Name of the stress in extxyz.")] = "REF_stress",
) -> None:
    """Fine-tune a model on labelled structures. On several GPUs or nodes: srun, mpirun or torchrun in front of it.

    Writes model.pt, model.model (for MACECalculator and LAMMPS), metrics.jsonl, training.png and parity.png.
    """
    from hpcft.cluster.ranks import rank_of_launcher

    check_run_folder(output)
    rank = rank_of_launcher()
    options = {
        "replay": None if replay is None else {"file": str(replay.absolute())},
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "precision": None if precision is None else precision.value,
    }
    settings = _settings(config, {name: value for name, value in options.items() if value is not None})
    from hpcft.models.allocator import keep_freed_memory
    from hpcft.training.fine_tune import Request

    keep_freed_memory()
    use_threads(rank)
    keys = {"energy_key": energy_key, "forces_key": forces_key, "stress_key": stress_key}
    request = Request(model_file, data, valid, output, settings, device.value, keys)
    _run(request, rank, tensorboard)


def _settings(config: Path | None, options: Mapping[str, Any]) -> TrainingRun:
    """The file's keys, and over them what the command line says."""
    from hpcft.config.training import TrainingRun
    from hpcft.config.validate import validate
    from hpcft.config.yaml_file import Document, load_yaml

    given = load_yaml(config) if config is not None else Document({}, {})
    merged = {**given.data, **options}
    if "replay" in options and isinstance(given.data.get("replay"), dict):
        merged["replay"] = {**given.data["replay"], **options["replay"]}
    return validate(TrainingRun, Document(merged, given.lines), config or Path("the command line"))


def use_threads(rank: Rank) -> None:
    """As many as are this rank's: OMP_NUM_THREADS, Slurm's allocation, or its share of the cores. More are slower by far."""
    import torch

    told = os.environ.get("OMP_NUM_THREADS") or os.environ.get("SLURM_CPUS_PER_TASK")
    cores = len(os.sched_getaffinity(0)) // (rank.world_size if rank.num_nodes == 1 else 1)
    torch.set_num_threads(int(told) if told and told.isdigit() else max(1, cores))


def _run(request: Request, rank: Rank, tensorboard: bool) -> None:
    from rich.console import Console

    from hpcft.report.training_line import ProgressLine, tensorboard_writer
    from hpcft.training.fine_tune import fine_tune

    announced: list[int] = []
    # Slurm's announcement of the end (--signal=USR2@120) would otherwise be the end.
    signal.signal(signal.SIGUSR2, lambda number, _: announced.append(number))
    if not rank.is_first:
        fine_tune(request, rank)
        return
    write = tensorboard_writer(request.folder / "tensorboard") if tensorboard else None
    if tensorboard and write is None:
        raise UserError(
            "tensorboard is not installed here: pip install tensorboard, or leave --tensorboard out"
        )
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else 140
    with ProgressLine(request.train.epochs, console) as line:

        def on_start(sets: Sets, trainer: Trainer) -> None:
            sizes = ", ".join(f"{len(of)} {name}" for name, of in sets.by_name.items())
            line.say(f"{sizes}; {trainer.steps_per_epoch} steps an epoch, {rank.world_size} ranks")
            for option, error in trainer.scaffold.checked.items():
                line.say(f"{option}: forces within {error:.1e} of the plain model's")
            for path in sorted(_resolved(request.data) & _resolved(request.validation)):
                line.say(
                    f"warning: {path} is training data and validation data; the best epoch is chosen by what was trained on"
                )
            for what in sets.dropped:
                line.say(f"left out: {what}")

        def on_row(row: Mapping[str, Any]) -> None:
            line.show(row)
            if write is not None:
                write(row)

        outcome = fine_tune(request, rank, on_row, on_start, lambda: bool(announced and announced.pop()))
    _show(console, outcome)


def _resolved(paths: Sequence[Path]) -> set[Path]:
    return {path.resolve() for path in paths}


_COLUMNS = (
    ("energy_mae_meV_per_atom", "energy MAE\nmeV/atom", "{:.2f}"),
    ("force_mae_meV_per_A", "force MAE\nmeV/Å", "{:.2f}"),
    ("force_slope", "force\nslope", "{:.3f}"),
)


def _show(console: Any, outcome: Outcome) -> None:
    from rich.table import Table

    table = Table(
        caption=f"after: epoch {outcome.best_epoch} of {outcome.epochs} kept, the best on the validation data",
        caption_justify="left",
    )
    table.add_column("set")
    for _, title, _ in _COLUMNS:
        table.add_column(f"{title}\nbefore", justify="right")
        table.add_column("\n\nafter", justify="right")
    for name, after in outcome.after.items():
        before = outcome.before[name]
        cells = [form.format(side[key]) for key, _, form in _COLUMNS for side in (before, after)]
        table.add_row(name, *cells)
    console.print(table)
    files = [outcome.model] if outcome.exported is None else [outcome.model, outcome.exported]
    console.print(f"model: {', '.join(map(str, files))}", soft_wrap=True)
    console.print(
        f"figures: {outcome.model.with_name('training.png')}, {outcome.model.with_name('parity.png')}",
        soft_wrap=True,
    )

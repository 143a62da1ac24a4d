"""hpcft model: pretrain, import, export, info."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from hpcft.cli.targets import Force, check_model_file, check_writable
from hpcft.errors import UserError

app = typer.Typer(help="Foundation models: make, trust, export, describe.", no_args_is_help=True)

ModelFile = Annotated[
    Path, typer.Argument(help="A model file: hpcft's .pt or MACE's .model.", show_default=False)
]


@app.command()
def pretrain(
    recipe_file: Annotated[Path, typer.Argument(help="The recipe's YAML file.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: NAME.pt beside the recipe.")
    ] = None,
    replay: Annotated[
        int, typer.Option(help="Training structures to keep for replay, as NAME-replay.extxyz.", min=0)
    ] = 64,
    force: Force = False,
) -> None:
    """Make a small foundation model from crystals that a cheap reference labels."""
    from hpcft.config.pretrain import load_recipe

    recipe = load_recipe(recipe_file)
    target = output or recipe_file.with_name(f"{recipe.name}.pt")
    replay_file = target.with_name(f"{target.stem}-replay.extxyz")
    for path in (target, replay_file) if replay else (target,):
        check_writable(path, force, recipe_file)

    import torch

    from hpcft.models.files import save_model
    from hpcft.storage.structures import evenly_spread, write_extxyz
    from hpcft.training.pretrain import pretrain as make

    # More threads than a small model can use make it slower, and another number gives other bits.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    made = make(recipe, typer.echo)
    sha256 = save_model(target, made.potential, {"recipe": recipe.name, **made.validation})
    if replay:
        chosen = [made.training_set[i] for i in evenly_spread(len(made.training_set), replay)]
        write_extxyz(replay_file, chosen)
    typer.echo(
        "on crystals it has not seen: " + ", ".join(f"{k} {v:.3g}" for k, v in made.validation.items())
    )
    typer.echo(f"{target} ({target.stat().st_size / 1e6:.2f} MB), SHA-256 {sha256}")


@app.command("import")
def import_(model_file: ModelFile) -> None:
    """Trust a pickled model file from now on, by its SHA-256. Loading it can run any code: know where it comes from."""
    check_model_file(model_file)
    from hpcft.models.files import load_model, sha256_of
    from hpcft.models.trust import distrust, is_trusted, trust, trust_file

    sha256 = sha256_of(model_file)
    known = is_trusted(sha256)
    trust(sha256, model_file)
    try:
        potential = load_model(model_file)
    except UserError:
        if not known:
            distrust(sha256)
        raise
    typer.echo(f"trusted: SHA-256 {sha256} (recorded in {trust_file()}); {len(potential.elements)} elements")


@app.command()
def export(
    model_file: ModelFile,
    output: Annotated[Path, typer.Argument(help="The .model file to write.")],
    force: Force = False,
) -> None:
    """Write an ordinary MACE file, for MACECalculator and LAMMPS."""
    check_writable(output, force, model_file)
    from hpcft.models.files import export_mace, load_model

    export_mace(load_model(model_file), output)
    typer.echo(f"{output}: use it as MACECalculator(model_paths='{output}')")


@app.command()
def info(model_file: ModelFile) -> None:
    """What a model file is: architecture, elements, cutoff, size, SHA-256, where it comes from."""
    from ase.data import chemical_symbols

    from hpcft.models.files import load_model, read_header, sha256_of
    from hpcft.models.protocol import as_module, dtype_of

    potential = load_model(model_file)
    typer.echo(f"architecture  {potential.architecture}, {dtype_of(potential)}")
    typer.echo(f"elements      {' '.join(chemical_symbols[z] for z in potential.elements)}")
    typer.echo(f"cutoff        {potential.cutoff:g} Å")
    typer.echo(f"parameters    {sum(p.numel() for p in as_module(potential).parameters())}")
    typer.echo(f"SHA-256       {sha256_of(model_file)}")
    try:
        typer.echo(f"provenance    {json.dumps(read_header(model_file)['provenance'])}")
    except UserError:
        typer.echo("provenance    unknown (a pickled MACE file)")

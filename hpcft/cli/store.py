"""hpcft store: import, info, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpcft.cli.targets import Force, check_writable
from hpcft.errors import UserError

if TYPE_CHECKING:
    from hpcft.labelling.reference import Reference
    from hpcft.labelling.store import LabelStore

app = typer.Typer(help="Labels that campaigns share: add your own, count, export.", no_args_is_help=True)

StoreFolder = Annotated[
    Path, typer.Argument(metavar="STORE", help="The folder, as in label.store.", show_default=False)
]
ReferenceFile = Annotated[
    Path | None,
    typer.Option("--reference", help="YAML with the reference's keys (docs/keys.md).", show_default=False),
]
_SHOWN = 20
# The file may be that of `hpcft label`, which says there how to spread the work as well.
_OF_THE_COMMAND_LABEL = ("label", "max_attempts", "max_interruptions")


@app.command("import")
def import_(
    folder: StoreFolder,
    files: Annotated[
        list[Path],
        typer.Argument(
            help="extxyz, ASE database, vasprun.xml, OUTCAR, output of pw.x, ...", show_default=False
        ),
    ],
    reference: Annotated[
        Path,
        typer.Option(
            "--reference",
            help="YAML with the settings that these labels were computed with.",
            show_default=False,
        ),
    ],
    energy_key: Annotated[
        str | None,
        typer.Option(help="Name of the energy; default: REF_energy, or ASE's results.", show_default=False),
    ] = None,
    forces_key: Annotated[str | None, typer.Option(help="Name of the forces.", show_default=False)] = None,
    stress_key: Annotated[str | None, typer.Option(help="Name of the stress.", show_default=False)] = None,
    skip_faulty: Annotated[
        bool,
        typer.Option("--skip-faulty", help="Leave unconverged and broken frames out instead of refusing."),
    ] = False,
) -> None:
    """Take over labels that exist already, so that no campaign computes them again. May be repeated."""
    from hpcft.labelling.imports import import_labels
    from hpcft.labelling.labelled_frame import LabelKeys
    from hpcft.labelling.store import LabelStore

    given = {"energy": energy_key, "forces": forces_key, "stress": stress_key}
    named = {name: key for name, key in given.items() if key is not None}
    keys = LabelKeys(**named) if named else None
    done = import_labels(
        LabelStore(folder), files, load_reference(reference), keys=keys, skip_faulty=skip_faulty
    )
    for line in done.skipped[:_SHOWN]:
        typer.echo(f"left out: {line}")
    if len(done.skipped) > _SHOWN:
        typer.echo(f"left out: {len(done.skipped) - _SHOWN} more")
    typer.echo(
        f"{folder}: {done.num_new} labels imported, {done.num_known} were there already, {len(done.skipped)} left out"
    )


@app.command()
def info(
    folder: StoreFolder,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
) -> None:
    """How many labels a store holds, by which references, and where they come from."""
    from hpcft.labelling.exports import contents

    found = contents(_existing(folder))
    if as_json:
        typer.echo(json.dumps(vars(found), indent=1))
        return
    total = sum(found.labels.values())
    typer.echo(
        f"{folder}: {total} labels and {found.num_relaxations} relaxations in {found.num_shards} shards"
    )
    for name, count in (*sorted(found.labels.items()), *sorted(found.origins.items())):
        typer.echo(f"  {count:>9} {name}")


@app.command()
def export(
    folder: StoreFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .extxyz to write.", show_default=False)],
    reference: ReferenceFile = None,
    force: Force = False,
) -> None:
    """Write the labels, each once, as extended XYZ with REF_energy, REF_forces and REF_stress, which MACE reads."""
    check_writable(output, force, *([] if reference is None else [reference]))
    from hpcft.labelling.exports import labelled_structures
    from hpcft.storage.extxyz import write_extxyz

    wanted = None if reference is None else load_reference(reference)
    structures = list(labelled_structures(_existing(folder), wanted))
    if not structures:
        which = "" if reference is None else f" of the reference in {reference}"
        raise UserError(f"{folder} holds no labels{which}; see hpcft store info {folder}")
    write_extxyz(output, structures)
    typer.echo(
        f"{output}: {len(structures)} structures with REF_energy, REF_forces and, where known, REF_stress"
    )


def load_reference(path: Path) -> Reference:
    """The reference that a YAML file describes; UserError with every problem."""
    from hpcft.config.reference import Reference as Settings
    from hpcft.config.validate import validate
    from hpcft.config.yaml_file import Document, load_yaml
    from hpcft.labelling.reference import reference_from

    given = load_yaml(path)
    own = {key: value for key, value in given.data.items() if key not in _OF_THE_COMMAND_LABEL}
    return reference_from(validate(Settings, Document(own, given.lines), path))


def _existing(folder: Path) -> LabelStore:
    from hpcft.labelling.store import LabelStore

    if not folder.is_dir():
        raise UserError(
            f"there is no label store {folder}; hpcft store import, or a campaign with label.store, makes one"
        )
    return LabelStore(folder)

"""hpcft label: reference labels, or relaxations, of the structures of a file, without a campaign."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpcft.cli.campaign import Check, SiteFile, TakeOver
from hpcft.cli.drive import (
    chosen_site,
    drive,
    drive_and_leave,
    refuse_impossible,
    refuse_without_programs,
    short,
)
from hpcft.cli.labelled import show_labels, showing_what_is_done
from hpcft.errors import UserError
from hpcft.storage.campaign_folder import CampaignFolder

if TYPE_CHECKING:
    from hpcft.config.label_run import LabelRun


def label(
    structures: Annotated[
        Path,
        typer.Argument(
            metavar="IN.extxyz", help="Structures, in any format that ASE reads.", show_default=False
        ),
    ],
    reference: Annotated[
        Path,
        typer.Option(
            help="YAML with the keys of a campaign's section reference, and a section label.",
            show_default=False,
        ),
    ],
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            "-o",
            help="Folder; started again, it goes on. Default: runs/label-IN.",
            show_default=False,
        ),
    ] = None,
    site: SiteFile = None,
    shards: Annotated[
        int | None,
        typer.Option(min=1, help="Tasks over which the structures are spread.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Calculations side by side in one task.", show_default=False)
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="MPI ranks of one calculation.", show_default=False)
    ] = None,
    relax: Annotated[bool, typer.Option("--relax", help="Relax the structures.")] = False,
    fmax: Annotated[
        float | None,
        typer.Option(help="With --relax: eV/Å on each atom at the end; 0.01.", show_default=False),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="With --relax: steps at most; 300.", show_default=False)
    ] = None,
    cell: Annotated[bool, typer.Option("--cell", help="With --relax: the cells relax too.")] = False,
    leave: Annotated[
        bool, typer.Option("--submit", help="Leave it to Slurm, as hpcft submit does with a campaign.")
    ] = False,
    take_over: TakeOver = False,
    check: Check = True,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what would fail, as hpcft check does of a campaign."),
    ] = False,
) -> None:
    """Label every structure of a file with a reference calculator; nothing that is finished is computed again.

    status, logs, resume, submit, retry, cancel, verify and archive take the folder, as they take a campaign's.
    """
    spread = {"shards": shards, "workers": workers, "ranks_per_calculation": ranks}
    wish = {"fmax": fmax, "max_steps": max_steps, "cell": cell or None}
    relaxation = {key: value for key, value in wish.items() if value is not None}
    if relaxation and not relax:
        raise UserError(
            f"--{next(iter(relaxation)).replace('_', '-')} is for relaxations; add --relax, or leave it out"
        )
    if not structures.is_file():
        raise UserError(f"{structures} does not exist or is no file; check the name.")
    name = _name_of(structures)
    known = CampaignFolder((directory or Path("runs") / f"label-{name}").absolute())
    if dry_run:
        run = _settings(name, structures, reference, spread, relaxation if relax else None)
        _look(run, known, site, reference)
        return
    chosen = chosen_site(known, site)
    if leave:
        from hpcft.campaign.detached import require_slurm

        require_slurm(chosen)
    from hpcft.campaign.create_labels import open_or_create_labels

    run = _settings(name, structures, reference, spread, relaxation if relax else None)
    if check and not known.identity.exists():
        refuse_without_programs(run, chosen)
    folder = open_or_create_labels(run, reference, known.root, take_over=take_over)
    if check:
        refuse_impossible(folder, chosen)
    with showing_what_is_done(folder):
        if leave:
            job = drive_and_leave(folder, chosen, take_over)
            if job is not None:
                typer.echo(f"controller job {job} goes on; look with: hpcft status {short(folder.root)}")
                return
        elif not drive(folder, chosen, take_over):
            return
    show_labels(folder)


def _look(run: LabelRun, known: CampaignFolder, site_file: Path | None, reference: Path) -> None:
    from hpcft.campaign.new_folder import refuse_other_settings
    from hpcft.campaign.settings import site_of
    from hpcft.cli.check import examine
    from hpcft.config.site import load_site

    if known.identity.exists():
        refuse_other_settings(known, run, reference)
    site = load_site(site_file) if site_file else site_of(known)
    examine(site, run, known.root, {"site": site_file, "campaign": reference})


def _settings(
    name: str,
    structures: Path,
    reference: Path,
    spread: Mapping[str, int | None],
    relaxation: Mapping[str, Any] | None,
) -> LabelRun:
    """The file's keys, and over them what the command line says."""
    from hpcft.config.label_run import LabelRun, ReferenceFile
    from hpcft.config.validate import validate
    from hpcft.config.yaml_file import Document, load_yaml

    given = load_yaml(reference)
    section = given.data.get("label", {})
    if isinstance(section, dict):
        section = {**section, **{key: value for key, value in spread.items() if value is not None}}
        section["resources"] = _with_cores(section)
    file = validate(ReferenceFile, Document({**given.data, "label": section}, given.lines), reference)
    about = {"name": name, "structures": str(structures.absolute()), "relaxation": relaxation}
    said = file.model_dump(mode="json", include={"label", "max_attempts", "max_interruptions"})
    content = {**about, **said, "reference": file.reference.model_dump(mode="json")}
    return validate(LabelRun, Document(content, {}), Path("the command line"))


def _with_cores(section: Mapping[str, Any]) -> Any:
    """The section's resources, with a core for each process where it does not say how many."""
    resources = section.get("resources", {})
    needed = [section.get(key, 1) for key in ("workers", "ranks_per_calculation")]
    if not isinstance(resources, dict) or not all(isinstance(number, int) for number in needed):
        return resources
    return {"cpus_per_rank": needed[0] * needed[1], **resources}


def _name_of(structures: Path) -> str:
    """From the file's name, as far as the name of a run may have its characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", structures.stem).lstrip("._-")[:64] or "structures"

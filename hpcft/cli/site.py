"""hpcft site init: a first description of the cluster one is on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from hpcft.errors import UserError

app = typer.Typer(help="Describe a cluster.", no_args_is_help=True)


@app.command()
def init(
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the site; default: the cluster's.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write; default: NAME.yaml here.")] = None,
) -> None:
    """Write a first site config from what this cluster says about itself."""
    from hpcft.cluster.draft import draft_site, site_name
    from hpcft.cluster.limits import read_cluster

    if missing := [program for program in ("scontrol", "sinfo") if shutil.which(program) is None]:
        raise UserError(
            f"{' and '.join(missing)} cannot be found on this machine, so there is no Slurm to ask; log in to the cluster, "
            "or run here without a site config"
        )
    cluster = read_cluster()
    name = name or site_name(cluster)
    path = out or Path(f"{name}.yaml")
    if not path.parent.is_dir():
        raise UserError(
            f"there is no folder {path.parent} for {path.name}; make it, or name another file with --out"
        )
    if not _write_once(path, draft_site(cluster, name)):
        raise UserError(f"{path} exists and is left as it is; name another file with --out, or delete it")
    typer.echo(f"{path} written. Look at what is marked as a guess, then: hpcft check --site {path}")


def _write_once(path: Path, text: str) -> bool:
    """Whether the file is new; UserError for a text that is no site, such as one whose name no site may have."""
    from hpcft.config.site import load_site
    from hpcft.storage.atomic import publish_once, temporary_beside

    temporary = temporary_beside(path)
    try:
        temporary.write_text(text)
        load_site(temporary)
        return publish_once(temporary, path)
    except UserError as mistake:
        raise UserError(str(mistake).replace(str(temporary), str(path))) from mistake
    finally:
        temporary.unlink(missing_ok=True)

"""What `hpcft label` has come to, for all commands that show a folder: counts by cause, files, and what to do about failures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from hpcft.cli.drive import short
from hpcft.errors import CampaignStopped
from hpcft.storage.atomic import read_json
from hpcft.storage.campaign_folder import CampaignFolder


@contextmanager
def showing_what_is_done(folder: CampaignFolder) -> Iterator[None]:
    """Labels that are there are shown also where the others have failed; a campaign that stops has its own words."""
    try:
        yield
    except CampaignStopped:
        if folder.kind == "label":
            show_labels(folder)
        raise


def show_labels(folder: CampaignFolder) -> None:
    """The table of what is done and what has failed, as of the last export; nothing before there was one."""
    if not folder.exported.exists():
        return
    from rich.console import Console

    counts = read_json(folder.exported)
    console = Console(highlight=False)
    console.print(_table(counts))
    for path in _files(folder):
        console.print(f"written: {short(path)}", soft_wrap=True, markup=False)
    if counts["suspects"]:
        console.print(f"{counts['suspects']} labels look wrong; suspect in their comment line says why")
    if counts["failed"]:
        console.print(_how_to_try_again(folder), soft_wrap=True, markup=False)


def _how_to_try_again(folder: CampaignFolder) -> str:
    """A run that is finished in spite of failures has nothing in progress, so that resume alone would do nothing."""
    where = short(folder.root)
    [(round_, stage)] = folder.places()
    is_finished = folder.stage(round_, stage).product.exists()
    everything = f"hpcft retry {where} && hpcft resume {where}" if is_finished else f"hpcft resume {where}"
    return (
        f"Try all that has failed again: {everything}\n"
        f"Only some of it, or with other settings: hpcft retry {where} --cause CAUSE --set label.time_min=120, and resume"
    )


def write_and_show(folder: CampaignFolder) -> None:
    """The same for what is done by now: the finished tasks of a run that may be under way."""
    from hpcft.campaign.settings import settings_of
    from hpcft.stages.context import StageContext
    from hpcft.stages.label_export import export

    [(round_, stage)] = folder.places()
    if folder.stage(round_, stage).plan.exists():
        export(StageContext(folder, settings_of(folder), round_, stage))
        show_labels(folder)
    else:
        typer.echo("nothing is done yet: the run has not been planned")


def _table(counts: Mapping[str, Any]) -> Any:
    from rich.table import Table

    rows = {"done": counts["done"]}
    rows |= {f"failed: {cause}": count for cause, count in sorted(counts["failed"].items())}
    rows["not yet"] = counts["structures"] - sum(rows.values())
    table = Table("", "", box=None, pad_edge=False, show_header=False)
    table.columns[1].justify = "right"
    for name, count in rows.items():
        if count or name == "done":
            table.add_row(name, str(count))
    return table


def _files(folder: CampaignFolder) -> Iterator[Path]:
    from hpcft.stages.label_export import FAILED, FRAMES, LABELS, RELAXED

    for name in (LABELS, RELAXED, FRAMES, FAILED):
        if (folder.root / name).exists():
            yield folder.root / name

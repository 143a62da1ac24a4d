"""hpcft archive, verify: a campaign as one file; whether a campaign, such a file or any HDF5 file is whole; repair."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpcft.errors import UserError
from hpcft.storage.campaign_folder import CampaignFolder

if TYPE_CHECKING:
    from hpcft.campaign.verify import Verified
    from hpcft.storage.soundness import Soundness


class Part(StrEnum):
    """What an archive can do without."""

    trajectories = "trajectories"


def archive(
    directory: Annotated[Path, typer.Argument(help="The campaign's folder.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; default: DIR.tar beside the folder.")
    ] = None,
    without: Annotated[
        Part | None, typer.Option(help="Leave this out (of a finished campaign): most of its bytes.")
    ] = None,
) -> None:
    """Make one portable file of a campaign, finished or not, with a checksum of everything in it."""
    from hpcft.campaign.archive import create_archive

    folder = CampaignFolder(directory.absolute())
    target = folder.root.resolve().with_name(f"{folder.root.resolve().name}.tar") if out is None else out
    with _busy(f"writing {target}"):
        done = create_archive(folder, target, without_trajectories=without is Part.trajectories)
    left_out = f", {len(done.left_out)} trajectories left out" if done.left_out else ""
    typer.echo(
        f"{_short(done.path)}: {done.num_files} files, {_size(done.num_bytes)}{left_out}. "
        f"To see whether a copy of it is whole: hpcft verify {_short(done.path)}"
    )


def verify(
    path: Annotated[
        Path,
        typer.Argument(
            help="A campaign's folder, an archive of one, an HDF5 file, or the folder of a run of hpcft md.",
            show_default=False,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
    repair: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="Write what can be proven of a damaged trajectory, or what a run has committed in segments, as a new "
            "trajectory.",
        ),
    ] = None,
) -> None:
    """Check that what hpcft wrote is whole: one line for each problem, exit code 1 if there is any."""
    if not path.exists():
        raise UserError(
            f"there is no {path}; name a campaign's folder, an archive, or an HDF5 file of hpcft's"
        )
    if repair is not None:
        _repair(path, repair, as_json)
        return
    with _busy(f"reading {path}"):
        report = _verified(path)
    if as_json:
        typer.echo(json.dumps({"path": str(path), **report.as_json}, indent=1))
    else:
        for line in (*(f"{file} {text}" for file, text in report.problems), *report.summaries):
            typer.echo(line)
    if report.problems:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Report:
    """What was found, for people and for programs."""

    problems: Sequence[tuple[str, str]]
    summaries: Sequence[str]
    facts: Mapping[str, Any]

    @property
    def as_json(self) -> dict[str, Any]:
        return {**self.facts, "problems": [{"file": file, "text": text} for file, text in self.problems]}


def _verified(path: Path) -> _Report:
    from hpcft.storage.segments import segment_folders
    from hpcft.storage.soundness import check_file, check_folder, hdf5_files, is_hdf5

    if path.is_dir():
        segments = segment_folders(path)
        if (hdf5_files(path) or segments) and not CampaignFolder(path).identity.exists():
            # Segments first: a run that ends meanwhile deletes them when its trajectory is there.
            parts = [part for folder in (*segments, path) for part in check_folder(folder)]
            if not parts:
                raise UserError(
                    f"{path} holds a run that has committed nothing yet, so there is nothing to check"
                )
            return _of_files(parts)
        from hpcft.campaign.verify import verify_campaign

        return _of_campaign(path, verify_campaign(CampaignFolder(path.absolute())))
    if is_hdf5(path):
        return _of_files([check_file(path)])
    from hpcft.campaign.verify_archive import verify_archive

    return _of_campaign(path, verify_archive(path))


def _of_campaign(path: Path, found: Verified) -> _Report:
    problems = [(problem.file, problem.text) for problem in found.problems]
    about = f"{found.num_files} files, {_size(found.num_bytes)}, {found.num_stages} finished stages"
    left_out = f", {found.num_left_out} trajectories left out when it was archived" * bool(found.num_left_out)
    facts = {name: value for name, value in vars(found).items() if name != "problems"}
    return _Report(problems, [f"{path}: {_state(len(problems))} ({about}{left_out})"], facts)


def _of_files(parts: Sequence[Soundness]) -> _Report:
    problems = [problem for part in parts for problem in part.problems.items()]
    summaries = [f"{part.path}: {_state(len(part.problems))} ({_contents(part)})" for part in parts]
    entries = [
        {"path": str(part.path), "kind": part.kind, "num_bytes": part.num_bytes}
        | {"num_segments": part.num_segments, **vars(part.counts), "sound": not part.problems}
        for part in parts
    ]
    return _Report(problems, summaries, {"parts": entries})


def _contents(part: Soundness) -> str:
    counts = part.counts
    segments = part.num_segments
    words = [part.kind if segments is None else f"{_number(segments, 'segment')} committed"]
    if counts.num_replicas is not None:
        words.append(_number(counts.num_replicas, "replica"))
    if counts.num_frames is not None:
        words.append(_number(counts.num_frames, "structure" if part.kind == "structures" else "frame"))
    if counts.last_step is not None:
        words.append(f"up to step {counts.last_step}")
    return ", ".join([*words, _size(part.num_bytes)])


def _state(num_problems: int) -> str:
    return _number(num_problems, "problem") if num_problems else "all is well"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _repair(path: Path, out: Path, as_json: bool) -> None:
    from hpcft.storage.repair import repair
    from hpcft.storage.seal import DamagedFile

    try:
        with _busy(f"reading {path}"):
            done = repair(_to_repair(path, out), out)
    except (
        DamagedFile
    ) as error:  # as other errors of the user's, but 2 means a wrong argument, and this is damage
        typer.echo(f"hpcft: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        facts = {"path": str(out), "num_frames": done.num_frames, "repaired": done.about}
        typer.echo(json.dumps(facts, indent=1))
        return
    typer.echo(f"{out}: {done.num_frames} frames of {path}, each of them proven. {_losses(done.about)}")


def _to_repair(path: Path, out: Path) -> Path:
    """Of the folder of a run the one that holds its segments; all else as it is."""
    from hpcft.storage.segments import segment_files, segment_folders

    if not path.is_dir() or segment_files(path) or not (folders := segment_folders(path)):
        return path
    if len(folders) > 1:
        raise UserError(
            f"{path} holds the segments of {len(folders)} ranks, and a repair makes a file of one's; name one of "
            f"{', '.join(map(str, folders))}"
        )
    if out.absolute().parent.resolve() == path.resolve():
        raise UserError(
            f"{out} would stand in the folder of the run, which takes itself for finished where it finds a trajectory; "
            "name a file in another folder"
        )
    return folders[0]


def _losses(about: Mapping[str, Any]) -> str:
    if "segments_lost" in about:
        lost = about["segments_lost"]
        return f"Lost: {', '.join(lost)}." if lost else "Nothing that was committed is lost."
    frames = {replica: num for replica, num in about["frames_lost"].items() if num != 0}
    lost = [
        f"{'all frames' if num is None else _number(num, 'frame')} of replica {int(replica)}"
        for replica, num in frames.items()
    ]
    lost += [f"the {name}" for name in ("checkpoint", "provenance") if about[name] == "lost"]
    return f"Lost: {', '.join(lost)}." if lost else "Nothing is lost."


def _busy(what: str) -> AbstractContextManager[object]:
    """Shows on a terminal that something goes on; it may be hundreds of gigabytes."""
    from rich.console import Console

    return Console(stderr=True).status(what)


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"

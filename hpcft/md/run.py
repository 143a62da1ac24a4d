"""Molecular dynamics without a campaign: structures and a model in, one trajectory out, on one rank or many.

In the folder: run.json (what was asked for), segments while it runs, and trajectory.h5 in the end; of several ranks each has a
file of its own, rank-NNNN.h5, and trajectory.h5 shows them as one. The same call goes on where it was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from ase import Atoms

from hpcft import __version__
from hpcft.errors import UserError
from hpcft.md.committed import Stretch, run_segments
from hpcft.md.replica import Replica, disturbed, thermal_velocities
from hpcft.md.run_file import RUN_FILE, differing
from hpcft.md.settings import Dynamics, Guards
from hpcft.md.simulation import Observe, Simulation
from hpcft.md.starts import check_starts
from hpcft.models.batch_size import atoms_that_fit
from hpcft.models.protocol import Potential
from hpcft.storage import layout
from hpcft.storage.atomic import read_json, write_json
from hpcft.storage.hdf5 import write_file
from hpcft.storage.trajectory import Trajectory, consolidate, delete_segments
from hpcft.storage.tree import write_attributes, write_tree
from hpcft.training.data import share
from hpcft.training.rank import Rank

TRAJECTORY = "trajectory.h5"
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True)
class MdRequest:
    """What to run: each structure `copies` times, rattled (Å) and strained, with velocities of its own.

    `every`: of velocities and forces, the steps between two frames that have them (multiples of the stretch's `frame_every`).

    `max_atoms` in a batch: left out, what a GPU's memory takes, and on the CPU all. `about` is written into the trajectory, and
    with all else it decides whether a folder holds this very run.
    """

    structures: Sequence[Atoms]
    folder: Path
    stretch: Stretch
    dynamics: Dynamics = field(default_factory=Dynamics)
    guards: Guards = field(default_factory=Guards)
    copies: int = 1
    rattle: float = 0.0
    strain: float = 0.0
    seed: int = 0
    max_atoms: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    every: Mapping[str, int] = field(default_factory=dict)


def run_md(
    request: MdRequest,
    potential: Potential,
    rank: Rank | None = None,
    observe: Observe | None = None,
    on_segment: Callable[[int, int], None] | None = None,
) -> Path:
    """Run to the end and return the trajectory; all ranks call it together, and the first one waits for the others.

    UserError for structures that cannot start (each is named), and for a folder that holds another run.
    """
    rank = rank or Rank()
    check_starts(request.structures, potential.elements, request.dynamics, request.guards)
    num_replicas = len(request.structures) * request.copies
    if num_replicas < rank.world_size:
        raise UserError(f"{num_replicas} replicas cannot feed {rank.world_size} ranks; start fewer")
    _claim(request, rank)
    name = TRAJECTORY if rank.world_size == 1 else _of_rank(rank.rank)
    final = request.folder / name
    segments = request.folder / f"segments-{rank.rank:04d}"
    if not final.exists():
        replicas = _my_replicas(request, rank)
        simulation = Simulation(
            potential,
            replicas,
            request.dynamics,
            request.guards,
            observe,
            max_atoms=request.max_atoms or _room(request, potential),
            keep_last=True,
            every=request.every,
        )
        found = run_segments(segments, simulation, request.stretch, on_segment)
        consolidate(found, final, _provenance(request, rank))
    if segments.exists():
        delete_segments(segments)
        with contextlib.suppress(OSError):  # what was damaged and set aside stays
            segments.rmdir()
    if rank.world_size > 1 and rank.is_first and not (request.folder / TRAJECTORY).exists():
        _join(request, rank)
    return request.folder / TRAJECTORY


def _room(request: MdRequest, potential: Potential) -> int | None:
    return atoms_that_fit(potential, request.structures, stress=request.dynamics.barostat != "none")


def _of_rank(rank: int) -> str:
    return f"rank-{rank:04d}.h5"


def _my_replicas(request: MdRequest, rank: Rank) -> list[Replica]:
    """Those of this rank: shared out by atoms, so that ranks end together. Each has random numbers of its own."""
    everything = [number for number in range(len(request.structures)) for _ in range(request.copies)]
    costs = [len(request.structures[number]) for number in everything]
    replicas = []
    for index in share(costs, rank.rank, rank.world_size):
        random = np.random.default_rng([request.seed, index])
        start = request.structures[everything[index]]
        atoms = disturbed(start, random, rattle=request.rattle, strain=request.strain)
        velocities = thermal_velocities(atoms, request.dynamics.temperature_at(0), random)
        replicas.append(Replica(index, atoms, velocities, random))
    return replicas


def _provenance(request: MdRequest, rank: Rank) -> dict[str, Any]:
    return {
        **request.about,
        "seed": request.seed,
        "hpcft_version": __version__,
        "dynamics": json.dumps(asdict(request.dynamics)),
        "rank": rank.rank,
        "world_size": rank.world_size,
    }


def _claim(request: MdRequest, rank: Rank) -> None:
    """The folder belongs to one run, on one number of ranks; UserError for another's."""
    digest = hashlib.sha256()
    for atoms in request.structures:
        for values in (atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc):
            digest.update(np.ascontiguousarray(values).tobytes())
    ours = {
        "structures_sha256": digest.hexdigest(),
        "dynamics": asdict(request.dynamics),
        "guards": asdict(request.guards),
        "stretch": asdict(request.stretch),
        "start": [request.copies, request.rattle, request.strain, request.seed],
        "batch": request.max_atoms,
        "world_size": rank.world_size,
        **request.about,
    }
    if request.every:
        ours["every"] = dict(request.every)
    ours = json.loads(json.dumps(ours))
    path = request.folder / RUN_FILE
    if path.exists():
        if different := differing(read_json(path), ours):
            raise UserError(
                f"{request.folder} holds another run ({', '.join(different)}); choose another folder, or ask for the run that "
                "it holds. A run cannot be made longer, but its last frames can be the start of a new one (docs/md.md)"
            )
    elif (request.folder / TRAJECTORY).exists():
        raise UserError(f"{request.folder} holds a trajectory of another run; choose another folder")
    elif rank.is_first:
        request.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, ours)


def _join(request: MdRequest, rank: Rank) -> None:
    """One file that shows those of all ranks, which must stay beside it."""
    paths = [request.folder / _of_rank(number) for number in range(rank.world_size)]
    while not all(
        path.exists() for path in paths
    ):  # a rank that died ends all of them: the launcher's business
        time.sleep(_LOOK_EVERY_S)

    def fill(file: Any) -> None:
        checkpoint: dict[str, Any] = {}
        for path in paths:
            with Trajectory(path) as trajectory:
                checkpoint |= trajectory.checkpoint()
                for replica in trajectory.replicas:
                    file[layout.replica_path(replica)] = h5py.ExternalLink(
                        path.name, layout.replica_path(replica)
                    )
        write_tree(file.create_group("checkpoint"), checkpoint)
        write_attributes(file.create_group("provenance"), _provenance(request, rank))

    write_file(request.folder / TRAJECTORY, "trajectory", fill)

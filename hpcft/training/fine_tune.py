"""Fine-tuning of a model on files of labels, without a campaign.

    outcome = fine_tune(Request(Path("foundation.model"), [Path("data.extxyz")], [Path("valid.extxyz")], Path("out")))

In the folder `out`: model.pt (hpcft), model.model (MACE's own format, for MACECalculator and LAMMPS), metrics.jsonl,
training.png, parity.png, and the checkpoints from which the same call goes on after a kill.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols

from hpcft.config.training import TrainingRun
from hpcft.errors import UserError
from hpcft.models.files import export_mace, load_model, save_model, sha256_of
from hpcft.models.protocol import Potential, device_of, dtype_of, evaluate
from hpcft.storage.atomic import write_json, write_text
from hpcft.storage.structures import evenly_spread
from hpcft.training.data import LabelledSet
from hpcft.training.distributed import choose_device, process_group
from hpcft.training.energy_zero import fitted_shifts, shifted, shifts_to
from hpcft.training.from_config import settings_of
from hpcft.training.measure import errors_of
from hpcft.training.rank import Rank
from hpcft.training.settings import TrainingData
from hpcft.training.sources import LabelledSource, OutlierPolicy, open_labelled
from hpcft.training.trainer import Trainer

# Structures of each set that the parity plot shows and that errors before and after are told for, evenly spread.
MOST_SHOWN = 500
# Structures by which the zero of energy is fitted.
_MOST_FITTED = 1000
RUN_FILE = "run.json"


@dataclass(frozen=True)
class Request:
    """What to train and on what. `keys`: names of energy, forces and stress in files that ASE reads."""

    model: Path
    data: Sequence[Path]
    validation: Sequence[Path]
    folder: Path
    train: TrainingRun = field(default_factory=TrainingRun)
    device: str = "auto"
    keys: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sets:
    """The labelled structures, read lazily; what was left out as an outlier is named in `dropped`."""

    train: LabelledSource
    validation: LabelledSource
    replay: LabelledSource | None

    @property
    def dropped(self) -> list[str]:
        return [what for source in self.by_name.values() for what in source.dropped]

    @property
    def by_name(self) -> dict[str, LabelledSource]:
        found = {"train": self.train, "validation": self.validation}
        return found if self.replay is None else {**found, "replay": self.replay}


@dataclass(frozen=True)
class Outcome:
    """Errors of each set (`errors_of`) with the right zero of energy, and after; epochs run, the best, files written."""

    before: Mapping[str, Mapping[str, float]]
    after: Mapping[str, Mapping[str, float]]
    epochs: int
    best_epoch: int
    model: Path
    exported: Path | None
    dropped: Sequence[str]


def open_sets(request: Request, elements: Sequence[int], world_size: int) -> Sets:
    """All labels, checked before any GPU is held. UserError for data that cannot be trained on, by this many ranks."""
    policy = OutlierPolicy(max_force=request.train.max_force, max_share=request.train.max_outliers)

    def opened(paths: Sequence[Path]) -> LabelledSource:
        source = open_labelled(paths, outliers=policy, **request.keys)
        if unknown := sorted(source.elements - set(elements)):
            names = ", ".join(chemical_symbols[number] for number in unknown)
            raise UserError(
                f"{', '.join(map(str, paths))} hold {names}, which the model does not know; leave these structures out, or "
                "use another model (hpcft model info shows its elements)"
            )
        return source

    train = request.train
    if not request.validation:
        raise UserError(
            "no validation data: name files that are not trained on, by which the best epoch is chosen"
        )
    if train.batch_size < world_size:
        raise UserError(
            f"a batch of {train.batch_size} leaves some of the {world_size} ranks without a structure; raise batch_size, or "
            "start fewer ranks"
        )
    replay = None if train.replay is None else opened([train.replay.file])
    sets = Sets(opened(request.data), opened(request.validation), replay)
    if len(sets.train) < world_size:
        raise UserError(f"{len(sets.train)} structures cannot feed {world_size} ranks; start fewer")
    return sets


def fine_tune(
    request: Request,
    rank: Rank | None = None,
    on_row: Callable[[Mapping[str, Any]], None] | None = None,
    on_start: Callable[[Sets, Trainer], None] | None = None,
    save_now: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train, from the checkpoints in the folder if there are any, and write what the folder holds in the end.

    All ranks call it together. A checkpoint is written whenever `save_now`, asked after each step, says so. UserError for bad
    input and for a folder that holds another training.
    """
    rank, folder = rank or Rank(), request.folder
    folder.mkdir(parents=True, exist_ok=True)
    device = choose_device(rank, request.device)
    potential = load_model(request.model, dtype=getattr(torch, request.train.precision), device=device)
    sets = open_sets(request, potential.elements, rank.world_size)
    _claim(request, rank)
    with process_group(rank, folder, device):
        shifts = _shifts(request.train, potential, sets.train)
        data = _training_data(potential, sets, shifts)
        shown = {name: _some(of, MOST_SHOWN) for name, of in _labelled_sets(data).items()}
        potential.shift_energies(shifts)
        settings = settings_of(request.train, seed=(request.train.seed,))
        weights = settings.weights.at(settings.epochs)

        def errors() -> dict[str, dict[str, float]]:
            return {
                name: errors_of(potential, of, rank, weights=weights, huber=settings.huber)
                for name, of in shown.items()
            }

        before = errors()
        trainer = Trainer(potential, data, settings, rank)
        if on_start is not None:
            on_start(sets, trainer)
        log = _log(folder, trainer, rank, on_row)
        history = trainer.run(folder, log, log, save_now)
        after = errors()
    best = int(trainer.best.get("epoch", len(history)))
    model, exported = folder / "model.pt", None
    if rank.is_first:
        about = {"start_sha256": sha256_of(request.model), "labels": len(sets.train), "best_epoch": best}
        save_model(model, potential, about)
        if potential.architecture == "mace":
            exported = folder / "model.model"
            export_mace(potential, exported)
        _write_figures(folder, request.model.stem, trainer, potential, shown)
        write_json(folder / "errors.json", {"before": before, "after": after})
    return Outcome(before, after, len(history), best, model, exported, sets.dropped)


def _claim(request: Request, rank: Rank) -> None:
    """The folder belongs to one training: the same model, data and settings, or none."""
    files = [request.model, *request.data, *request.validation]
    files += [] if request.train.replay is None else [request.train.replay.file]
    ours = {
        "model_sha256": sha256_of(request.model),
        "files": [str(path.absolute()) for path in files],
        "sizes": [_size(path) for path in files],
        "settings": json.loads(request.train.model_dump_json()),
    }
    path = request.folder / RUN_FILE
    if path.exists():
        theirs = json.loads(path.read_text())
        if different := [name for name in ours if ours[name] != theirs.get(name)]:
            raise UserError(
                f"{request.folder} holds another training (its {' and '.join(different)} differ; see {path.name}); choose "
                "another folder, or start the training that it holds"
            )
    elif any(request.folder.glob("checkpoint-*.pt")) or (request.folder / "model.pt").exists():
        # Every rank says so: one that went on would wait for the others until its patience ends.
        raise UserError(f"{request.folder} holds files of another training; choose another folder")
    elif rank.is_first:
        write_json(path, ours)


def _size(path: Path) -> str:
    """Enough to tell that a file is another one, without reading terabytes."""
    if path.is_dir():
        return f"{len(list(path.iterdir()))} files"
    with path.open("rb") as stream:
        return f"{path.stat().st_size} bytes, {hashlib.sha256(stream.read(2**20)).hexdigest()[:16]}"


def _shifts(train: TrainingRun, potential: Potential, source: LabelledSource) -> dict[int, float]:
    if train.energy_zero == "keep":
        return {}
    if train.energy_zero == "fit":
        return fitted_shifts(potential, [source[i] for i in evenly_spread(len(source), _MOST_FITTED)])
    return shifts_to(potential, dict(train.energy_zero))


def _training_data(potential: Potential, sets: Sets, shifts: Mapping[int, float]) -> TrainingData:
    def labelled(source: LabelledSource, name: str) -> LabelledSet:
        dtype = dtype_of(potential)
        return LabelledSet(source, potential.cutoff, dtype, name, num_atoms=source.num_atoms_each)

    replay = None
    if sets.replay is not None and not shifts:
        replay = labelled(sets.replay, "replay")
    elif sets.replay is not None:  # its energies have the foundation's zero
        replay = LabelledSet(shifted(sets.replay, shifts), potential.cutoff, dtype_of(potential), "replay")
    return TrainingData(labelled(sets.train, "the data"), replay, (), labelled(sets.validation, "validation"))


def _labelled_sets(data: TrainingData) -> dict[str, LabelledSet]:
    found = {"train": data.labels, "validation": data.validation, "replay": data.replay}
    return {name: of for name, of in found.items() if of is not None}


def _some(data: LabelledSet, most: int) -> LabelledSet:
    if len(data) <= most:
        return data
    return data.subset(evenly_spread(len(data), most))


def _log(
    folder: Path, trainer: Trainer, rank: Rank, on_row: Callable[[Mapping[str, Any]], None] | None
) -> Callable[[Mapping[str, Any]], None]:
    def write(row: Mapping[str, Any]) -> None:
        if rank.is_first:
            write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in trainer.log()))
            if on_row is not None:
                on_row(row)

    return write


def _write_figures(
    folder: Path, name: str, trainer: Trainer, potential: Potential, sets: Mapping[str, LabelledSet]
) -> None:
    from hpcft.report.parity import write_parity
    from hpcft.report.training import write_learning_curves

    write_learning_curves(trainer.log(), folder / "training.png", f"fine-tuning of {name}")
    stress = any(row.get("valid/stress_mae_meV_per_A3") for row in trainer.history)
    groups = {which: parity(potential, data, stress=stress) for which, data in sets.items()}
    write_parity(groups, folder / "parity.png", f"{name}, fine-tuned")


def parity(potential: Potential, data: LabelledSet, *, stress: bool = False) -> dict[str, Any]:
    """Reference and prediction of energy per atom (eV/atom), forces (eV/Å) and, on demand, stress (eV/Å^3)."""
    from hpcft.report.parity import Parity

    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"energy": [], "forces": [], "stress": []}
    for index in range(len(data)):
        batch = data.batch([index], device_of(potential))
        result, labels = evaluate(potential, batch.graph, stress=stress), batch.labels
        count = batch.graph.num_atoms_b
        pairs["energy"].append((_array(labels.energies_b / count), _array(result.energies_b / count)))
        pairs["forces"].append((_array(labels.forces_n3), _array(result.forces_n3)))
        if result.stress_b33 is not None and bool(labels.stress_known_b.all()):
            pairs["stress"].append((_array(labels.stress_b33), _array(result.stress_b33)))
    return {
        name: Parity(*(np.concatenate(side) for side in zip(*found, strict=True)))
        for name, found in pairs.items()
        if found
    }


def _array(tensor: torch.Tensor) -> np.ndarray:
    values: np.ndarray = tensor.detach().cpu().double().numpy().ravel()
    return values

"""A training that was killed goes on as if it had not been: same weights, same history, bit for bit.

Run as a script, this file trains and kills itself: `python test_training_resume.py FOLDER EPOCH`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk

from hpcft.models.morse import MorsePotential
from hpcft.relaxation import RelaxationPair
from hpcft.training.checkpoint import Checkpoint, load_latest, save_checkpoint
from hpcft.training.data import LabelledSet
from hpcft.training.trainer import BpttSettings, ReplaySettings, Trainer, TrainingData, TrainingSettings

EPOCHS = 6
State = tuple[dict[str, np.ndarray], list[dict[str, float]]]


def trainer(checkpoint_every: int = 1) -> Trainer:
    random = np.random.default_rng(0)
    structures = []
    for _ in range(5):
        atoms = bulk("Cu", a=3.7, cubic=True)
        atoms.positions += random.normal(0, 0.1, (4, 3))
        atoms.info["REF_energy"] = random.normal()
        atoms.arrays["REF_forces"] = random.normal(size=(4, 3))
        structures.append(atoms)
    potential = MorsePotential([29], cutoff=4.0)  # single precision, as in a campaign
    labels = LabelledSet(structures, potential.cutoff, torch.float32)
    data = TrainingData(labels, labels, [RelaxationPair(structures[0], structures[1])])
    settings = TrainingSettings(
        EPOCHS,
        batch_size=2,
        learning_rate=0.02,
        replay=ReplaySettings(batch_size=2),
        relaxation=BpttSettings(weight=0.1, every=2, steps=2),
        checkpoint_every_epochs=checkpoint_every,
    )
    return Trainer(potential, data, settings)


def train(folder: Path, checkpoint_every: int = 1) -> State:
    run = trainer(checkpoint_every)
    history = run.run(folder)
    return {
        name: p.detach().numpy().copy() for name, p in run.objective.potential.named_parameters()
    }, history


def assert_same(a: State, b: State) -> None:
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys()
    for name, values in a[0].items():
        assert values.tobytes() == b[0][name].tobytes(), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> State:
    return train(tmp_path_factory.mktemp("uninterrupted"))


def test_a_killed_training_goes_on_bit_for_bit_as_if_nothing_had_happened(
    tmp_path: Path, uninterrupted: State
) -> None:
    process = subprocess.run([sys.executable, __file__, str(tmp_path), "3"], check=False, timeout=120)
    assert process.returncode == -signal.SIGKILL
    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None and checkpoint.epoch == 2  # the third epoch had no checkpoint yet
    assert_same(train(tmp_path, 2), uninterrupted)


class Killed(Exception):
    """Stands for a kill where the process has to live on to look at the result."""


@pytest.mark.parametrize("epoch", range(1, EPOCHS))
def test_it_does_not_matter_after_which_epoch_a_training_stops(
    tmp_path: Path, uninterrupted: State, epoch: int
) -> None:
    def stop(row: dict[str, float]) -> None:
        if row["epoch"] == epoch:
            raise Killed

    with pytest.raises(Killed):
        trainer().run(tmp_path, stop)
    seen: list[float] = []
    second = trainer()
    second.run(tmp_path, lambda row: seen.append(row["epoch"]))
    assert seen == list(range(epoch + 1, EPOCHS + 1))  # a finished epoch is never computed twice
    assert_same(train(tmp_path), uninterrupted)


def test_a_finished_training_is_not_trained_again(tmp_path: Path, uninterrupted: State) -> None:
    train(tmp_path)
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert_same(train(tmp_path), uninterrupted)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scribble(path: Path) -> None:
    path.write_bytes(b"not a checkpoint\n" * 50)


def flip_a_bit_of_the_weights(path: Path) -> None:
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        (record,) = [info for info in archive.infolist() if info.filename.endswith("/data/0")]
    offset = record.header_offset
    name_length, extra_length = (
        content[offset + 26],
        int.from_bytes(content[offset + 28 : offset + 30], "little"),
    )
    content[offset + 30 + name_length + extra_length] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, empty, scribble, flip_a_bit_of_the_weights])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, uninterrupted: State, damage: Callable[[Path], None]
) -> None:
    def stop(row: dict[str, float]) -> None:
        if row["epoch"] == 4:
            raise Killed

    with pytest.raises(Killed):
        trainer().run(tmp_path, stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-000003.pt",
        "checkpoint-000004.pt",
    ]
    damage(tmp_path / "checkpoint-000004.pt")
    (tmp_path / ".tmp-0123456789abcdef-checkpoint-000005.pt").write_bytes(b"left over")
    found = load_latest(tmp_path)
    assert found is not None and found.epoch == 3
    assert_same(train(tmp_path), uninterrupted)


def test_the_two_newest_checkpoints_are_kept_and_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best.pt").write_bytes(b"mine")
    for epoch in (1, 2, 9, 10, 100):
        save_checkpoint(tmp_path, Checkpoint(epoch, {}, {}, [{"loss": float(epoch)}]))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-000010.pt", "checkpoint-000100.pt", "checkpoint-best.pt"]
    found = load_latest(tmp_path)
    assert found is not None and (found.epoch, found.history) == (100, [{"loss": 100.0}])


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None


def main(folder: Path, epoch: int) -> None:
    def kill(row: dict[str, float]) -> None:
        if row["epoch"] == epoch:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer(checkpoint_every=2).run(folder, kill)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

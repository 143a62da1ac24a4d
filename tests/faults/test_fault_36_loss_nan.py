"""Fault 36: numbers that are none send a training back to its last good checkpoint on a lower learning rate; then it fails.

Run as a script, this file is one rank of a training: `python test_fault_36_loss_nan.py CASES RANK WORLD_SIZE FOLDER`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import bulk
from one_stage import campaign_before, write_labels
from tiny import CAMPAIGN, hpcft

from hpcft.models.graph import build_graph
from hpcft.models.morse import MorsePotential
from hpcft.models.protocol import evaluate
from hpcft.training.checkpoint import load_latest
from hpcft.training.data import LabelledSet
from hpcft.training.rank import Rank
from hpcft.training.trainer import MAX_SETBACKS, NotFinite, Trainer, TrainingData, TrainingSettings

EPOCHS = 6
# On this rate a step throws the bond length out to where forces overflow; an eighth of it is sane.
STEEP = 4.0


def labelled(absurd: float | None = None) -> list[Atoms]:
    """Four cells with labels of a teacher; `absurd` becomes one force of the last one."""
    teacher = MorsePotential([29], cutoff=4.0, depth=0.4, length=2.8).double()
    found = []
    for number in range(4):
        atoms = bulk("Cu", a=3.6, cubic=True)
        atoms.rattle(0.15, seed=number)
        result = evaluate(teacher, build_graph([atoms], teacher.cutoff))
        atoms.info["REF_energy"] = float(result.energies_b[0])
        atoms.arrays["REF_forces"] = result.forces_n3.numpy().copy()
        found.append(atoms)
    if absurd is not None:
        found[3].arrays["REF_forces"][0] = [absurd, 0.0, 0.0]
    return found


def without_speed(run: Trainer) -> list[dict[str, Any]]:
    """The log without times and memory, which differ from run to run."""
    return [
        {key: value for key, value in row.items() if key not in (run.speed[-1] if run.speed else {})}
        for row in run.log()
    ]


def trainer(
    rate: float, absurd: float | None = None, rank: Rank | None = None, checkpoint_every: int = 1
) -> Trainer:
    student = MorsePotential([29], cutoff=4.0, depth=0.3, length=2.5).double()
    data = TrainingData(LabelledSet(labelled(absurd), 4.0, torch.float64))
    settings = TrainingSettings(
        EPOCHS, batch_size=2, learning_rate=rate, checkpoint_every_epochs=checkpoint_every
    )
    return Trainer(student, data, settings, rank)


def weights(run: Trainer) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in run.objective.potential.parameters()]


def test_a_training_that_diverges_goes_on_as_if_its_rate_had_been_lower_from_the_start(
    tmp_path: Path,
) -> None:
    """Guards the way back: weights, optimiser and history of the good checkpoint, and a rate lower by exact halves."""
    (tmp_path / "sane").mkdir()
    (tmp_path / "steep").mkdir()
    sane, steep = trainer(STEEP / 2**MAX_SETBACKS), trainer(STEEP)
    expected = sane.run(tmp_path / "sane")
    assert steep.run(tmp_path / "steep") == expected
    assert weights(steep) == weights(sane)
    assert not sane.setbacks
    assert [s["learning_rate_factor"] for s in steep.setbacks] == [0.5, 0.25, 0.125]
    first, *_, last = steep.setbacks
    assert first["why"].startswith("the loss is inf at step 1 on structures [")
    assert last["why"].startswith("the error of the forces in labels/forces is 7.97e+04 eV/Å at step 1")


def test_a_force_label_of_a_million_ends_the_training_with_its_name_and_the_last_good_weights(
    tmp_path: Path,
) -> None:
    """Guards the bound on setbacks, and the error that names the label: no rate would ever fit it."""
    run = trainer(0.01, absurd=1e6)
    setbacks: list[dict[str, Any]] = []
    before = weights(run)
    with pytest.raises(NotFinite) as told:
        run.run(tmp_path, on_setback=setbacks.append)
    assert len(setbacks) == MAX_SETBACKS
    message = str(told.value)
    assert f"Going back {MAX_SETBACKS} times, to 0.125 of the learning rate, has not helped" in message
    assert "structure 3 of the labels has a force of 1e+06 eV/Å" in message
    assert weights(run) == before
    assert load_latest(tmp_path) is None


def test_weights_that_are_no_numbers_never_reach_a_checkpoint(tmp_path: Path) -> None:
    """Guards the last step of an epoch, after which no loss would tell."""
    run = trainer(0.01)
    number = 0

    def spoil(*_: object) -> None:
        nonlocal number
        number += 1
        if number >= 6 and number % 2 == 0:  # the last step of the third epoch, whenever it is tried
            with torch.no_grad():
                run.parameters[0].fill_(math.nan)

    run.optimiser.register_step_post_hook(spoil)
    with pytest.raises(NotFinite, match="weights are not finite at the end of epoch 3"):
        run.run(tmp_path)
    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None and checkpoint.epoch == 2
    assert all(torch.isfinite(value).all() for value in checkpoint.model.values())
    assert all(torch.isfinite(p).all() for p in run.parameters)


CASES = {"steep": (STEEP, None), "absurd": (0.01, 1e6)}


@pytest.mark.parametrize("epoch", [3, *(pytest.param(e, marks=pytest.mark.nightly) for e in (0, 1, 2))])
def test_a_training_killed_after_a_setback_ends_in_the_same_weights_history_and_log(
    epoch: int, tmp_path: Path
) -> None:
    """Guards that setbacks are part of the checkpoint; before the next one they are met again (epoch 0: at the setback)."""
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    undisturbed = trainer(STEEP, checkpoint_every=2)
    expected = undisturbed.run(tmp_path / "undisturbed")
    argv = [sys.executable, "-W", "ignore", __file__, "steep", "0", "1", str(tmp_path / "killed")]
    killed = subprocess.run([*argv, str(epoch)], check=False)
    assert killed.returncode == -signal.SIGKILL
    again = trainer(STEEP, checkpoint_every=2)
    assert again.run(tmp_path / "killed") == expected
    assert weights(again) == weights(undisturbed)
    assert without_speed(again) == without_speed(undisturbed)
    assert sum("setback" in row for row in again.log()) == MAX_SETBACKS


def test_all_ranks_go_back_together_and_end_alike(tmp_path: Path) -> None:
    """Guards the agreement of ranks: the bad structure is in one rank's share only, and none waits for another."""
    argv = [sys.executable, "-W", "ignore", __file__, ",".join(CASES)]
    ranks = [subprocess.Popen([*argv, str(rank), "2", str(tmp_path)]) for rank in range(2)]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    for case, (rate, absurd) in CASES.items():
        (tmp_path / f"{case}-alone").mkdir()
        alone = trainer(rate, absurd)
        ended = run_and_tell(alone, tmp_path / f"{case}-alone")
        for rank in range(2):
            told = json.loads((tmp_path / case / f"rank-{rank}.json").read_text())
            assert told["setbacks"] == len(alone.setbacks) == MAX_SETBACKS
            assert told["error"][:40] == ended[:40]
            assert told["length"] == pytest.approx(float(alone.parameters[2].detach()), rel=1e-9)


def run_and_tell(run: Trainer, folder: Path, **callbacks: Any) -> str:
    try:
        run.run(folder, **callbacks)
    except NotFinite as error:
        return str(error)
    return ""


def test_a_campaign_stops_with_the_label_that_broke_its_training(tmp_path: Path) -> None:
    """Guards the way of the error from a rank through the records to the user, and the note of each setback."""
    train = {key: value for key, value in CAMPAIGN["train"].items() if key != "relaxation"}
    folder = campaign_before(tmp_path, 1, "train", {"rounds": 1, "train": {**train, "ranks": 1}})
    write_labels(folder.stage(1, "label"), labelled(absurd=1e6))
    manager = hpcft("resume", folder.root, cwd=tmp_path)
    output, _ = manager.communicate(timeout=300)
    assert manager.returncode == 1, output
    words = " ".join(output.split())
    assert "structure 3 of the labels (frame 3 of round 1) has a force of 1e+06 eV/Å" in words
    assert "failed after 1 attempt." in words  # the same input would fail again
    log = folder.stage(1, "train").task(0).path / "metrics.jsonl"
    assert [json.loads(line)["setback"] for line in log.read_text().splitlines()] == [1, 2, 3]


def main(cases: str, rank: int, world_size: int, folder: Path, kill_after: int | None) -> None:
    from hpcft.training.distributed import process_group

    def kill(row: dict[str, Any]) -> None:
        if row.get("epoch", 0) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    me = Rank(rank, world_size, rank)
    with process_group(me, folder, torch.device("cpu"), timeout_s=120):
        for case in cases.split(","):
            here = folder if kill_after is not None else folder / case
            here.mkdir(exist_ok=True)
            run = trainer(*CASES[case], me, 1 if kill_after is None else 2)
            error = run_and_tell(run, here, on_epoch=kill, on_setback=kill)
            length = float(run.parameters[2].detach())
            told = {"setbacks": len(run.setbacks), "error": error, "length": length}
            (here / f"rank-{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    kill_after = int(sys.argv[5]) if len(sys.argv) > 5 else None
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), kill_after)

"""A replica that leaves what the model has learned from waits for the next round, and goes on from there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from ase.build import bulk
from one_stage import campaign_before, drive_to_end, write_labels
from tiny import CAMPAIGN

from hpcft.campaign.settings import settings_of
from hpcft.md import AT_STOP
from hpcft.selection.q_residual import Q_RESIDUAL
from hpcft.stages import explore
from hpcft.stages.context import StageContext
from hpcft.storage.atomic import read_json
from hpcft.storage.trajectory import Trajectory

LIMIT = 1.5


def test_a_replica_beyond_the_labels_is_stopped_and_goes_on_from_there_in_the_next_round(
    tmp_path: Path,
) -> None:
    """Fails if the labels of earlier rounds are not what is known, or if what was found is left behind again."""
    settings = {**CAMPAIGN["explore"], "tasks": 1, "temperature_K": 1500, "max_q_residual": LIMIT}
    folder = campaign_before(tmp_path, 2, "explore", {"rounds": 3, "explore": settings})
    labels = []
    for seed in range(4):
        labels.append(bulk("Cu", "fcc", a=3.6, cubic=True).repeat((2, 2, 1)))
        labels[-1].rattle(0.05, seed=seed)
        labels[-1].info["REF_energy"] = 0.0
        labels[-1].arrays["REF_forces"] = np.zeros((16, 3))
    write_labels(folder.stage(1, "label"), labels)
    model = folder.stage(1, "train").task(0).path / "model.pt"
    model.parent.mkdir(parents=True)
    shutil.copy(folder.inputs / "foundation.pt", model)
    drive_to_end(folder, 2, "explore")

    stopped = read_json(folder.stage(2, "explore").product)["stopped"]
    assert "q_residual" in stopped.values()
    with Trajectory(folder.stage(2, "explore").task(0).path / "trajectory.h5") as trajectory:
        states = trajectory.checkpoint()
        for replica in trajectory.replicas:
            residuals = trajectory.array(replica, Q_RESIDUAL)
            beyond = residuals > LIMIT
            assert beyond.tolist() == trajectory.array(replica, AT_STOP).tolist()
            assert beyond[-1] == (stopped.get(str(replica)) == "q_residual")
    context = StageContext(folder, settings_of(folder), 3, "explore")
    for replica in explore._start(context, [0, 1, 2, 3]):
        assert replica.stopped == ""
        assert replica.step == int(states[f"{replica.index:04d}"]["step"])
        np.testing.assert_array_equal(replica.atoms.positions, states[f"{replica.index:04d}"]["positions"])

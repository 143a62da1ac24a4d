"""Fault 35: a replica that explodes at 10,000 K stops, its last sane frames are kept and flagged, and the others go on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from one_stage import campaign_before, drive_to_end
from tiny import CAMPAIGN

from hpcft.md import AT_STOP
from hpcft.storage.atomic import read_json
from hpcft.storage.campaign_folder import StageFolder
from hpcft.storage.trajectory import Trajectory

STEPS, FRAME_EVERY, LIMIT_K = 24, 2, 14_000
EXPLODED, COLLAPSED = 2, 3


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory) -> StageFolder:
    """The stage explore of round 1 as the manager and a job of its own have run it, all four replicas in one batch.

    Replica 2 exceeds the limit at step 8; replica 3 begins with two atoms in one place.
    """
    base = tmp_path_factory.mktemp("explore")
    explore = {
        **CAMPAIGN["explore"],
        "tasks": 1,
        "temperature_K": 10_000,
        "max_temperature_K": LIMIT_K,
        "timestep": 1,
        "steps": STEPS,
        "frame_every": FRAME_EVERY,
    }
    changes: dict[str, Any] = {"rounds": 1, "explore": explore, "probe": {"steps": 4, "frames": 1}}
    folder = campaign_before(base, 1, "explore", changes, spoil)
    drive_to_end(folder, 1, "explore")
    return folder.stage(1, "explore")


def spoil(structures: list[Any]) -> None:
    structures[COLLAPSED].positions[1] = structures[COLLAPSED].positions[0]


def test_each_replica_that_explodes_is_named_with_its_cause(explored: StageFolder) -> None:
    """Guards the guards: fails if a temperature of 14,000 K or forces that are no numbers pass for dynamics."""
    product = read_json(explored.product)
    assert product["stopped"].keys() == {str(EXPLODED), str(COLLAPSED)}
    assert product["stopped"][str(EXPLODED)] == "temperature"
    assert product["stopped"][str(COLLAPSED)] != ""


def test_its_last_sane_frames_are_kept_and_flagged_and_the_others_go_on_to_the_end(
    explored: StageFolder,
) -> None:
    """Guards the batch: fails if one replica ends or spoils the others, or if a frame beyond the guards is kept."""
    frames, marks = {}, {}
    with Trajectory(explored.task(0).path / "trajectory.h5") as trajectory:
        checkpoint = trajectory.checkpoint()
        for replica in trajectory.replicas:
            frames[replica] = list(trajectory.array(replica, "step"))
            marks[replica] = [
                step
                for step, last in zip(frames[replica], trajectory.array(replica, AT_STOP), strict=True)
                if last
            ]
            assert (np.asarray(trajectory.array(replica, "temperature_K")) < LIMIT_K).all()
            for name in ("positions", "velocities", "forces", "potential_energy"):
                assert np.isfinite(np.asarray(trajectory.array(replica, name))).all(), (replica, name)
    whole = list(range(FRAME_EVERY, STEPS + 1, FRAME_EVERY))
    stopped_at = int(checkpoint[f"{EXPLODED:04d}"]["step"])
    assert FRAME_EVERY < stopped_at < STEPS
    until = sorted({*(step for step in whole if step < stopped_at), stopped_at - 1})
    assert frames == {0: whole, 1: whole, EXPLODED: until}
    assert marks == {0: [], 1: [], EXPLODED: [stopped_at - 1]}
    flags = {int(name): str(state["stopped"]) for name, state in checkpoint.items()}
    assert [bool(flags[replica]) for replica in range(4)] == [False, False, True, True]

"""Kill -9 of the manager, of tasks, of everything, at random moments: the campaign ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import (
    CAMPAIGN,
    arrays_of,
    assert_same_results,
    hpcft,
    hpcft_to_end,
    kill,
    processes_of,
    write_campaign,
)

CHANGES = {
    "rounds": 1,
    "reference": {"calculator": "calculators.SlowEMT", "elements": ["Cu"], "time_limit_s": 60},
    "train": {**CAMPAIGN["train"], "epochs": 8},
}
KILLS = 4


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, float]]:
    """Campaign file, the folder of a run that nobody disturbed, and how long it took."""
    base = tmp_path_factory.mktemp("killed")
    campaign = write_campaign(base / "inputs", CHANGES)
    with pytest.MonkeyPatch.context() as patch:
        _environment(patch, base / "calls-undisturbed")
        start = time.monotonic()
        hpcft_to_end("run", campaign, "--dir", base / "undisturbed", cwd=base)
        yield campaign, base / "undisturbed", time.monotonic() - start


def _environment(patch: pytest.MonkeyPatch, calls: Path) -> None:
    patch.setenv("PYTHONPATH", str(Path(__file__).parent))
    patch.setenv("HPCFT_TEST_CALLS", str(calls))


def _kill_something(root: Path, manager: int, chance: random.Random) -> str:
    """Kill the manager, one random process of the campaign, or all of them."""
    what = chance.choice(["manager", "one process", "everything"])
    victims = processes_of(root)
    if what == "manager":
        kill([manager])
    elif what == "one process" and victims:
        kill([chance.choice(victims)])
    else:
        kill(victims)
    return what


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 20))]
)
def test_a_campaign_killed_at_random_moments_ends_with_the_same_result_and_repeats_nothing_finished(
    seed: int, undisturbed: tuple[Path, Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign, expected, duration = undisturbed
    _environment(monkeypatch, tmp_path / "calls")
    root = tmp_path / "disturbed"
    chance = random.Random(seed)
    for _ in range(KILLS):
        started = (root / "campaign.json").exists()
        arguments = ("resume", root) if started else ("run", campaign, "--dir", root)
        with (tmp_path / "log").open("a") as log:
            process = hpcft(*arguments, cwd=tmp_path, output=log)
        time.sleep(chance.uniform(0.5, duration / 2.5))
        if _kill_something(root, process.pid, chance) == "one process" and process.poll() is None:
            time.sleep(chance.uniform(0.0, 3.0))
            kill([process.pid])  # the next turn is a new manager's; what still runs is its to find
        process.wait()
    hpcft_to_end("resume", root, cwd=tmp_path)

    assert_same_results(expected, root)
    _assert_no_label_was_paid_for_twice(root, tmp_path / "calls", KILLS)
    _assert_no_epoch_was_repeated(root, int(CHANGES["train"]["epochs"]))


def _assert_no_label_was_paid_for_twice(root: Path, calls: Path, kills: int) -> None:
    """Each label's energy was computed once, but for those in flight when a kill came: one for each of two shards."""
    counts = Counter(
        float(line.removeprefix("np.float64(").rstrip(")")) for line in calls.read_text().split()
    )
    energies = [
        float(energy)
        for path in root.glob("round-*/*/tasks/*/labels.h5")
        for energy in arrays_of(path)["info/REF_energy"]
    ]
    assert energies
    missing = [energy for energy in energies if counts[energy] == 0]
    assert not missing, "labels that nobody computed"
    again = sum(counts[energy] - 1 for energy in energies)
    assert again <= 2 * kills


def _assert_no_epoch_was_repeated(root: Path, epochs: int) -> None:
    lines = (root / "round-001/train/tasks/0000/metrics.jsonl").read_text().splitlines()
    seen = [json.loads(line)["epoch"] for line in lines]
    assert len(seen) == len(set(seen))
    assert max(seen) == epochs


UNROLLED = {
    "rounds": 1,
    "relaxations": {**CAMPAIGN["relaxations"], "cell": True},
    "train": {
        **CAMPAIGN["train"],
        "epochs": 6,
        "relaxation": {
            **CAMPAIGN["train"]["relaxation"],
            "every": 1,
            "steps": 12,
            "learn_step_size": "per-element",
        },
    },
}


@pytest.mark.nightly
def test_a_campaign_killed_while_it_unrolls_relaxations_with_their_cells_and_learns_step_sizes_ends_the_same(
    tmp_path: Path,
) -> None:
    campaign = write_campaign(tmp_path / "inputs", UNROLLED)
    hpcft_to_end("run", campaign, "--dir", tmp_path / "undisturbed", cwd=tmp_path)
    root = tmp_path / "disturbed"
    metrics = root / "round-001/train/tasks/0000/metrics.jsonl"
    arguments: tuple[object, ...] = ("run", campaign, "--dir", root)
    for epochs in (1, 3):
        with (tmp_path / "log").open("a") as log:
            process = hpcft(*arguments, cwd=tmp_path, output=log)
        while process.poll() is None and not (
            metrics.exists() and len(metrics.read_text().splitlines()) >= epochs
        ):
            time.sleep(0.02)
        assert process.poll() is None, (tmp_path / "log").read_text()
        kill([process.pid, *processes_of(root)])
        process.wait()
        arguments = ("resume", root)
    hpcft_to_end("resume", root, cwd=tmp_path)
    assert_same_results(tmp_path / "undisturbed", root)
    product = json.loads((root / "round-001/train/product.json").read_text())
    assert product["step_size"]["step_sizes"] != [0.05]
    _assert_no_epoch_was_repeated(root, 6)

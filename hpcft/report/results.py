"""A campaign's results round by round, read from the stages' products. No torch, no HDF5: `hpcft status` shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpcft.storage.atomic import read_json
from hpcft.storage.campaign_folder import CampaignFolder


@dataclass(frozen=True)
class RoundResult:
    """What one round has shown. Label counts are cumulative: `training_labels` were learnt from, `judging_labels` only judge."""

    round: int
    metrics: Mapping[str, Mapping[str, float]]
    training_labels: int
    judging_labels: int
    relaxations: int
    failed_labels: int
    exploded: int
    replicas_frames: int
    relaxations_unconverged: int = 0
    relaxations_refused: tuple[str, ...] = ()
    suspect_labels: int = 0
    """Labels so far that look wrong: left out of training and judging, unless label.quarantine is false."""


METRICS: tuple[tuple[str, str, str], ...] = (
    ("energy_bias_meV_per_atom", "energy bias", "meV/atom"),
    ("force_slope", "force slope", ""),
    ("force_mae_meV_per_A", "force MAE", "meV/Å"),
    ("delta_q", "ΔQ", "√amu Å"),
)

# Decimals of each of METRICS, wherever it is shown.
DIGITS = {"energy_bias_meV_per_atom": 1, "force_slope": 2, "force_mae_meV_per_A": 0, "delta_q": 2}

# What training through relaxations is after, and what it may cost: structures get better, instantaneous forces may get worse.
RELAXATION_METRICS: tuple[tuple[str, str, str, int], ...] = (
    ("delta_q_steps", "ΔQ after\nk steps", "√amu Å", 2),
    ("delta_q", "ΔQ\nrelaxed", "√amu Å", 2),
    ("cell_distance", "cells\nrelaxed", "√amu Å", 2),
    ("relaxed_energy_error", "energy of\nthe end off by", "meV/atom", 1),
    ("replay_force_mae_meV_per_A", "force MAE\non replay", "meV/Å", 0),
    ("replay_energy_mae_meV_per_atom", "energy MAE\non replay", "meV/atom", 1),
)


def read_results(folder: CampaignFolder) -> list[RoundResult]:
    """Every round that has been evaluated."""
    rounds = int(folder.read_identity()["rounds"])
    results: list[RoundResult] = []
    training = judging = relaxations = failed = 0
    suspect = {"label": 0, "reference": 0}
    for round_ in range(rounds + 1):
        products = {
            name: _product(folder, round_, name) for name in ("label", "probe", "reference", "evaluate")
        }
        for name in ("label", "reference"):
            product = products[name]
            if product is None:
                continue
            failed += int(product["failed"])
            suspect[name] = len(product.get("suspects", ()))  # each product lists those of all rounds so far
            relaxations += int(product["relaxations"])
            frames = int(product["frames_done"]) + int(product.get("relaxation_frames", 0))
            training, judging = (
                (training + frames, judging) if name == "label" else (training, judging + frames)
            )
        evaluation, probe = products["evaluate"], products["probe"]
        if evaluation is None or probe is None:
            break
        results.append(
            RoundResult(
                round_, evaluation["metrics"], training, judging, relaxations, failed,
                len(probe["stopped"]), int(probe["frames"]),
                int(evaluation.get("relaxations_unconverged", 0)), tuple(evaluation.get("relaxations_refused", ())),
                sum(suspect.values()),
            )
        )  # fmt: skip
    return results


def _product(folder: CampaignFolder, round_: int, stage: str) -> dict[str, Any] | None:
    path = folder.stage(round_, stage).product
    return dict(read_json(path)) if path.exists() else None


def model_name(result: RoundResult) -> str:
    """The model that the result judges."""
    return "foundation" if result.round == 0 else f"round {result.round}"


def shown(metric: Mapping[str, float] | None, digits: int) -> str:
    """`value [low, high]`, or a dash where nothing was measured."""
    if metric is None:
        return "–"
    value, low, high = (metric[key] for key in ("value", "low", "high"))
    if low != low:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

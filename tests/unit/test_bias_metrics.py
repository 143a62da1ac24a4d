"""Bias metrics: recovered where it is known, with intervals that cover it as often as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hpcft.bias import FramePair, bias_metrics, interval_of_mean

ATOMS = 8


def frames(
    random: np.random.Generator,
    *,
    groups: int = 12,
    per_group: int = 5,
    bias: float = 0.0,
    slope: float = 1.0,
    noise: float = 0.0,
    between_groups: float = 0.0,
) -> list[FramePair]:
    """Frames of a model with a known energy bias (eV/atom) and force slope; `between_groups` is shared by a replica."""
    found = []
    for group in range(groups):
        own = random.normal(0, between_groups) if between_groups else 0.0
        for _ in range(per_group):
            energy, forces = random.normal(), random.normal(size=(ATOMS, 3))
            error = bias + own + (random.normal(0, noise) if noise else 0.0)
            predicted = slope * forces + (random.normal(0, noise, forces.shape) if noise else 0.0)
            found.append(FramePair(group, energy + ATOMS * error, energy, predicted, forces))
    return found


def test_a_known_bias_and_slope_are_recovered_exactly_where_there_is_no_noise() -> None:
    data = frames(np.random.default_rng(0), bias=-0.013, slope=0.8)
    metrics = bias_metrics(data)
    assert metrics["energy_bias_meV_per_atom"].value == pytest.approx(-13.0, rel=1e-9)
    assert metrics["force_slope"].value == pytest.approx(0.8, rel=1e-12)
    expected = 1e3 * 0.2 * np.mean([np.abs(frame.reference_forces) for frame in data])
    assert metrics["force_mae_meV_per_A"].value == pytest.approx(expected, rel=1e-12)
    for name in ("energy_bias_meV_per_atom", "force_slope"):
        assert metrics[name].low == pytest.approx(metrics[name].value, rel=1e-9)
        assert metrics[name].high == pytest.approx(metrics[name].value, rel=1e-9)


def test_the_sign_says_whether_the_model_is_too_high_and_scatter_is_no_bias() -> None:
    above_and_below = [
        FramePair(0, +0.1, 0.0, np.zeros((2, 3)), np.ones((2, 3))),
        FramePair(1, -0.1, 0.0, np.zeros((2, 3)), np.ones((2, 3))),
    ]
    assert bias_metrics(above_and_below)["energy_bias_meV_per_atom"].value == pytest.approx(0.0, abs=1e-12)
    assert bias_metrics(above_and_below[:1])["energy_bias_meV_per_atom"].value == pytest.approx(50.0)


def test_every_force_component_and_every_frame_has_the_same_weight() -> None:
    small = FramePair(0, 0.0, 0.0, np.array([[0.0, 0.0, 1.0]]), np.array([[0.0, 0.0, 2.0]]))
    large = FramePair(1, 3.0, 0.0, np.zeros((3, 3)), np.ones((3, 3)))
    metrics = bias_metrics([small, large])
    assert metrics["energy_bias_meV_per_atom"].value == pytest.approx(500.0)  # mean of 0 and 1 eV/atom
    assert metrics["force_mae_meV_per_A"].value == pytest.approx(1e3 * (1 + 9) / 12)
    assert metrics["force_slope"].value == pytest.approx(2.0 / (4 + 9))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = {"energy_bias_meV_per_atom": 0, "force_slope": 0}
    truth = {"energy_bias_meV_per_atom": 20.0, "force_slope": 0.9}
    trials = 300
    for trial in range(trials):
        random = np.random.default_rng([1, trial])
        data = frames(random, groups=16, per_group=3, bias=0.02, slope=0.9, noise=0.02, between_groups=0.02)
        for name, interval in bias_metrics(data, samples=300, seed=trial).items():
            if name in truth:
                covered[name] += interval.low <= truth[name] <= interval.high
    for name, count in covered.items():
        # Percentile intervals of 16 groups are a little narrow: about 92 % where 95 % is asked for.
        assert 0.87 < count / trials < 0.985, name


def test_a_higher_confidence_gives_a_wider_interval_around_the_same_value() -> None:
    data = frames(np.random.default_rng(2), noise=0.02, between_groups=0.01)
    narrow, wide = (bias_metrics(data, confidence=c)["energy_bias_meV_per_atom"] for c in (0.68, 0.99))
    assert narrow.value == wide.value
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_replicas_are_resampled_and_not_their_correlated_frames() -> None:
    random = np.random.default_rng(3)
    few = frames(random, groups=10, per_group=1, between_groups=0.02)
    # The same ten replicas with each frame twenty times over: no new information, so no narrower interval.
    repeated = [frame for frame in few for _ in range(20)]
    a, b = (bias_metrics(data, seed=5)["energy_bias_meV_per_atom"] for data in (few, repeated))
    assert (b.low, b.high) == (pytest.approx(a.low), pytest.approx(a.high))
    alone = [
        FramePair(number, f.predicted_energy, f.reference_energy, f.predicted_forces, f.reference_forces)
        for number, f in enumerate(repeated)
    ]
    c = bias_metrics(alone, seed=5)["energy_bias_meV_per_atom"]
    assert c.high - c.low < 0.4 * (a.high - a.low)


def test_the_order_of_frames_does_not_matter_and_the_seed_is_all_the_chance_there_is() -> None:
    data = frames(np.random.default_rng(4), noise=0.05, between_groups=0.02)
    order = np.random.default_rng(0).permutation(len(data))
    one, other = bias_metrics(data, seed=1), bias_metrics([data[i] for i in order], seed=1)
    for name, interval in one.items():
        assert vars(other[name]) == pytest.approx(vars(interval), rel=1e-9)
    assert bias_metrics(data, seed=1) == one
    assert bias_metrics(data, seed=2)["force_slope"].low != one["force_slope"].low


def test_one_replica_gives_a_value_but_no_interval() -> None:
    for interval in bias_metrics(frames(np.random.default_rng(5), groups=1, bias=0.01)).values():
        assert math.isfinite(interval.value)
        assert math.isnan(interval.low) and math.isnan(interval.high)


def test_a_bias_that_was_not_measured_is_an_error_and_not_zero() -> None:
    with pytest.raises(ValueError, match="the bias is unknown"):
        bias_metrics([])
    with pytest.raises(ValueError, match="no values"):
        interval_of_mean([])


def test_the_interval_of_a_mean_covers_the_truth_about_as_often_as_it_says() -> None:
    trials, covered = 400, 0
    for trial in range(trials):
        values = np.random.default_rng([2, trial]).exponential(2.0, 25)
        interval = interval_of_mean(list(values), samples=300, seed=trial)
        assert interval.value == pytest.approx(values.mean(), rel=1e-12)
        covered += interval.low <= 2.0 <= interval.high
    assert 0.85 < covered / trials < 0.97
    assert math.isnan(interval_of_mean([3.0]).low)

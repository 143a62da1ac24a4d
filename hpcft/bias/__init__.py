"""Systematic error of a model along its own trajectories, with confidence intervals."""

from hpcft.bias.metrics import FramePair, Interval, bias_metrics, interval_of_mean

__all__ = ["FramePair", "Interval", "bias_metrics", "interval_of_mean"]

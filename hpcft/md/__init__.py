"""Batched molecular dynamics of many replicas in one graph on one device."""

from hpcft.md.engine import Guards, LangevinSettings, Simulation, thermal_velocities

__all__ = ["Guards", "LangevinSettings", "Simulation", "thermal_velocities"]

"""Batched molecular dynamics of many replicas in one graph on one device."""

from hpcft.md.replica import Replica, disturbed, thermal_velocities
from hpcft.md.settings import ENSEMBLES, Dynamics, Guards, Ramp
from hpcft.md.simulation import AT_STOP, Observe, Simulation

__all__ = [
    "AT_STOP",
    "ENSEMBLES",
    "Dynamics",
    "Guards",
    "Observe",
    "Ramp",
    "Replica",
    "Simulation",
    "disturbed",
    "thermal_velocities",
]

"""Which frames are worth paying for."""

from hpcft.selection.farthest import farthest_points

__all__ = ["farthest_points"]

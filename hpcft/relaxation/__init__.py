"""Relaxation as an iterated map: run it, unroll it, and measure where it ends."""

from hpcft.relaxation.delta_q import delta_q, minimum_image
from hpcft.relaxation.relax import Relaxed, relax
from hpcft.relaxation.unroll import ENGINES, MapSettings, unroll

__all__ = ["ENGINES", "MapSettings", "Relaxed", "delta_q", "minimum_image", "relax", "unroll"]

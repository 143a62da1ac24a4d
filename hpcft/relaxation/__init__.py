"""Relaxation as an iterated map: run it, unroll it, back-propagate through it, and measure where it ends.

end = unroll(potential, graph, Descent(step_size=0.05, momentum=0.8), steps=40)
loss = delta_q(end.positions_n3, target_n3, graph).sum()
loss.backward()
"""

from hpcft.relaxation.coordinates import Coordinates
from hpcft.relaxation.delta_q import cell_distance, delta_q, displacements, minimum_image, rmsd, with_cells
from hpcft.relaxation.engines import ENGINES, require_twice_differentiable
from hpcft.relaxation.implicit import ImplicitReport, Solver, relaxed_implicitly
from hpcft.relaxation.lbfgs import Lbfgs
from hpcft.relaxation.maps import Descent, Fire, RelaxationMap, StepSize
from hpcft.relaxation.pairs import RelaxationPair, check_pair
from hpcft.relaxation.relax import OPTIMISERS, Relaxed, fixed_atoms, relax
from hpcft.relaxation.unroll import Stop, Unrolled, unroll

__all__ = [
    "ENGINES",
    "OPTIMISERS",
    "Coordinates",
    "Descent",
    "Fire",
    "ImplicitReport",
    "Lbfgs",
    "RelaxationMap",
    "RelaxationPair",
    "Relaxed",
    "Solver",
    "StepSize",
    "Stop",
    "Unrolled",
    "cell_distance",
    "check_pair",
    "delta_q",
    "displacements",
    "fixed_atoms",
    "minimum_image",
    "relax",
    "relaxed_implicitly",
    "require_twice_differentiable",
    "rmsd",
    "unroll",
    "with_cells",
]

"""Classical many-body potentials of covalent solids as reference calculators, by the name of their published parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpcft.errors import UserError
from hpcft.labelling.dotted_path import nearest


def tersoff(parameters: str = "Tersoff_PRB_39_5566_Si_C", potential_file: str | None = None) -> Any:
    """Tersoff's bond-order potential: one of matscipy's parameter sets, or a file in the format of LAMMPS.

    The default is that of J. Tersoff, Phys. Rev. B 39, 5566 (1989) for C and Si. A file goes to ASE's calculator, which is
    several times slower than matscipy's.
    """
    if potential_file is not None:
        from ase.calculators.tersoff import Tersoff

        return Tersoff.from_lammps(Path(potential_file).expanduser())
    from matscipy.calculators.manybody import Manybody
    from matscipy.calculators.manybody.explicit_forms import tersoff_brenner

    return Manybody(**tersoff_brenner.TersoffBrenner(_published(tersoff_brenner, parameters)))


def stillinger_weber(parameters: str = "Stillinger_Weber_PRB_31_5262_Si") -> Any:
    """Stillinger and Weber's potential with one of matscipy's parameter sets.

    The default is that of F. Stillinger and T. Weber, Phys. Rev. B 31, 5262 (1985) for Si.
    """
    from matscipy.calculators.manybody import Manybody
    from matscipy.calculators.manybody.explicit_forms import stillinger_weber as form

    return Manybody(**form.StillingerWeber(_published(form, parameters)))


def elements_of_tersoff(
    parameters: str = "Tersoff_PRB_39_5566_Si_C", potential_file: str | None = None
) -> set[str]:
    """Chemical symbols that `tersoff` with these arguments knows."""
    if potential_file is not None:
        from ase.calculators.tersoff import Tersoff

        return {
            symbol
            for triple in Tersoff.read_lammps_format(Path(potential_file).expanduser())
            for symbol in triple
        }
    from matscipy.calculators.manybody.explicit_forms import tersoff_brenner

    return _elements(_published(tersoff_brenner, parameters))


def elements_of_stillinger_weber(parameters: str = "Stillinger_Weber_PRB_31_5262_Si") -> set[str]:
    """Chemical symbols that `stillinger_weber` with these arguments knows."""
    from matscipy.calculators.manybody.explicit_forms import stillinger_weber as form

    return _elements(_published(form, parameters))


def _published(form: Any, name: str) -> dict[str, Any]:
    sets = {key: value for key, value in vars(form).items() if isinstance(value, dict) and "__ref__" in value}
    if name not in sets:
        raise UserError(
            f"matscipy has no parameters {name!r} of this form.{nearest(name, sets)} It has {', '.join(sorted(sets))}."
        )
    return dict(sets[name])


def _elements(parameters: dict[str, Any]) -> set[str]:
    elements = parameters["el"]
    return {elements} if isinstance(elements, str) else set(elements)

"""An unconverged calculation is known as one, whatever a code's exit status says."""

from __future__ import annotations

import itertools
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ase.build import bulk
from ase.calculators.calculator import all_changes
from ase.calculators.vasp import Vasp

from hpcft.config.reference import Reference as Config
from hpcft.labelling.causes import label_error
from hpcft.labelling.convergence import is_unconverged
from hpcft.labelling.reference import build_calculator, reference_from

CP2K_SHELL = Path(__file__).with_name("cp2k_shell.py")

REACHED = "------------------------ aborting loop because EDIFF is reached ---------------------------"
NOT_REACHED = "------------------------ aborting loop EDIFF was not reached (unconverged)  ---------------"
HARD_STOP = "------------------------ aborting loop because hard stop was set -------------------------"
OF_VASP_5 = """\
   EDIFF  = 0.1E-05   stopping-criterion for ELM
  total energy-change (2. order) :{change}  ( 0.1234567E-08)
"""


@pytest.mark.parametrize(
    ("outcar", "unconverged"),
    [
        (REACHED, False),
        (NOT_REACHED, True),
        (HARD_STOP, True),
        (OF_VASP_5.format(change="-0.2141803E-08"), False),
        (OF_VASP_5.format(change="-0.2141803E-03"), True),
        ("General timing and accounting informations for this job:", True),
    ],
)
def test_vasp_has_converged_only_where_its_output_says_so(outcar: str, unconverged: bool) -> None:
    calculator = Vasp(xc="PBE", nsw=0)
    calculator.converged = calculator.read_convergence(outcar.splitlines())
    assert is_unconverged(calculator) is unconverged


@pytest.mark.parametrize(
    ("line", "unconverged"),
    [
        ("     convergence has been achieved in   9 iterations", False),
        ("     convergence NOT achieved after 100 iterations: stopping", True),
        ("FINAL SINGLE POINT ENERGY   -76.323 (Wavefunction not fully converged!)", True),
        ("FINAL SINGLE POINT ENERGY   -76.323", False),
        ("  * WARNING! SELF-CONSISTENCY CYCLE DID NOT CONVERGE", True),
        (
            "  | Self-consistency cycle not yet converged - restarting mixer to attempt better convergence.",
            False,
        ),
        ("  Self-consistency cycle converged.", False),
    ],
)
def test_what_a_code_writes_tells_whether_it_has_converged(
    line: str, unconverged: bool, tmp_path: Path
) -> None:
    (tmp_path / "code.out").write_text(f"some lines\n{line}\nmore lines\n")
    calculator = SimpleNamespace(template=SimpleNamespace(outputname="code.out"), directory=tmp_path)
    assert is_unconverged(calculator) is unconverged


@pytest.mark.parametrize(
    ("line", "unconverged"),
    [("  *** SCF run converged in    12 steps ***", False), ("  *** SCF run NOT converged ***", True)],
)
def test_cp2k_works_in_its_folder_with_forces_and_stress_and_tells_its_convergence(
    line: str, unconverged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = shlex.join([sys.executable, str(CP2K_SHELL), line])
    reference = reference_from(Config(calculator="cp2k", arguments={"xc": "PBE"}, command=command))
    calculator = build_calculator(reference, tmp_path)
    monkeypatch.chdir(tmp_path)  # as the worker does before it calculates
    calculator.calculate(bulk("Si"), ["energy", "forces", "stress"], all_changes)
    assert is_unconverged(calculator) is unconverged
    calculator.close()
    assert calculator.results["energy"] == -210.0
    assert calculator.results["forces"][0].tolist() == [0.1, 0, 0]
    assert calculator.results["stress"].tolist() == [-0.1, -0.1, -0.1, 0, 0, 0]
    words = (tmp_path / "cp2k.inp").read_text().split()
    for keyword, value in (("EPS_SCF", "1.0E-7"), ("STRESS_TENSOR", "ANALYTICAL"), ("MAX_SCF", "100")):
        assert (keyword, value) in itertools.pairwise(words)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "  *** SCF run NOT converged. To continue the calculation regardless, please set the keyword",
            "scf",
        ),
        ("  * WARNING! SELF-CONSISTENCY CYCLE DID NOT CONVERGE", "scf"),
        ("ORCA finished by error termination in SCF gradient: SCF NOT CONVERGED AFTER 125 CYCLES", "scf"),
        ("Error EDDDAV: Call to ZHEGV failed. Returncode = 15 3 24", "scf"),
        ("something else", "calculator"),
    ],
)
def test_the_output_of_a_code_that_gave_up_tells_the_cause(text: str, cause: str, tmp_path: Path) -> None:
    (tmp_path / "code.out").write_text(text)
    assert label_error(ValueError("no energy in the output"), tmp_path).cause == cause


def test_a_missing_data_set_of_gpaw_is_no_fault_of_the_structure() -> None:
    error = FileNotFoundError('Could not find required PAW dataset file "U.PBE".')
    assert label_error(error, None).cause == "bad-input"

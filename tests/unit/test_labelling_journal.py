"""Lines of a label journal: exact to the last bit, and no wrong bit goes unnoticed."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from hypothesis import given
from hypothesis import strategies as st

from hpcft.labelling.causes import Failure
from hpcft.labelling.journal import Record, decode_line, encode_line
from hpcft.labelling.label import Label, Relaxation

finite = st.floats(allow_nan=False, allow_infinity=False)


def record(values: list[float], *, stress: bool = True) -> Record:
    positions, forces, rest = values[:6], values[6:12], values[12:]
    atoms = Atoms("CuAu", positions=np.reshape(positions, (2, 3)), cell=np.diag(rest[:3]), pbc=(1, 0, 1))
    label = Label(rest[3], "free_energy", np.reshape(forces, (2, 3)), np.array(rest[:6]) if stress else None)
    return Record(3, "ab" * 32, "single-point", label, atoms, wall_s=rest[4], rung=1, attempt=2, found=True)


def same_bits(first: object, second: object) -> bool:
    return np.asarray(first).tobytes() == np.asarray(second).tobytes()


@given(st.lists(finite, min_size=18, max_size=18), st.booleans())
def test_a_label_comes_back_bit_for_bit(values: list[float], stress: bool) -> None:
    written = record(values, stress=stress)
    read = decode_line(encode_line(written)[:-1])
    assert read is not None
    assert isinstance(written.result, Label)
    assert isinstance(read.result, Label)
    assert isinstance(written.atoms, Atoms)
    assert isinstance(read.atoms, Atoms)
    assert same_bits(read.result.forces_n3, written.result.forces_n3)
    assert same_bits(read.result.energy, written.result.energy)
    assert (read.result.stress_6 is None) == (not stress)
    assert not stress or same_bits(read.result.stress_6, written.result.stress_6)
    assert same_bits(read.atoms.positions, written.atoms.positions)
    assert same_bits(read.atoms.cell.array, written.atoms.cell.array)
    for name in ("index", "key", "kind", "wall_s", "rung", "attempt", "found"):
        assert getattr(read, name) == getattr(written, name)


def test_a_relaxation_with_moments_comes_back_bit_for_bit() -> None:
    start = Atoms("CuAu", positions=[[0, 0, 0.1], [1 / 3, 1e-300, 2]], cell=[3, 4, 5], pbc=True)
    start.set_initial_magnetic_moments([0.1, -2])
    relaxed = start.copy()
    relaxed.positions += 0.1
    relaxed.set_cell([3.1, 1 / 3, 5])
    relaxation = Relaxation(start, relaxed, 0.1, 0.2, "energy", 7, True, 1e-3)
    read = decode_line(encode_line(Record(0, "k", "relaxation", relaxation, start, 1.5))[:-1])
    assert read is not None
    assert isinstance(read.result, Relaxation)
    assert same_bits(read.result.relaxed.positions, relaxed.positions)
    assert same_bits(read.result.relaxed.cell.array, relaxed.cell.array)
    assert same_bits(read.result.start.cell.array, start.cell.array)
    assert same_bits(read.result.start.get_initial_magnetic_moments(), [0.1, -2.0])
    for name in ("energy_start", "energy_relaxed", "energy_kind", "num_steps", "converged", "max_force"):
        assert getattr(read.result, name) == getattr(relaxation, name)


def test_a_failure_comes_back_with_its_words() -> None:
    failure = Failure("scf", "no convergence\nafter 100 iterations", "Åå\x00 last line")
    line = encode_line(Record(0, "k", "single-point", failure, None, 1.5))
    assert line.count(b"\n") == 1
    read = decode_line(line[:-1])
    assert read is not None
    assert read.result == failure
    assert not read.done


@given(st.data())
def test_a_line_with_any_wrong_byte_is_not_believed(data: st.DataObject) -> None:
    line = bytearray(encode_line(record([0.1 * n for n in range(18)]))[:-1])
    position = data.draw(st.integers(0, len(line) - 1))
    line[position] ^= data.draw(st.integers(1, 255))
    read = decode_line(bytes(line))
    assert read is None or encode_line(read)[:-1] == encode_line(record([0.1 * n for n in range(18)]))[:-1]


@given(st.integers(0, 400))
def test_a_line_cut_short_is_not_believed(length: int) -> None:
    line = encode_line(record([0.1 * n for n in range(18)]))[:-1]
    assert decode_line(line[: min(length, len(line) - 1)]) is None


def test_a_number_that_is_not_finite_cannot_be_written_as_a_label() -> None:
    with pytest.raises(ValueError, match="JSON"):
        encode_line(record([float("nan")] * 18))

"""Files that are read piece by piece: the same structures as all at once, in any process, few files open at a time."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.constraints import FixAtoms

from hpcft.errors import UserError
from hpcft.storage.lazy_hdf5 import LazyFile
from hpcft.storage.seal import DamagedFile
from hpcft.storage.structures import StructureFile, read_structures, write_structures


def structure(number: int) -> Atoms:
    atoms = bulk("Cu", a=3.7, cubic=True).repeat((1 + number % 3, 1, 1))
    atoms.rattle(0.1, seed=number)
    atoms.info = {"REF_energy": 0.1 * number, "a/b": np.arange(6.0) + number}
    if number % 2:
        atoms.info["config_type"] = f"type {number}"
    atoms.arrays["REF_forces"] = np.random.default_rng(number).normal(size=(len(atoms), 3))
    atoms.set_constraint(FixAtoms([0]))
    return atoms


def same(one: Atoms, other: Atoms) -> bool:
    return (
        one == other
        and one.info.keys() == other.info.keys()
        and all(np.array_equal(one.info[key], other.info[key]) for key in one.info)
        and one.arrays.keys() == other.arrays.keys()
        and all(np.array_equal(one.arrays[key], other.arrays[key]) for key in one.arrays)
        and [c.todict() for c in one.constraints] == [c.todict() for c in other.constraints]
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_structures(tmp_path / "data.h5", [structure(number) for number in range(7)])
    return tmp_path / "data.h5"


def test_a_piece_holds_the_same_structures_as_the_whole_file(path: Path) -> None:
    file, whole = StructureFile(path), read_structures(path)
    assert len(file) == 7
    assert file.num_atoms_each.tolist() == [len(atoms) for atoms in whole]
    for start, stop in [(0, 7), (3, 4), (2, 6), (6, 7)]:
        pieces = file.read(start, stop)
        assert len(pieces) == stop - start
        assert all(same(*pair) for pair in zip(pieces, whole[start:stop], strict=True))


def test_only_the_keys_that_were_asked_for_are_read(path: Path) -> None:
    file = StructureFile(path)
    assert file.info_keys == {"REF_energy", "a/b", "config_type"}
    assert file.array_keys == {"REF_forces", "fixed"}
    first, second = file.read(2, 4, {"a/b", "config_type", "absent"})
    assert (first.info.keys(), second.info.keys()) == ({"a/b"}, {"a/b", "config_type"})
    assert first.arrays.keys() == {"numbers", "positions"}


def test_a_file_that_is_not_what_was_written_is_refused_at_once(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"data\.h5 is damaged: its SHA-256"):
        StructureFile(path)


def _energy(file: StructureFile) -> float:
    return float(file.read(5, 6)[0].info["REF_energy"])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # from Python 3.12 on
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_open_file_is_read_in_other_processes_too(path: Path, method: str) -> None:
    file = StructureFile(path)
    assert _energy(file) == 0.5
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_energy, [file] * 4) == [0.5] * 4
    assert _energy(file) == 0.5


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_a_descriptor_of_its_own(path: Path) -> None:
    file = LazyFile(path)
    assert file["offsets"][0] == 0
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def child() -> None:
        inherited = file._file
        offsets = file["offsets"][()].tolist()
        answers.put((offsets, file._file is not inherited, bool(inherited)))

    process = context.Process(target=child)
    process.start()
    process.join()
    assert answers.get() == ([0, 4, 12, 24, 28, 36, 48, 52], True, False)
    assert file["offsets"][1] == 4


def test_a_pickle_holds_no_open_file(path: Path) -> None:
    file = StructureFile(path)
    _energy(file)
    assert _energy(pickle.loads(pickle.dumps(file))) == 0.5  # noqa: S301


def test_a_process_keeps_few_of_many_files_open_and_still_reads_all(tmp_path: Path) -> None:
    files = []
    for number in range(150):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file["value"] = number
        files.append(LazyFile(tmp_path / f"{number}.h5"))

    def num_open() -> int:
        opened = (path for path in Path("/proc/self/fd").iterdir() if path.exists())
        return sum(path.resolve().parent == tmp_path for path in opened)

    for _ in range(2):
        assert [int(file["value"][()]) for file in files] == list(range(150))
        assert num_open() == 128
    assert [int(file["value"][()]) for file in reversed(files)] == list(range(150))[::-1]
    assert num_open() == 128
    del files, file
    assert num_open() == 0


def test_a_file_that_disappears_before_it_is_read_is_named(path: Path) -> None:
    file = StructureFile(path)
    path.unlink()
    with pytest.raises(UserError, match=r"data\.h5 could be read before, but not any more .*Restore it"):
        file.read(0, 1)

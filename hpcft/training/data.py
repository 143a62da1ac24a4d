"""Labelled structures as training samples, and the order in which they are drawn.

Shape suffixes: n atoms of the whole batch, b structures.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from torch import Tensor

from hpcft.errors import UserError
from hpcft.models.graph import Graph, build_graph, concatenate, moved_to


@dataclass(frozen=True)
class Labels:
    """Reference values of a batch: energies [b] eV, forces [n, 3] eV/Å, stress [b, 3, 3] eV/Å^3.

    `stress_known_b` is 1 where the reference gave a stress, else 0 (and the stress is zero). `weights_b3`: what the energy,
    the forces and the stress of each structure count, 1 unless it says otherwise.
    """

    energies_b: Tensor
    forces_n3: Tensor
    stress_b33: Tensor
    stress_known_b: Tensor
    weights_b3: Tensor


@dataclass(frozen=True)
class Batch:
    graph: Graph
    labels: Labels

    @property
    def num_bytes(self) -> int:
        return self.graph.num_bytes + int(sum(tensor.nbytes for tensor in vars(self.labels).values()))


class LabelledSet:
    """Structures with REF_energy, REF_forces and (where present) REF_stress.

    `structures` may be read lazily; with `num_atoms` of each known they are not looked at before they are drawn. Graphs and
    labels are made once and kept as long as all of them take at most `cache_MiB`.
    """

    # Of all sets: the next batch may be made while another thread measures, and lazy files have one reader at a time.
    _lock = threading.Lock()

    def __init__(
        self,
        structures: Sequence[Atoms],
        cutoff: float,
        dtype: torch.dtype,
        origin: str = "data",
        *,
        num_atoms: Sequence[int] | None = None,
        cache_MiB: float = 4096.0,
    ) -> None:
        self._structures = structures
        self._cutoff, self._dtype = cutoff, dtype
        self._samples: OrderedDict[int, Batch] = OrderedDict()
        self._cached, self._most_cached = 0, int(cache_MiB * 2**20)
        if num_atoms is not None:
            self._num_atoms = list(num_atoms)
            return
        self._num_atoms = [len(atoms) for atoms in structures]
        for index, atoms in enumerate(structures):
            if "REF_energy" not in atoms.info or "REF_forces" not in atoms.arrays:
                raise UserError(
                    f"structure {index} of {origin} has no REF_energy or no REF_forces, so there is nothing to train "
                    "on. (ASE strips the plain keys 'energy' and 'forces' when it reads extxyz: write REF_*.)"
                )

    def __len__(self) -> int:
        return len(self._structures)

    @property
    def structures(self) -> Sequence[Atoms]:
        return self._structures

    def subset(self, indices: Sequence[int]) -> LabelledSet:
        """These structures alone, read now."""
        chosen = [self._structures[i] for i in indices]
        return LabelledSet(chosen, self._cutoff, self._dtype)

    def num_atoms_each(self, indices: Sequence[int]) -> list[int]:
        return [self._num_atoms[i] for i in indices]

    def num_atoms(self, indices: Sequence[int]) -> int:
        return sum(self.num_atoms_each(indices))

    def num_edges_each(self, indices: Sequence[int]) -> list[int]:
        return [len(self._sample(i).graph.senders_e) for i in indices]

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        samples = [self._sample(i) for i in indices]
        labels = [sample.labels for sample in samples]
        joined = {
            name: moved_to(device, torch.cat([getattr(one, name) for one in labels]))
            for name in vars(labels[0])
        }
        return Batch(concatenate([sample.graph for sample in samples]).to(device), Labels(**joined))

    def _sample(self, index: int) -> Batch:
        with self._lock:
            if (sample := self._samples.get(index)) is not None:
                self._samples.move_to_end(index)
                return sample
            atoms = self._structures[index]
        graph = build_graph([atoms], self._cutoff, dtype=self._dtype)
        sample = Batch(graph, _labels_of(atoms, self._dtype))
        with self._lock:
            self._samples[index] = sample
            self._cached += sample.num_bytes
            while self._cached > self._most_cached and len(self._samples) > 1:
                self._cached -= self._samples.popitem(last=False)[1].num_bytes
        return sample


def _labels_of(atoms: Atoms, dtype: torch.dtype) -> Labels:
    stress, known = np.zeros((3, 3)), 0.0
    if "REF_stress" in atoms.info and np.isfinite(atoms.info["REF_stress"]).all():
        stress, known = _full_stress(np.asarray(atoms.info["REF_stress"])), 1.0

    def tensor(values: object) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=dtype)

    return Labels(
        energies_b=tensor([float(atoms.info["REF_energy"])]),
        forces_n3=tensor(atoms.arrays["REF_forces"]),
        stress_b33=tensor(stress[None]),
        stress_known_b=tensor([known]),
        weights_b3=tensor([configuration_weights(atoms)]),
    )


def configuration_weights(atoms: Atoms) -> list[float]:
    """What energy, forces and stress of a structure count: `config_weight` times that of the property, as in mace's data."""
    whole = float(atoms.info.get("config_weight", 1.0))
    return [
        whole * float(atoms.info.get(f"config_{name}_weight", 1.0)) for name in ("energy", "forces", "stress")
    ]


def _full_stress(stress: np.ndarray) -> np.ndarray:
    """The 3 x 3 matrix of a stress in Voigt order (xx, yy, zz, yz, xz, xy), or with all nine components."""
    if stress.size == 9:
        return stress.reshape(3, 3)
    return np.asarray(voigt_6_to_full_3x3_stress(stress.ravel()))


def draw(num_items: int, batch_size: int, step: int, seed: Sequence[int]) -> list[int]:
    """Indices of global batch `step` from an endless stream of shuffled passes; needs no state to resume.

    The same for every number of ranks. `seed` is a SeedSequence entropy that names the stream.
    """
    first = step * batch_size
    indices = []
    for position in range(first, first + batch_size):
        number, offset = divmod(position, num_items)
        indices.append(int(_order(num_items, (*seed, number))[offset]))
    return indices


@functools.lru_cache(maxsize=16)  # of each stream the pass that is being drawn from, and the next
def _order(num_items: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).permutation(num_items)


def share(costs: Sequence[float], rank: int, world_size: int) -> list[int]:
    """Which items of a global batch `rank` computes, so that all ranks have about as much to do.

    The dearest item first, each to the rank with the least so far (longest processing time, Graham 1969). All ranks come
    to the same answer; no rank is left without an item while another has two.
    """
    loads, counts, mine = [0.0] * world_size, [0] * world_size, []
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        chosen = min(range(world_size), key=lambda r: (counts[r] > 0, loads[r], counts[r], r))
        loads[chosen] += costs[index]
        counts[chosen] += 1
        if chosen == rank:
            mine.append(index)
    return sorted(mine)

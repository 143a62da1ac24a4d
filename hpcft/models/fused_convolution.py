"""MACE's convolution without messages in memory: tensor product and sum over neighbours as one batched matrix product.

An interaction of MACE multiplies the features of each edge's sender with the edge's spherical harmonics, path by path, weighted
by the radial network, and adds up what arrives at each atom (Batatia et al., arXiv 2206.07697, eq. 8). Written edge by edge, the
products are by far the largest arrays of a training step. Here the edges lie in slots by receiver, [atoms, most neighbours], and
for each path one matrix product over the slots gives the sum at once.

Shape suffixes: n atoms, e edges, s slots (atoms times most neighbours), u channels, i, j, k components.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hpcft.models.libraries import o3

# Where slots outnumber edges by more, some atoms have far more neighbours than most, and edge by edge is the better way.
_MOST_SLOTS_PER_EDGE = 2.0


@dataclass(frozen=True)
class _Slots:
    """`edge_index` is kept, so that no other tensor can take its place in memory while it is recognised by identity."""

    edge_index: Tensor
    num_slots: int
    place_e: Tensor
    senders_s: Tensor

    @staticmethod
    def of(edge_index: Tensor, num_atoms: int) -> _Slots | None:
        """None where edge by edge is the better way."""
        senders_e, receivers_e = edge_index
        num_edges = len(receivers_e)
        if num_edges == 0:
            return None
        count_n = torch.bincount(receivers_e, minlength=num_atoms)
        most = int(count_n.max())
        if most * num_atoms > _MOST_SLOTS_PER_EDGE * num_edges:
            return None
        order = torch.argsort(receivers_e, stable=True)
        first_n = count_n.cumsum(0) - count_n
        place_e = torch.empty_like(order)
        place_e[order] = (
            receivers_e[order] * most
            + torch.arange(num_edges, device=order.device)
            - first_n[receivers_e[order]]
        )
        senders_s = torch.zeros(num_atoms * most, dtype=torch.int64, device=order.device)
        return _Slots(edge_index, most, place_e, senders_s.index_copy(0, place_e, senders_e))


class FusedTensorProduct(o3.TensorProduct):  # type: ignore[misc]  # e3nn has no types
    """A `uvu` tensor product of MACE that also sums over neighbours; `fuse` makes one of an ordinary one."""

    # Of the graph seen last: all layers, and all passes of a force, see the same one.
    _latest: tuple[Tensor, _Slots | None] | None = None

    def forward(self, features: Tensor, harmonics: Tensor, weight: Tensor, edge_index: Tensor) -> Tensor:
        """[n, in], [e, harmonics], [e, weights], [2, e] -> [n, out]."""
        slots = self._slots_of(edge_index, len(features)) if features.device.type == "cpu" else None
        if slots is None:
            messages = super().forward(features[edge_index[0]], harmonics, weight)
            zeros: Tensor = messages.new_zeros(len(features), messages.shape[1])
            return zeros.index_add(0, edge_index[1], messages)
        num_atoms, most = len(features), slots.num_slots
        weight_sw = weight.new_zeros(num_atoms * most, weight.shape[1]).index_copy(0, slots.place_e, weight)
        y_sj = harmonics.new_zeros(num_atoms * most, harmonics.shape[1])
        y_sj = y_sj.index_copy(0, slots.place_e, harmonics)
        x_s = features.index_select(0, slots.senders_s)
        outputs: list[Tensor | None] = [None] * len(self.irreps_out)
        # Not sliced: the gradient of each slice is an array of all columns, most of them zeros, and a force has two of each.
        x_parts = torch.split(x_s, [mul_ir.dim for mul_ir in self.irreps_in1], 1)
        y_parts = torch.split(y_sj, [mul_ir.dim for mul_ir in self.irreps_in2], 1)
        weight_parts = torch.split(
            weight_sw, [self.irreps_in1[path.i_in1].mul for path in self.instructions], 1
        )
        for path, coupling, weight_su in zip(
            self.instructions, self._couplings(features), weight_parts, strict=True
        ):
            channels = self.irreps_in1[path.i_in1].mul
            d1, _, d3 = coupling.shape
            left = weight_su[:, :, None] * x_parts[path.i_in1].reshape(-1, channels, d1)
            left_nau = left.transpose(1, 2).reshape(num_atoms, most * d1, channels)
            right = torch.einsum("sj,ijk->sik", y_parts[path.i_in2], coupling)
            sums_nuk = torch.bmm(left_nau.transpose(1, 2), right.reshape(num_atoms, most * d1, d3))
            outputs[path.i_out] = sums_nuk.reshape(num_atoms, channels * d3)
        return torch.cat(cast(list[Tensor], outputs), 1)

    @staticmethod
    def _slots_of(edge_index: Tensor, num_atoms: int) -> _Slots | None:
        latest = FusedTensorProduct._latest
        if latest is None or latest[0] is not edge_index:
            latest = edge_index, _Slots.of(edge_index, num_atoms)
            FusedTensorProduct._latest = latest
        return latest[1]

    def _couplings(self, like: Tensor) -> list[Tensor]:
        """Clebsch-Gordan coefficients [i, j, k] of each path, with its weight, in the type of `like`."""
        known = self.__dict__.setdefault("_known_couplings", {})
        if like.dtype not in known:
            known[like.dtype] = [
                (
                    o3.wigner_3j(
                        self.irreps_in1[path.i_in1].ir.l,
                        self.irreps_in2[path.i_in2].ir.l,
                        self.irreps_out[path.i_out].ir.l,
                        dtype=torch.float64,
                    )
                    * path.path_weight
                ).to(like.dtype)
                for path in self.instructions
            ]
        return cast(list[Tensor], known[like.dtype])


def fuse(model: torch.nn.Module) -> None:
    """Let a MACE's interactions use the fused product where they can; weights and their names stay as they are."""
    for interaction in cast(Any, model).interactions:
        product = interaction.conv_tp
        if (
            type(product) is o3.TensorProduct
            and not hasattr(interaction, "conv_fusion")
            and _is_simple(product)
        ):
            product.__class__ = FusedTensorProduct
            interaction.conv_fusion = True


def separate(model: torch.nn.Module) -> None:
    """As it was before `fuse`: the model that every other program knows."""
    for interaction in cast(Any, model).interactions:
        product = interaction.conv_tp
        if type(product) is FusedTensorProduct:
            product.__dict__.pop("_known_couplings", None)
            product.__class__ = o3.TensorProduct
            del interaction.conv_fusion


def _is_simple(product: o3.TensorProduct) -> bool:
    """Each path `uvu`, with weights per edge, one harmonic, and an output of its own."""
    paths = product.instructions
    return (
        not product.shared_weights
        and sorted(path.i_out for path in paths) == list(range(len(product.irreps_out)))
        and all(
            path.connection_mode == "uvu" and path.has_weight and product.irreps_in2[path.i_in2].mul == 1
            for path in paths
        )
    )

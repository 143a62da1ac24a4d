"""A GPU that is none: real numbers, computed on the processor, in tensors that say they are elsewhere.

Under `PretendedGpu` a tensor made for, or moved to, the device `pretended` keeps its numbers out of reach, as CUDA's does. An
operation between it and a tensor of the processor fails (`MixedDevices`) where it would on a GPU, `.numpy()` fails, and each
time that the processor has to wait for an answer is counted. All else, autograd included, is the real thing.

torch's FakeTensorMode does less: its tensors have no numbers, so that nothing which reads one can run, and in a torch without
CUDA its backward pass ends the process ("PyTorch is not linked with support for cuda devices"). The device is torch's own way of
writing a backend in Python.

What it does not show: whether CUDA's kernels are right or fast, memory, streams.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Asked by torch's checkpointing, in the same process on the processor too."""
        return []


_setup_privateuseone_for_python_backend("pretended", _Backend())
DEVICE = torch.device("pretended", 0)

# Whose result's size or value the processor needs, and how often it waits for it.
_WAITS = {"_local_scalar_dense": 1, "nonzero": 1, "equal": 1, "masked_select": 1, "bincount": 2, "_linalg_check_errors": 1,
          "_unique2": 1, "repeat_interleave": 1}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPIES = {"_to_copy", "copy_"}


class MixedDevices(RuntimeError):
    """As CUDA would say: expected all tensors to be on the same device."""


class _OnGpu(Tensor):
    """Holds a tensor of the processor and looks like one of the device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> _OnGpu:
        outer: _OnGpu = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        outer.inner = inner
        return outer

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} of a pretended GPU's tensor outside of the mode")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a GPU's tensor to numpy; use .cpu() first")


class PretendedGpu(TorchDispatchMode):
    """`waits`: how often the processor has waited, by what for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        if name == "is_pinned":
            return False
        if name == "_pin_memory":
            return args[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_ours = any(isinstance(tensor, _OnGpu) for tensor in tensors)
        if name in _COPIES:
            is_ours = self._note_copy(name, args, kwargs)
        elif kwargs.get("device") is not None:
            is_ours = torch.device(kwargs["device"]).type == DEVICE.type
        elif is_ours:
            _refuse_mixed(name, _without_indices(args) if name in _INDEXING else tensors)
            self._note_waits(name, args)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        outer = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, _OnGpu)}
        result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))

        def wrapped(value: Any) -> Any:
            if not is_ours or not isinstance(value, Tensor):
                return value
            # An operation in place returns the tensor that it was given.
            return outer[id(value)] if id(value) in outer else _OnGpu(value)

        return tree_map(wrapped, result)

    def _note_copy(self, name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether its result is on the device. One that is not told not to wait waits, in either direction."""
        if name == "_to_copy":
            source, target = args[0], kwargs.get("device")
            goes_to_gpu = (
                isinstance(source, _OnGpu) if target is None else torch.device(target).type == DEVICE.type
            )
            does_wait = not kwargs.get("non_blocking", False)
        else:
            source, goes_to_gpu = args[1], isinstance(args[0], _OnGpu)
            does_wait = not (len(args) > 2 and args[2])
        if isinstance(source, _OnGpu) and not goes_to_gpu:
            self.waits["device to host"] += 1
        if goes_to_gpu and not isinstance(source, _OnGpu) and does_wait:
            self.waits["host to device"] += 1
        return goes_to_gpu

    def _note_waits(self, name: str, args: Any) -> None:
        if name in _WAITS:
            self.waits[name] += _WAITS[name]
        if name in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            self.waits["index by a mask"] += sum(index.dtype == torch.bool for index in indices)
            self.waits["host to device"] += sum(not isinstance(index, _OnGpu) for index in indices)


def _without_indices(args: Any) -> list[Tensor]:
    """What is indexed, and the values put there: indices may come from the processor."""
    return [argument for argument in args if isinstance(argument, Tensor)]


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, _OnGpu) else value


def _refuse_mixed(name: str, tensors: list[Tensor]) -> None:
    """A single number may come from the processor, as with CUDA."""
    for tensor in tensors:
        if not isinstance(tensor, _OnGpu) and tensor.dim() > 0:
            raise MixedDevices(f"{name}: a tensor {list(tensor.shape)} of the processor meets one of the GPU")


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """With such a device; backward passes run in this thread, and TorchScript without its fuser, which does not know it."""
    with (
        torch.jit.optimized_execution(False),
        torch.autograd.set_multithreading_enabled(False),
        PretendedGpu() as gpu,
    ):
        # Literals become tensors of the processor first, and are moved then: there is no device to make them on.
        lifted_before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(lifted_before)


def waits_a_step(run: Callable[[int], object], few: int = 2, many: int = 6) -> dict[str, float]:
    """How often each step of `run(steps)` has the processor wait, by what for; what a run does once does not count."""
    counted = []
    for steps in (few, many):
        with pretended_gpu() as gpu:
            run(steps)
        counted.append(gpu.waits)
    rates = {name: (counted[1][name] - counted[0][name]) / (many - few) for name in counted[1]}
    return {name: rate for name, rate in rates.items() if rate}

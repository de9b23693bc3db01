"""How MPI sees a tensor: an address, a count and a datatype, nothing copied."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

# MPI before version 4 counts in 32-bit integers; longer messages travel in parts.
MAX_COUNT = 1 << 30

_MOVED = {
    1: MPI.UINT8_T,
    2: MPI.UINT16_T,
    4: MPI.UINT32_T,
    8: MPI.UINT64_T,
    16: MPI.C_DOUBLE_COMPLEX,
}
_REDUCED = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.int8: MPI.INT8_T,
    torch.uint8: MPI.UINT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.bool: MPI.UINT8_T,
}
_OPS = {
    dist.ReduceOp.SUM: MPI.SUM,
    dist.ReduceOp.AVG: MPI.SUM,
    dist.ReduceOp.PRODUCT: MPI.PROD,
    dist.ReduceOp.MIN: MPI.MIN,
    dist.ReduceOp.MAX: MPI.MAX,
    dist.ReduceOp.BAND: MPI.BAND,
    dist.ReduceOp.BOR: MPI.BOR,
    dist.ReduceOp.BXOR: MPI.BXOR,
}
# A sum of truth values is true if any is; stored as 2 it would be no truth value any more.
_BOOL_OPS = {dist.ReduceOp.SUM: MPI.MAX, dist.ReduceOp.PRODUCT: MPI.MIN}
_BITWISE = (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR)
_WIDENED = (torch.float16, torch.bfloat16)


def moved(tensor: Tensor) -> list[Any]:
    """Return what mpi4py needs to send or receive a contiguous tensor of any dtype."""
    return _message(tensor, _MOVED[tensor.element_size()])


def reduced(tensor: Tensor) -> list[Any]:
    """Return what mpi4py needs to reduce a contiguous tensor."""
    return _message(tensor, _REDUCED[tensor.dtype])


def _message(tensor: Tensor, datatype: MPI.Datatype) -> list[Any]:
    # Without a count mpi4py derives it, also where a buffer holds one block for each rank.
    return [MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes), datatype]


def parts(numel: int) -> Iterator[slice]:
    """Cut `numel` elements so that MPI can count each part."""
    for start in range(0, numel, MAX_COUNT):
        yield slice(start, min(start + MAX_COUNT, numel))


def mpi_op(op: Any, dtype: torch.dtype) -> MPI.Op:
    """Return MPI's operation for one of `torch.distributed.ReduceOp`.

    Raises:
        ValueError: There is none, or not for this dtype.
    """
    kind = getattr(op, "op", op)  # options hold a wrapper
    found = _OPS.get(kind)
    if found is None:
        names = ", ".join(str(each).rpartition(".")[2] for each in _OPS)
        raise ValueError(f"reduce op {kind} is not one of the mpi4py backend's: {names}.")
    if dtype not in _REDUCED and dtype not in _WIDENED:
        raise ValueError(
            f"the mpi4py backend cannot reduce {dtype}; it can "
            f"{', '.join(map(str, (*_REDUCED, *_WIDENED)))}. Convert the tensor, or view it as one "
            f"of these."
        )
    if kind in _BITWISE and dtype.is_floating_point:
        raise ValueError(f"reduce op {kind} needs integers, got a tensor of {dtype}.")
    if is_average(op) and not dtype.is_floating_point:
        raise ValueError(f"reduce op AVG needs floating point, got a tensor of {dtype}.")
    return _BOOL_OPS.get(kind, found) if dtype == torch.bool else found


def is_average(op: Any) -> bool:
    """Whether the sum is to be divided by the number of ranks; MPI has no such operation."""
    return bool(getattr(op, "op", op) == dist.ReduceOp.AVG)


def is_widened(dtype: torch.dtype) -> bool:
    """Whether values are summed in float32, which MPI would have no datatype for otherwise."""
    return dtype in _WIDENED


class Staging:
    """The tensors that MPI reads and writes for one operation, and what is left to do after it.

    A contiguous tensor in memory that MPI can reach is handed over as it is. Anything else is
    copied: what is strided, and what is on a GPU if the MPI library is not CUDA-aware.
    """

    def __init__(self) -> None:
        self.held: list[Tensor] = []  # alive until MPI is done
        self._after: list[Callable[[], object]] = []
        self._devices: set[torch.device] = set()

    def source(self, tensor: Tensor) -> Tensor:
        """Return a flat tensor for MPI to read `tensor` from."""
        return self._home(tensor)[1]

    def target(self, tensor: Tensor) -> Tensor:
        """Return a flat tensor for MPI to read and write; `tensor` has the result at the end."""
        direct, home = self._home(tensor)
        if not direct:
            self.then(lambda: tensor.copy_(home.view(tensor.shape)))
        return home

    def then(self, action: Callable[[], object]) -> None:
        """Run `action` when MPI is done, before those that were added earlier."""
        self._after.insert(0, action)

    def finish(self) -> None:
        """Run what is left to do."""
        for action in self._after:
            action()
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()
        self._after.clear()
        self.held.clear()

    def _home(self, tensor: Tensor) -> tuple[bool, Tensor]:
        """Return whether MPI works on `tensor` itself, and the flat tensor that it works on."""
        if tensor.is_sparse:
            raise ValueError(
                "the mpi4py backend moves dense tensors, got a sparse one; use to_dense()."
            )
        tensor = tensor.detach()
        home = tensor if tensor.is_contiguous() else tensor.contiguous()
        if tensor.is_cuda:
            self._devices.add(tensor.device)
            if not cuda_aware():
                home = home.cpu()
            # MPI knows no streams: what is to be sent must have been computed.
            torch.cuda.current_stream(tensor.device).synchronize()
        self.held += [tensor, home]
        return home is tensor, home.reshape(-1)


@functools.cache
def cuda_aware() -> bool:
    """Whether the MPI library says that it takes device pointers."""
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return bool(query is not None and query())

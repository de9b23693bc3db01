"""Describe tensors to MPI: address, count and datatype, without copies."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

# Before version 4, MPI counts elements in 32-bit integers; longer messages are sent in parts.
MAX_COUNT = 1 << 30

# Datatypes for moving data, by element size: any dtype is moved as bits.
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
# Bools are stored as 0 or 1: a sum must be "any" and a product "all" for the result to be a bool.
_BOOL_OPS = {dist.ReduceOp.SUM: MPI.MAX, dist.ReduceOp.PRODUCT: MPI.MIN}
_BITWISE = (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR)
_WIDENED = (torch.float16, torch.bfloat16)


def bytes_spec(tensor: Tensor) -> list[Any]:
    """Return mpi4py's buffer specification for moving a contiguous tensor of any dtype."""
    return _spec(tensor, _MOVED[tensor.element_size()])


def values_spec(tensor: Tensor) -> list[Any]:
    """Return mpi4py's buffer specification for reducing a contiguous tensor."""
    return _spec(tensor, _REDUCED[tensor.dtype])


def _spec(tensor: Tensor, datatype: MPI.Datatype) -> list[Any]:
    # No count: mpi4py derives it, also for buffers that hold one block for each rank.
    return [MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes), datatype]


def parts(numel: int) -> Iterator[slice]:
    """Yield slices of `numel` elements, each of at most MAX_COUNT."""
    for start in range(0, numel, MAX_COUNT):
        yield slice(start, min(start + MAX_COUNT, numel))


def mpi_op(op: Any, dtype: torch.dtype) -> MPI.Op:
    """Return MPI's operation for one of `torch.distributed.ReduceOp`.

    Raises:
        ValueError: MPI has no such operation, or not for this dtype.
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
    """Return whether the sum must be divided by the number of ranks, which MPI does not do."""
    return bool(getattr(op, "op", op) == dist.ReduceOp.AVG)


def is_widened(dtype: torch.dtype) -> bool:
    """Return whether values are summed in float32 because MPI has no datatype for them."""
    return dtype in _WIDENED


class Staging:
    """The buffers that MPI reads and writes for one operation, and the work left to do after it.

    A contiguous tensor in memory that MPI can access is its own buffer. Others are copied: strided
    tensors, and tensors on a GPU if the MPI library is not CUDA-aware.
    """

    def __init__(self) -> None:
        self.keep_alive: list[Tensor] = []  # until MPI is done
        self._after: list[Callable[[], object]] = []
        self._devices: set[torch.device] = set()

    def source(self, tensor: Tensor) -> Tensor:
        """Return a flat buffer from which MPI reads `tensor`."""
        return self._buffer(tensor)[1]

    def target(self, tensor: Tensor) -> Tensor:
        """Return a flat buffer that MPI reads and writes; `finish` copies it back to `tensor`."""
        direct, buffer = self._buffer(tensor)
        if not direct:
            self.run_after(lambda: tensor.copy_(buffer.view(tensor.shape)))
        return buffer

    def run_after(self, action: Callable[[], object]) -> None:
        """Run `action` in `finish`, before the actions that were added earlier."""
        self._after.insert(0, action)

    def finish(self) -> None:
        """Run the actions; called when MPI is done."""
        for action in self._after:
            action()
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()
        self._after.clear()
        self.keep_alive.clear()

    def _buffer(self, tensor: Tensor) -> tuple[bool, Tensor]:
        """Return whether `tensor` is its own buffer, and the flat buffer."""
        if tensor.is_sparse:
            raise ValueError(
                "the mpi4py backend moves dense tensors, got a sparse one; use to_dense()."
            )
        tensor = tensor.detach()
        buffer = tensor if tensor.is_contiguous() else tensor.contiguous()
        if tensor.is_cuda:
            self._devices.add(tensor.device)
            if not cuda_aware():
                buffer = buffer.cpu()
            # MPI does not know CUDA streams: wait until the tensor has been computed.
            torch.cuda.current_stream(tensor.device).synchronize()
        self.keep_alive += [tensor, buffer]
        return buffer is tensor, buffer.reshape(-1)


@functools.cache
def cuda_aware() -> bool:
    """Return whether the MPI library reports that it accepts device pointers."""
    query = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    return bool(query is not None and query())

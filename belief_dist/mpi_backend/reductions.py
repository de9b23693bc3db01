"""Buffers for reductions: the tensor itself, or a float32 copy that is rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from belief_dist.mpi_backend.messages import (
    MAX_COUNT,
    Staging,
    is_average,
    is_widened,
    mpi_op,
    parts,
    values_spec,
)


class Reductions:
    """Helpers shared by the reductions of a communicator."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm

    def reduce_scatter(
        self, staging: Staging, output: Tensor, flat: Tensor, op: Any
    ) -> list[MPI.Request]:
        """Start to reduce block r of `flat` into rank r's `output`."""
        kind = mpi_op(op, flat.dtype)
        flat = widened(flat)
        result = self.result_buffer(staging, output, [flat], op)
        staging.keep_alive += [flat, result]
        if result.numel() <= MAX_COUNT:
            return [self._comm.Ireduce_scatter_block(values_spec(flat), values_spec(result), kind)]
        # Ireduce_scatter_block cannot be split: reduce each block to its rank, in parts.
        return [
            self._comm.Ireduce(
                values_spec(block[part]),
                values_spec(result[part]) if root == self._comm.Get_rank() else None,
                kind,
                root,
            )
            for root, block in enumerate(flat.view(self._comm.Get_size(), -1))
            for part in parts(block.numel())
        ]

    def in_place_buffer(self, staging: Staging, tensor: Tensor, op: Any) -> Tensor:
        """Return a flat buffer to reduce in place; `staging.finish` puts the result in `tensor`."""
        mpi_op(op, tensor.dtype)
        buffer = staging.target(tensor)
        wide = widened(buffer)
        staging.keep_alive.append(wide)
        self._round_later(staging, buffer, wide, op)
        return wide

    def result_buffer(
        self, staging: Staging, output: Tensor, addends: Sequence[Tensor], op: Any
    ) -> Tensor:
        """Return a flat buffer for a sum of `addends`; `staging.finish` puts it in `output`."""
        buffer = staging.target(output)
        dtype = torch.float32 if is_widened(buffer.dtype) else buffer.dtype
        # MPI does not allow the send and receive buffers of a reduction to overlap.
        usable = dtype == buffer.dtype and not any(_overlap(buffer, addend) for addend in addends)
        wide = buffer if usable else torch.empty(buffer.shape, dtype=dtype, device=buffer.device)
        self._round_later(staging, buffer, wide, op)
        return wide

    def _round_later(self, staging: Staging, buffer: Tensor, wide: Tensor, op: Any) -> None:
        if is_average(op):
            staging.run_after(lambda: buffer.copy_(wide.div_(self._comm.Get_size())))
        elif wide is not buffer:
            staging.run_after(lambda: buffer.copy_(wide))


def _overlap(one: Tensor, other: Tensor) -> bool:
    first, second = one.data_ptr(), other.data_ptr()
    return first < second + other.nbytes and second < first + one.nbytes


def widened(flat: Tensor) -> Tensor:
    """Return `flat` in a dtype that MPI can add: 16-bit floats as float32."""
    return flat.float() if is_widened(flat.dtype) else flat

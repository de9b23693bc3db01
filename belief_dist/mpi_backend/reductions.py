"""Where MPI reduces: in the tensors themselves, or beside them and rounded once."""

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
    reduced,
)


class Reductions:
    """What the reductions of a communicator share."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm

    def reduce_scatter(
        self, staging: Staging, output: Tensor, flat: Tensor, op: Any
    ) -> list[MPI.Request]:
        """Start to reduce block r of `flat` into rank r's `output`."""
        kind = mpi_op(op, flat.dtype)
        flat = widened(flat)
        result = self.result(staging, output, [flat], op)
        staging.held += [flat, result]
        if result.numel() <= MAX_COUNT:
            return [self._comm.Ireduce_scatter_block(reduced(flat), reduced(result), kind)]
        return [
            self._comm.Ireduce(
                reduced(block[part]),
                reduced(result[part]) if root == self._comm.Get_rank() else None,
                kind,
                root,
            )
            for root, block in enumerate(flat.view(self._comm.Get_size(), -1))
            for part in parts(block.numel())
        ]

    def summand(self, staging: Staging, tensor: Tensor, op: Any) -> Tensor:
        """Return a flat tensor to reduce in place, of which `tensor` becomes the result."""
        mpi_op(op, tensor.dtype)
        home = staging.target(tensor)
        wide = widened(home)
        staging.held.append(wide)
        self._round_later(staging, home, wide, op)
        return wide

    def result(
        self, staging: Staging, output: Tensor, addends: Sequence[Tensor], op: Any
    ) -> Tensor:
        """Return flat memory for a sum of `addends`, of which `output` becomes the result."""
        home = staging.target(output)
        dtype = torch.float32 if is_widened(home.dtype) else home.dtype
        # MPI allows no memory that is both read and written here.
        apart = dtype == home.dtype and not any(_overlap(home, addend) for addend in addends)
        wide = home if apart else torch.empty(home.shape, dtype=dtype, device=home.device)
        self._round_later(staging, home, wide, op)
        return wide

    def _round_later(self, staging: Staging, home: Tensor, wide: Tensor, op: Any) -> None:
        if is_average(op):
            staging.then(lambda: home.copy_(wide.div_(self._comm.Get_size())))
        elif wide is not home:
            staging.then(lambda: home.copy_(wide))


def _overlap(one: Tensor, other: Tensor) -> bool:
    first, second = one.data_ptr(), other.data_ptr()
    return first < second + other.nbytes and second < first + one.nbytes


def widened(flat: Tensor) -> Tensor:
    """Return `flat`, or what MPI adds in its place."""
    return flat.float() if is_widened(flat.dtype) else flat

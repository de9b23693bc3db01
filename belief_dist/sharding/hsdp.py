"""Shards inside each row of a mesh, replicas of them across the rows: hybrid sharding (HSDP).

A row is usually a node. Gradients are summed inside every row first, each rank its shard, and then
the ranks that keep the same shard sum what their rows have found; between nodes only shards travel.
The order of additions is fixed: ``(g[0,0] + g[0,1] + ...) + (g[1,0] + g[1,1] + ...) + ...`` for the
gradient g[row, column] of each rank, every addition rounded in the compute dtype. Parameters are
gathered inside the row; no row needs another for that.

With numbered micro-batches the order must not know of rows: ``((g0 + g1) + g2) + ...``. Then every
rank sums its part of a shard over the whole mesh, from addends as they are.

Source: Zhao et al., "PyTorch FSDP", arXiv:2304.11277, section 3.2.2.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from belief_dist.sharding.buffer_pool import BufferPool, Handle
from belief_dist.sharding.collectives import RECEIVING, Collectives, ReduceRequest


class HybridShard(Collectives):
    """Sums over a whole mesh from sums over its rows and columns."""

    def __init__(
        self,
        mesh: dist.ProcessGroup,
        row: Collectives,
        column: Collectives,
        in_one_order: Collectives | None = None,
    ) -> None:
        """Combine.

        Args:
            mesh: All ranks; row by row.
            row: The ranks that share the shards between them.
            column: The ranks that keep the same shard as this one.
            in_one_order: All ranks once more, to sum in one order whatever the rows are; or None.
        """
        super().__init__(mesh)
        self._mesh_sums = None if in_one_order is None else _MeshSums(in_one_order, row, column)
        self.shard_index, self.num_shards = row.shard_index, row.num_shards
        self._row, self._column = row, column
        self._running: deque[_HybridSum] = deque()

    def buffer(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Collectives.buffer`; of the row."""
        return self._row.buffer(numel, dtype, device)

    def start_reduce(self, request: ReduceRequest) -> Handle:
        """See `Collectives.start_reduce`; the shard must divide by the number of rows."""
        if self._mesh_sums is not None:
            return self._mesh_sums.start(request)
        # While a bucket travels in the row, its predecessor does so in the column.
        for earlier in list(self._running):
            earlier.advance()
        operation = _HybridSum(self._row, self._column, request)
        self._running = deque(other for other in self._running if not other.is_done)
        self._running.append(operation)
        return operation

    def open_gathers(self, flats: Sequence[Tensor]) -> None:
        """See `Collectives.open_gathers`; inside the row."""
        self._row.open_gathers(flats)

    def start_gather(self, flat: Tensor) -> Handle:
        """See `Collectives.start_gather`; inside the row."""
        return self._row.start_gather(flat)


class _HybridSum:
    """A sum in three stages: in the row, in the column, and back to the column's other ranks."""

    def __init__(self, row: Collectives, column: Collectives, request: ReduceRequest) -> None:
        self._column = column
        self._request = request
        # What is in the shard already comes before the first row, not before its first rank.
        shard = request.shard
        self._of_row = torch.empty_like(shard) if request.accumulate else shard
        self._stage = 0
        in_row = ReduceRequest(request.flat, self._of_row, codec=request.codec)
        self._handle = row.start_reduce(in_row)

    @property
    def is_done(self) -> bool:
        return self._stage == 3

    def advance(self) -> None:
        """Wait for the stage under way, and start the next."""
        if self.is_done:
            return
        self._handle.wait()
        self._stage += 1
        column, request = self._column, self._request
        if self._stage == 1:
            # Codecs serve the row alone: between rows the sums travel in the compute dtype.
            mine = request.shard.view(column.num_shards, -1)[column.shard_index]
            self._handle = column.start_reduce(
                ReduceRequest(self._of_row, mine, request.norm_bins, accumulate=request.accumulate)
            )
        elif self._stage == 2:
            self._handle = column.start_gather(request.shard)

    def wait(self) -> None:
        while not self.is_done:
            self.advance()


class _MeshSums:
    """Sums in the order of all ranks: each sums its part of its shard, then columns gather."""

    def __init__(self, everyone: Collectives, row: Collectives, column: Collectives) -> None:
        self._everyone, self._column = everyone, column
        # Of each rank, which part of the bucket it sums.
        mine = row.shard_index * column.num_shards + column.shard_index
        self._parts = everyone.exchange(mine)
        self._outgoing = BufferPool(RECEIVING, allocate=everyone.buffer)

    def start(self, request: ReduceRequest) -> Handle:
        flat = request.flat
        addends = self._outgoing.take(flat.numel(), flat.dtype, flat.device)
        parts = flat.view(len(self._parts), -1)
        for place, part in zip(addends.view(parts.shape), self._parts, strict=True):
            place.copy_(parts[part])
        mine = request.shard.view(self._column.num_shards, -1)[self._column.shard_index]
        in_order = replace(request, flat=addends, shard=mine)
        handle = self._everyone.start_reduce(in_order)
        return self._outgoing.lend(_MeshSum(handle, self._column, request.shard), addends)


class _MeshSum:
    """A sum over the mesh, which the ranks that keep the same shard then gather."""

    def __init__(self, handle: Handle, column: Collectives, shard: Tensor) -> None:
        self._handle, self._column, self._shard = handle, column, shard

    def wait(self) -> None:
        self._handle.wait()
        self._column.start_gather(self._shard).wait()

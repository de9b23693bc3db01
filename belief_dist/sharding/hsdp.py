"""Shards inside each row of a mesh, replicas of them across the rows: hybrid sharding (HSDP).

A row is usually a node. Gradients are summed inside every row first, each rank its shard, and then
the ranks that keep the same shard sum what their rows have found; between nodes only shards travel.
The order of additions is fixed: ``(g[0,0] + g[0,1] + ...) + (g[1,0] + g[1,1] + ...) + ...`` for the
gradient g[row, column] of each rank, every addition rounded in the compute dtype. Parameters are
gathered inside the row; no row needs another for that.

Or shards over the whole mesh: what the ranks of a column would keep copies of is cut once more,
each keeps what it sums anyway, and parameters are gathered across the rows and then inside. That
takes the least memory, and the network between nodes carries the parameters, too.

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
from belief_dist.sharding.collectives import RECEIVING, Collectives, Done, ReduceRequest


class HybridShard(Collectives):
    """Sums over a whole mesh from sums over its rows and columns."""

    def __init__(
        self,
        mesh: dist.ProcessGroup,
        row: Collectives,
        column: Collectives,
        in_one_order: Collectives | None = None,
        *,
        keeps_copies: bool = True,
    ) -> None:
        """Combine.

        Args:
            mesh: All ranks; row by row.
            row: The ranks that share the shards between them.
            column: The ranks that keep the same shard as this one, or share it.
            in_one_order: All ranks once more, to sum in one order whatever the rows are; or None.
            keeps_copies: Each row has all shards; otherwise all rows together have them once.
        """
        super().__init__(mesh)
        self._row, self._column = row, column
        self._keeps_copies = keeps_copies
        self.shard_index, self.num_shards = row.shard_index, row.num_shards
        if not keeps_copies:  # then a column's shards are neighbours: together they are a row's
            self.num_shards *= column.num_shards
            self.shard_index = row.shard_index * column.num_shards + column.shard_index
        self._mesh_sums: _MeshSums | None = None
        if in_one_order is not None:
            self._mesh_sums = _MeshSums(in_one_order, row, column, keeps_copies)
        self._of_rows = BufferPool(RECEIVING)
        self._sums: deque[_HybridSum] = deque()
        self._gathers: deque[_HybridGather] = deque()

    def buffer(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Collectives.buffer`; of the row."""
        return self._row.buffer(numel, dtype, device)

    def scratch(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Collectives.scratch`; of the row."""
        return self._row.scratch(numel, dtype, device)

    def reserve(self, nbytes: int, device: torch.device, *, in_place: bool) -> None:
        """See `Collectives.reserve`."""
        if self._mesh_sums is None:
            self._row.reserve(nbytes, device, in_place=in_place)
        else:
            self._mesh_sums.everyone.reserve(nbytes, device, in_place=False)

    def late(self) -> list[int]:
        """See `Collectives.late`; in the group of the whole mesh."""
        ranks = {self._row.members[rank] for rank in self._row.late()}
        if self._mesh_sums is not None:
            everyone = self._mesh_sums.everyone
            ranks |= {everyone.members[rank] for rank in everyone.late()}
        return sorted(self.members.index(rank) for rank in ranks)

    def start_reduce(self, request: ReduceRequest) -> Handle:
        """See `Collectives.start_reduce`; with copies, the shard must divide by the rows."""
        if self._mesh_sums is not None:
            return self._mesh_sums.start(request)
        # While a bucket travels in the row, its predecessor does so in the column.
        for earlier in list(self._sums):
            earlier.advance()
        operation = _HybridSum(
            self._row, self._column, request, self._of_rows, keeps_copies=self._keeps_copies
        )
        self._sums = deque(other for other in self._sums if not other.is_done)
        self._sums.append(operation)
        return operation

    def open_gathers(self, flats: Sequence[Tensor]) -> None:
        """See `Collectives.open_gathers`; inside the row."""
        self._row.open_gathers(flats)

    def start_gather(self, flat: Tensor) -> Handle:
        """See `Collectives.start_gather`; inside the row, after across them if rows share."""
        if self._keeps_copies:
            return self._row.start_gather(flat)
        self.close_gathers()
        operation = _HybridGather(self, self._row, self._column, flat)
        self._gathers.append(operation)
        return operation

    def close_gathers(self) -> None:
        """See `Collectives.close_gathers`; gathers go on inside the row."""
        while self._gathers:
            self._gathers.popleft().advance()


class _HybridSum:
    """A sum in stages: in the row, in the column, and with copies back to the column's others."""

    def __init__(
        self,
        row: Collectives,
        column: Collectives,
        request: ReduceRequest,
        pool: BufferPool,
        *,
        keeps_copies: bool,
    ) -> None:
        self._column = column
        self._request = request
        self._pool, self._keeps_copies = pool, keeps_copies
        shard = request.shard
        # What is in the shard already comes before the first row, not before its first rank.
        self._is_apart = request.accumulate or not keeps_copies
        self._of_row = shard
        if self._is_apart:
            numel = shard.numel() * (1 if keeps_copies else column.num_shards)
            self._of_row = pool.take(numel, shard.dtype, shard.device)
        self._last = 3 if keeps_copies else 2
        self._stage = 0
        in_row = ReduceRequest(request.flat, self._of_row, codec=request.codec)
        self._handle = row.start_reduce(in_row)

    @property
    def is_done(self) -> bool:
        return self._stage == self._last

    def advance(self) -> None:
        """Wait for the stage under way, and start the next."""
        if self.is_done:
            return
        self._handle.wait()
        self._stage += 1
        column, request = self._column, self._request
        if self._stage == 1:
            # Codecs serve the row alone: between rows the sums travel in the compute dtype.
            mine = request.shard
            if self._keeps_copies:
                mine = mine.view(column.num_shards, -1)[column.shard_index]
            self._handle = column.start_reduce(
                ReduceRequest(self._of_row, mine, request.norm_bins, accumulate=request.accumulate)
            )
            return
        if self._stage == 2:
            if self._is_apart:
                self._pool.give_back(self._of_row)
            if self._keeps_copies:
                self._handle = column.start_gather(request.shard)

    def wait(self) -> None:
        while not self.is_done:
            self.advance()


class _HybridGather:
    """A gather in two stages: across the rows, and inside."""

    def __init__(
        self, mesh: HybridShard, row: Collectives, column: Collectives, flat: Tensor
    ) -> None:
        self._mesh, self._row, self._flat = mesh, row, flat
        of_row = flat.view(row.num_shards, -1)[row.shard_index]
        self._handle = column.start_gather(of_row) if column.num_shards > 1 else Done()
        self._has_advanced = False

    def advance(self) -> None:
        """Wait for the first stage, and start the second."""
        self._handle.wait()
        self._handle = self._row.start_gather(self._flat) if self._row.num_shards > 1 else Done()
        self._has_advanced = True

    def wait(self) -> None:
        if not self._has_advanced:
            self._mesh.close_gathers()  # those before it first: messages have no tags
        self._handle.wait()


class _MeshSums:
    """Sums in the order of all ranks: each sums its part, which with copies columns gather."""

    def __init__(
        self, everyone: Collectives, row: Collectives, column: Collectives, keeps_copies: bool
    ) -> None:
        self.everyone, self._column, self._keeps_copies = everyone, column, keeps_copies
        # Of each rank, which part of the bucket it sums.
        mine = row.shard_index * column.num_shards + column.shard_index
        self._parts = everyone.exchange(mine)
        self._outgoing = BufferPool(RECEIVING, allocate=everyone.scratch)

    def start(self, request: ReduceRequest) -> Handle:
        flat = request.flat
        addends = self._outgoing.take(flat.numel(), flat.dtype, flat.device)
        parts = flat.view(len(self._parts), -1)
        for place, part in zip(addends.view(parts.shape), self._parts, strict=True):
            place.copy_(parts[part])
        mine = request.shard
        if self._keeps_copies:
            mine = mine.view(self._column.num_shards, -1)[self._column.shard_index]
        in_order = replace(request, flat=addends, shard=mine)
        handle = self.everyone.start_reduce(in_order)
        if self._keeps_copies:
            handle = _MeshSum(handle, self._column, request.shard)
        return self._outgoing.lend(handle, addends)


class _MeshSum:
    """A sum over the mesh, which the ranks that keep the same shard then gather."""

    def __init__(self, handle: Handle, column: Collectives, shard: Tensor) -> None:
        self._handle, self._column, self._shard = handle, column, shard

    def wait(self) -> None:
        self._handle.wait()
        self._column.start_gather(self._shard).wait()

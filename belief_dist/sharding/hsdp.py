"""Shards inside each row of a mesh, copies of them across the rows: hybrid sharding (HSDP).

A row is usually a node. Gradients are summed inside every row first, each rank its shard, and then
the ranks that keep the same shard sum what their rows have found; between nodes only shards travel.
The order of additions is fixed: ``(g[0,0] + g[0,1] + ...) + (g[1,0] + g[1,1] + ...) + ...`` for the
gradient g[row, column] of each rank, every addition rounded in the compute dtype. Parameters are
gathered inside the row; no row needs another for that.

Source: Zhao et al., "PyTorch FSDP", arXiv:2304.11277, section 3.2.2.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from belief_dist.sharding.collectives import Collectives, Handle


class Hybrid(Collectives):
    """Sums over a whole mesh from sums over its rows and columns."""

    def __init__(self, mesh: dist.ProcessGroup, row: Collectives, column: Collectives) -> None:
        """Combine.

        Args:
            mesh: All ranks; row by row.
            row: The ranks that share the shards between them.
            column: The ranks that keep the same shard as this one.
        """
        super().__init__(mesh)
        self.rank, self.world_size = row.rank, row.world_size
        self._row, self._column = row, column
        self._in_flight: deque[_HybridReduce] = deque()

    def start_reduce(
        self, flat: Tensor, shard: Tensor, bins: Tensor | None, *, accumulate: bool = False
    ) -> Handle:
        """See `Collectives.start_reduce`; `shard` must divide by the number of rows."""
        # While a bucket travels in the row, its predecessor does so in the column.
        for earlier in list(self._in_flight):
            earlier.advance()
        reduce = _HybridReduce(self._row, self._column, flat, shard, bins, accumulate)
        self._in_flight = deque(other for other in self._in_flight if not other.is_done)
        self._in_flight.append(reduce)
        return reduce

    def start_gather(self, flat: Tensor) -> Handle:
        """See `Collectives.start_gather`; inside the row."""
        return self._row.start_gather(flat)


class _HybridReduce:
    """A sum in three stages: in the row, in the column, and back to the column's other ranks."""

    def __init__(
        self,
        row: Collectives,
        column: Collectives,
        flat: Tensor,
        shard: Tensor,
        bins: Tensor | None,
        accumulate: bool,
    ) -> None:
        self._column = column
        self._shard, self._bins, self._accumulate = shard, bins, accumulate
        # What is in the shard already comes before the first row, not before its first rank.
        self._of_row = torch.empty_like(shard) if accumulate else shard
        self._stage = 0
        self._handle = row.start_reduce(flat, self._of_row, None)

    @property
    def is_done(self) -> bool:
        return self._stage == 3

    def advance(self) -> None:
        """Wait for the stage under way, and start the next."""
        if self.is_done:
            return
        self._handle.wait()
        self._stage += 1
        if self._stage == 1:
            mine = self._shard.view(self._column.world_size, -1)[self._column.rank]
            self._handle = self._column.start_reduce(
                self._of_row, mine, self._bins, accumulate=self._accumulate
            )
        elif self._stage == 2:
            self._handle = self._column.start_gather(self._shard)

    def wait(self) -> None:
        while not self.is_done:
            self.advance()

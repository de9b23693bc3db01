"""What ranks need who share the memory of a host: buffers there, and lines to each other."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from belief_dist.host_memory import Team
from belief_dist.sharding.buffer_pool import BufferPool, Handle
from belief_dist.sharding.collectives import RECEIVING, Collectives, ReduceRequest
from belief_dist.sharding.host_lines import RING, HostLines

# What a late rank has not done, in errors.
ADDENDS = "come with its gradients"
SUMS = "summed the gradients"
OPENED = "come to where parameters are gathered"
PARAMETERS = "written its parameters"


class HostCollectives(Collectives):
    """Ranks of which some share a host."""

    def __init__(
        self, group: dist.ProcessGroup, team: Team, here: Sequence[int], timeout: timedelta
    ) -> None:
        """Connect; called by all ranks of the group.

        Args:
            group: The ranks.
            team: As which they have met.
            here: Those of this host, in the order of the group.
            timeout: After which a rank that is waited for becomes an error.
        """
        super().__init__(group)
        self._lines = HostLines(team, self.rank, here, self.exchange, timeout)
        self._arena = team.arena
        # In the place of addends that lie elsewhere, and of parameters that have moved. Pools know
        # the arena alone: a cycle would keep its memory until the collector runs.
        self._staging = BufferPool(RECEIVING, allocate=team.arena.zeros)
        self._moved = BufferPool(RING, allocate=team.arena.zeros)
        self._sums = self._gathers = 0  # how many this rank has begun

    def buffer(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Collectives.buffer`; in memory that the host's other ranks have mapped."""
        return self._arena.zeros(numel, dtype, device)

    def scratch(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Collectives.scratch`; likewise."""
        return self._arena.zeros(numel, dtype, device)

    def _shared(self, flat: Tensor, pool: BufferPool) -> Tensor:
        """Return `flat`, or a buffer of its size from `pool` if `flat` is not in shared memory.

        What was made there may have moved: torch.multiprocessing moves tensors that it sends.
        """
        if self._arena.offset_of(flat) is not None:
            return flat
        return pool.take(flat.numel(), flat.dtype, flat.device)

    def _shared_addends(self, request: ReduceRequest) -> Tensor:
        addends = self._shared(request.flat, self._staging)
        return addends if addends is request.flat else addends.copy_(request.flat)

    def _lend_addends(self, sum_: Handle, addends: Tensor, request: ReduceRequest) -> Handle:
        return sum_ if addends is request.flat else self._staging.lend(sum_, addends)

    def _lend_place(self, gather: Handle, place: Tensor, flat: Tensor, own: Tensor) -> Handle:
        if place is flat:
            return gather
        return self._moved.lend(_CopyBack(gather, place, flat, own), place)


class _CopyBack:
    """A gather into another place than where it is wanted."""

    def __init__(self, gather: Handle, place: Tensor, flat: Tensor, own: Tensor) -> None:
        """Copy all of `place` to `flat` when `gather` has ended, but the piece `own` of `flat`."""
        self._gather, self._place, self._flat = gather, place, flat
        self._start = own.storage_offset() - flat.storage_offset()
        self._stop = self._start + own.numel()

    def wait(self) -> None:
        self._gather.wait()
        self._flat[: self._start].copy_(self._place[: self._start])
        self._flat[self._stop :].copy_(self._place[self._stop :])

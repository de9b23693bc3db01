"""Sums and gathers between ranks of one host, which read and write each other's memory.

A sum reads its addends where they lie, in the ranks' own buffers, in the order of the ranks; a
gather writes every rank's piece into the others' buffers. Nothing is sent, staged or copied twice.

A rank waits for what a peer does by itself, never for where the peer's script gets to: a sum that
nobody takes in time, because the script stands behind a collective of its own, is taken by a
thread.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from belief_dist.host_memory import Team
from belief_dist.sharding.buffer_pool import Handle
from belief_dist.sharding.collectives import ReduceRequest
from belief_dist.sharding.host_collectives import (
    ADDENDS,
    OPENED,
    PARAMETERS,
    SUMS,
    HostCollectives,
)
from belief_dist.sharding.host_lines import MESSAGE_BYTES, RING, HostLines, Signal

# How long a sum that could be taken waits for the script. On busy cores the thread seldom does it.
_GRACE_SECONDS = 0.1
_WAIT_SECONDS = 0.1


class SharedMemory(HostCollectives):
    """Ranks of one host; see the module."""

    def __init__(self, group: dist.ProcessGroup, team: Team, timeout: timedelta) -> None:
        """Connect; called by all ranks of the group.

        Args:
            group: Ranks of one host.
            team: As which they have met.
            timeout: After which a rank that is waited for becomes an error.
        """
        super().__init__(group, team, range(dist.get_world_size(group)), timeout)
        self._opened = self._messages = 0  # how many this rank has begun
        # Buffers whose gathers are to start, by address, and where the others write.
        self._open: deque[tuple[int, Tensor]] = deque()
        # Sums under way, in order. A thread shares them, and what they write to.
        self._lock = threading.RLock()
        self._pending: deque[_OrderedSum] = deque()
        self._has_pending = threading.Event()
        weakref.finalize(self, self._has_pending.set).atexit = False  # the thread ends
        arguments = (weakref.ref(self), self._has_pending)
        threading.Thread(target=_take_sums, args=arguments, daemon=True).start()

    # - Sums

    def start_reduce(self, request: ReduceRequest) -> Handle:
        """See `Collectives.start_reduce`; sums in rank order in the dtype of the shard."""
        addends = self._shared_addends(request)
        number, self._sums = self._sums, self._sums + 1
        if number >= RING:
            self._take_ready()
            self._lines.wait(Signal.SUMMED, number - RING + 1, SUMS)
        self._lines.tell(Signal.PUBLISHED, number, addends)
        operation = _OrderedSum(self, number, request)
        with self._lock:
            self._pending.append(operation)
        self._lines.post(Signal.PUBLISHED, number + 1)
        self._take_ready()
        self._has_pending.set()
        return self._lend_addends(operation, addends, request)

    def _take_ready(self) -> None:
        """Take all sums whose addends are there, in their order."""
        with self._lock:
            while self._pending:
                number = self._pending[0].number
                if not self._lines.have_reached(Signal.PUBLISHED, number + 1):
                    return
                self._take(number, self._pending[0].request)
                self._pending.popleft()
                self._lines.post(Signal.SUMMED, number + 1)

    def _take(self, number: int, request: ReduceRequest) -> None:
        own = request.flat.view(self.num_shards, -1)[self.shard_index]
        start = self.shard_index * own.numel()
        request.add_(
            [
                own
                if rank == self.rank
                else self._lines.told(Signal.PUBLISHED, rank, number, own, start)
                for rank in range(self.world_size)
            ]
        )

    def finish_sum(self, number: int) -> None:
        """Return when a sum is complete and nobody reads this rank's addends any more."""
        while self._is_pending(number):
            self._lines.wait(Signal.PUBLISHED, number + 1, ADDENDS)
            self._take_ready()
        self._take_ready()  # before others are waited for
        self._lines.wait(Signal.SUMMED, number + 1, SUMS)

    def _is_pending(self, number: int) -> bool:
        with self._lock:
            return bool(self._pending) and self._pending[0].number <= number

    def help_once(self) -> bool:
        """Take sums that could be taken and that the script has left lying; called by a thread.

        Returns:
            Whether there is more to do.
        """
        with self._lock:
            number = self._pending[0].number if self._pending else None
        if number is None or self._lines.has_failed:
            return False
        if self._lines.have_reached(Signal.PUBLISHED, number + 1, _WAIT_SECONDS):
            time.sleep(_GRACE_SECONDS)
            if self._is_pending(number):
                self._take_ready()
        return True

    # - Gathers

    def open_gathers(self, flats: Sequence[Tensor]) -> None:
        """See `Collectives.open_gathers`."""
        for flat in flats[: RING // 2 - len(self._open)]:  # the rest when they start
            self._open_one(flat)
        self._lines.post(Signal.OPENED, self._opened)

    def _open_one(self, flat: Tensor) -> None:
        if self._opened >= RING:
            self._lines.wait(Signal.WRITTEN, self._opened - RING + 1, PARAMETERS)
        place = self._shared(flat, self._moved)
        self._lines.tell(Signal.OPENED, self._opened, place)
        self._opened += 1
        self._open.append((flat.data_ptr(), place))

    def start_gather(self, flat: Tensor) -> Handle:
        """See `Collectives.start_gather`; returns when this rank's piece is in all buffers."""
        if not self._open:
            self._open_one(flat)
            self._lines.post(Signal.OPENED, self._opened)
        address, place = self._open.popleft()
        if address != flat.data_ptr():
            self._lines.fail("gathers were opened in another order than they are started in")
        number, self._gathers = self._gathers, self._gathers + 1
        self._lines.wait(Signal.OPENED, number + 1, OPENED)
        own = flat.view(self.num_shards, -1)[self.shard_index]
        for distance in range(1, self.world_size):  # every rank begins at another one
            peer = (self.rank + distance) % self.world_size
            start = self.shard_index * own.numel()
            self._lines.told(Signal.OPENED, peer, number, own, start).copy_(own)
        self._lines.post(Signal.WRITTEN, number + 1)
        return self._lend_place(_Gather(self._lines, number), place, flat, own)

    # - The small message of a step

    def sum_(self, message: Tensor) -> None:
        """See `Collectives.sum_`."""
        if message.nbytes > MESSAGE_BYTES:
            super().sum_(message)
            return
        number, self._messages = self._messages, self._messages + 1
        # Of two places: whoever writes to one again has seen that all others write to the other,
        # and so have read this one.
        self._lines.message(self.rank, number, message).copy_(message)
        self._lines.post(Signal.MESSAGE, number + 1)
        self._lines.wait(Signal.MESSAGE, number + 1, "come to its step")
        for peer in self._lines.peers:
            message += self._lines.message(peer, number, message)


def _take_sums(owner: weakref.ref[SharedMemory], has_pending: threading.Event) -> None:
    """Help an optimizer's rank as long as it lives."""
    while True:
        has_pending.wait()
        has_pending.clear()
        more = True
        while more:
            comm = owner()
            if comm is None:
                return
            with torch.no_grad():
                more = comm.help_once()
            del comm


class _OrderedSum:
    """A sum whose addends are read where they lie."""

    def __init__(self, comm: SharedMemory, number: int, request: ReduceRequest) -> None:
        self._comm = comm
        self.number, self.request = number, request

    def wait(self) -> None:
        self._comm.finish_sum(self.number)


class _Gather:
    """Pieces that the others write into this rank's buffer."""

    def __init__(self, lines: HostLines, number: int) -> None:
        self._lines, self._number = lines, number

    def has_ended(self) -> bool:
        return self._lines.have_reached(Signal.WRITTEN, self._number + 1)

    def wait(self) -> None:
        self._lines.wait(Signal.WRITTEN, self._number + 1, PARAMETERS)

"""Sums and gathers of ranks on several hosts, of which some share a host's memory.

A sum still has one order, that of the ranks: the owner of a piece reads its host's addends where
they lie and receives the others, each of which crosses the network, as adding some of them before
they travel would change the order. A gather has an order of nothing: every piece crosses the
network once for each host, to one rank there, which writes it into the buffers of its host.

What arrives must be passed on when it comes, and not when the script gets there: a thread waits
for it.
"""

from __future__ import annotations

import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from belief_dist.host_memory import Team
from belief_dist.sharding.buffer_pool import BufferPool, Handle
from belief_dist.sharding.collectives import RECEIVING, ReduceRequest, Works
from belief_dist.sharding.host_collectives import (
    ADDENDS,
    OPENED,
    PARAMETERS,
    SUMS,
    HostCollectives,
)
from belief_dist.sharding.host_lines import RING, HostLines, Signal
from belief_dist.sharding.point_to_point import Chunk, add_chunks, await_chunk, post_chunks


class AcrossHosts(HostCollectives):
    """Ranks of several hosts; see the module."""

    def __init__(self, group: dist.ProcessGroup, team: Team, timeout: timedelta) -> None:
        """Connect; called by all ranks of the group.

        Args:
            group: The ranks.
            team: As which they have met.
            timeout: After which a rank that is waited for becomes an error.
        """
        hosts = team.hosts
        by_host = [[r for r, host in enumerate(hosts) if host == number] for number in {*hosts}]
        self._here = by_host[hosts[dist.get_rank(group)]]
        super().__init__(group, team, self._here, timeout)
        self._away = [rank for rank in range(self.world_size) if rank not in self._here]
        # In turn, so that no two ranks of a host send to the same at once.
        self._away = [rank for rank in self._away if rank > self.rank] + [
            rank for rank in self._away if rank < self.rank
        ]

        def relay(rank: int, host: list[int]) -> int:
            """Return which rank of a host receives a rank's parameters for all."""
            return host[by_host[hosts[rank]].index(rank) % len(host)]

        self._relays = [relay(self.rank, host) for host in by_host if host is not self._here]
        self._relayed = [rank for rank in self._away if relay(rank, self._here) == self.rank]
        self._inboxes = BufferPool(RECEIVING)
        self._works: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        weakref.finalize(self, self._works.put, None).atexit = False  # the thread ends
        threading.Thread(target=_do_all, args=(self._works,), daemon=True).start()

    def start_reduce(self, request: ReduceRequest) -> Handle:
        """See `Collectives.start_reduce`; sums in rank order in the dtype of the shard."""
        assert self._group is not None
        flat = request.flat
        addends = self._shared_addends(request)
        number, self._sums = self._sums, self._sums + 1
        if number >= RING:
            self._lines.wait(Signal.SUMMED, number - RING + 1, SUMS)
        pieces = addends.view(self.world_size, -1)
        numel = pieces.shape[1]
        inbox = self._inboxes.take(len(self._away) * numel, flat.dtype, flat.device)
        arriving = dict(zip(self._away, inbox.view(len(self._away), -1), strict=True))
        chunks, sent = post_chunks(
            self._group,
            list(reversed(arriving.items())),
            [(rank, pieces[rank]) for rank in self._away],
            request.codec.unit,
        )
        self._lines.tell(Signal.PUBLISHED, number, addends)
        self._lines.post(Signal.PUBLISHED, number + 1)
        own = {self.rank: pieces[self.rank]}
        work = _Sum(self._lines, number, request, own, arriving, chunks, sent)
        self._works.put(work)
        return self._lend_addends(self._inboxes.lend(work, inbox), addends, request)

    def start_gather(self, flat: Tensor) -> Handle:
        """See `Collectives.start_gather`."""
        assert self._group is not None
        number, self._gathers = self._gathers, self._gathers + 1
        if number >= RING:
            self._lines.wait(Signal.WRITTEN, number - RING + 1, PARAMETERS)
        own = flat.view(self.world_size, -1)[self.rank]
        place = self._shared(flat, self._moved)
        pieces = place.view(self.world_size, -1)
        if place is not flat:
            pieces[self.rank].copy_(own)
        self._lines.tell(Signal.OPENED, number, place)
        self._lines.post(Signal.OPENED, number + 1)
        chunks, sent = post_chunks(
            self._group,
            [(rank, pieces[rank]) for rank in reversed(self._relayed)],
            [(rank, pieces[self.rank]) for rank in self._relays],
        )
        work = _Gather(
            self._lines, number, {r: pieces[r] for r in (self.rank, *self._relayed)}, chunks, sent
        )
        self._works.put(work)
        return self._lend_place(work, place, flat, own)


class _Work(ABC):
    """What a thread does in its turn."""

    def __init__(
        self,
        lines: HostLines,
        number: int,
        chunks: Sequence[Chunk],
        sent: Sequence[dist.Work | None],
    ) -> None:
        self._lines, self._number = lines, number
        self._chunks, self._sent = chunks, sent
        self._is_done = threading.Event()
        self._error: Exception | None = None

    @abstractmethod
    def _do(self) -> None: ...

    @abstractmethod
    def _await_peers(self) -> None: ...

    def run(self) -> None:
        try:
            self._do()
            Works(self._sent).wait()
        except Exception as error:  # raised again where it is waited for
            self._error = error
            self._lines.give_up(str(error))
        self._chunks, self._sent = (), ()
        self._is_done.set()

    def wait(self) -> None:
        self._is_done.wait()  # what it waits for has deadlines
        if self._error is not None:
            raise RuntimeError(str(self._error)) from self._error
        self._await_peers()


class _Sum(_Work):
    """The addends of the host, where they lie, and those that arrive."""

    def __init__(
        self,
        lines: HostLines,
        number: int,
        request: ReduceRequest,
        own: dict[int, Tensor],
        arriving: dict[int, Tensor],
        chunks: Sequence[Chunk],
        sent: Sequence[dist.Work | None],
    ) -> None:
        super().__init__(lines, number, chunks, sent)
        self._request, self._own, self._arriving = request, own, arriving

    def _do(self) -> None:
        self._lines.wait(Signal.PUBLISHED, self._number + 1, ADDENDS)
        pieces = {**self._own, **self._arriving}
        ((rank, like),) = self._own.items()
        for peer in self._lines.peers:
            pieces[peer] = self._lines.told(
                Signal.PUBLISHED, peer, self._number, like, rank * like.numel()
            )
        in_order = [piece for _, piece in sorted(pieces.items())]
        add_chunks(self._chunks, in_order, self._request)
        self._lines.post(Signal.SUMMED, self._number + 1)

    def _await_peers(self) -> None:
        self._lines.wait(Signal.SUMMED, self._number + 1, SUMS)


class _Gather(_Work):
    """The pieces that this rank writes into the buffers of its host: its own, and what arrives."""

    def __init__(
        self,
        lines: HostLines,
        number: int,
        pieces: dict[int, Tensor],
        chunks: Sequence[Chunk],
        sent: Sequence[dist.Work | None],
    ) -> None:
        super().__init__(lines, number, chunks, sent)
        self._pieces = pieces

    def _do(self) -> None:
        self._lines.wait(Signal.OPENED, self._number + 1, OPENED)
        for chunk in self._chunks:
            await_chunk(chunk)
        for rank, piece in self._pieces.items():
            for peer in self._lines.peers:
                start = rank * piece.numel()
                place = self._lines.told(Signal.OPENED, peer, self._number, piece, start)
                place.copy_(piece)
        self._lines.post(Signal.WRITTEN, self._number + 1)

    def _await_peers(self) -> None:
        self._lines.wait(Signal.WRITTEN, self._number + 1, PARAMETERS)

    def has_ended(self) -> bool:
        return self._is_done.is_set() and self._lines.have_reached(Signal.WRITTEN, self._number + 1)


def _do_all(works: queue.SimpleQueue[_Work | None]) -> None:
    with torch.no_grad():
        while (work := works.get()) is not None:
            work.run()
            del work  # and with it the buffers that it holds

"""Sums and gathers by messages between every two ranks, for backends without good ones: gloo."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from belief_dist.sharding.codec import BLOCK_BYTES, elements_of, sum_pieces_
from belief_dist.sharding.collectives import Collectives, Handle, OrderedReduce, Staging, Works

# Larger messages let the two directions of a TCP connection take turns instead of running at once.
_CHUNK_BYTES = 1 << 20


class DirectExchange(Collectives):
    """Pieces travel directly between every two ranks, in chunks, both ways at once."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__(group)
        assert group is not None
        self._peers = dist.get_process_group_ranks(group)
        self._staging = Staging()

    def start_reduce(
        self, flat: Tensor, shard: Tensor, bins: Tensor | None, *, accumulate: bool = False
    ) -> Handle:
        """See `Collectives.start_reduce`; sums in rank order in the dtype of `shard`."""
        pieces = flat.view(self.world_size, -1)
        piece_bytes = pieces[0].nbytes
        buffer = self._staging.take((self.world_size - 1) * piece_bytes, flat.device)
        inbox = buffer[: (self.world_size - 1) * piece_bytes].view(flat.dtype)
        arriving = list(inbox.view(self.world_size - 1, -1))
        arriving.insert(self.rank, pieces[self.rank])
        return _DirectReduce(self, pieces, arriving, shard, bins, accumulate, self._staging, buffer)

    def start_gather(self, flat: Tensor) -> Handle:
        """See `Collectives.start_gather`."""
        pieces = flat.view(self.world_size, -1)
        works: list[dist.Work] = []
        for start, stop in self._chunks(pieces[0]):
            outgoing = pieces[self.rank, start:stop]
            for to, source in self._partners():
                works.append(self._receive(pieces[source, start:stop], source))
                works.append(self._send(outgoing, to))
        return Works(works)

    def _chunks(self, piece: Tensor) -> list[tuple[int, int]]:
        step = _CHUNK_BYTES // piece.element_size()
        if piece.dtype == torch.uint8:
            step -= step % BLOCK_BYTES
        return [(i, min(i + step, piece.numel())) for i in range(0, piece.numel(), step)]

    def _partners(self) -> list[tuple[int, int]]:
        """Return (rank to send to, rank to receive from) for each round; all differ per round."""
        size = self.world_size
        return [((self.rank + d) % size, (self.rank - d) % size) for d in range(1, size)]

    def _send(self, tensor: Tensor, to: int) -> dist.Work:
        work = dist.isend(tensor, self._peers[to], group=self._group)
        assert work is not None
        return work

    def _receive(self, tensor: Tensor, source: int) -> dist.Work:
        work = dist.irecv(tensor, self._peers[source], group=self._group)
        assert work is not None
        return work


class _DirectReduce(OrderedReduce):
    def __init__(
        self,
        link: DirectExchange,
        outgoing: Tensor,  # (world_size, shard_numel)
        arriving: Sequence[Tensor],  # world_size times (shard_numel,), own piece included
        shard: Tensor,
        bins: Tensor | None,
        accumulate: bool,
        staging: Staging,
        buffer: Tensor,
    ) -> None:
        super().__init__(staging, buffer)
        self._arriving = arriving
        self._shard = shard
        self._bins = bins
        self._accumulate = accumulate
        self._received: list[tuple[int, int, list[dist.Work]]] = []
        self._sent: list[dist.Work] = []
        for start, stop in link._chunks(outgoing[0]):
            works = []
            for to, source in link._partners():
                works.append(link._receive(arriving[source][start:stop], source))
                self._sent.append(link._send(outgoing[to, start:stop], to))
            self._received.append((start, stop, works))

    def _finish(self) -> None:
        for start, stop, works in self._received:
            for work in works:
                work.wait()
            # While the chunk is still in cache.
            pieces = [piece[start:stop] for piece in self._arriving]
            window = elements_of(start, stop, pieces[0].dtype)
            sum_pieces_(self._shard[window], pieces, self._bins, accumulate=self._accumulate)
        for work in self._sent:
            work.wait()

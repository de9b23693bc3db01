"""Sums and gathers by messages between every two ranks, for backends without good ones: gloo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from belief_dist.sharding.buffer_pool import BufferPool, Handle
from belief_dist.sharding.collectives import RECEIVING, Collectives, ReduceRequest, Works

# Larger messages let the two directions of a TCP connection take turns instead of running at once.
_CHUNK_BYTES = 1 << 20


class PointToPoint(Collectives):
    """Pieces travel directly between every two ranks, in chunks, both ways at once."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__(group)
        assert group is not None
        self._inboxes = BufferPool(RECEIVING)
        members = dist.get_process_group_ranks(group)
        # In each round (global rank and shard to send to, to receive from); no two are alike, so
        # that in a round every rank is sent to by one other.
        self._rounds = [
            _Round(members[to], to, members[source], source)
            for distance in range(1, self.world_size)
            for to in [(self.rank + distance) % self.world_size]
            for source in [(self.rank - distance) % self.world_size]
        ]

    def start_reduce(self, request: ReduceRequest) -> Handle:
        """See `Collectives.start_reduce`; sums in rank order in the dtype of the shard."""
        group, flat = self._group, request.flat
        # Sent from where gradients lie; the pool keeps the inbox until the sum is complete.
        outgoing = flat.view(self.num_shards, -1)
        numel = outgoing.shape[1]
        inbox = self._inboxes.take((self.num_shards - 1) * numel, flat.dtype, flat.device)
        arriving = list(inbox.view(self.num_shards - 1, numel))
        arriving.insert(self.shard_index, outgoing[self.shard_index])  # read where it lies
        chunks, sent = [], []
        for start, stop in _chunks(numel, flat.element_size(), request.codec.unit):
            received = []
            for peers in self._rounds:
                place = arriving[peers.from_shard][start:stop]
                received.append((dist.irecv(place, peers.source, group=group), peers.source))
                sent.append(dist.isend(outgoing[peers.to_shard, start:stop], peers.to, group=group))
            chunks.append(_Chunk(start, stop, received))
        return self._inboxes.lend(_OrderedSum(chunks, sent, arriving, request), inbox)

    def start_gather(self, flat: Tensor) -> Handle:
        """See `Collectives.start_gather`."""
        group = self._group
        pieces = flat.view(self.num_shards, -1)
        works: list[dist.Work | None] = []
        for start, stop in _chunks(pieces.shape[1], flat.element_size(), 1):
            own = pieces[self.shard_index, start:stop]
            for peers in self._rounds:
                place = pieces[peers.from_shard, start:stop]
                works.append(dist.irecv(place, peers.source, group=group))
                works.append(dist.isend(own, peers.to, group=group))
        return Works(works)


class _Round(NamedTuple):
    to: int
    to_shard: int
    source: int
    from_shard: int


class _Chunk(NamedTuple):
    start: int
    stop: int
    received: list[tuple[dist.Work | None, int]]  # with the global rank of the sender


def _chunks(numel: int, itemsize: int, unit: int) -> list[tuple[int, int]]:
    """Cut a piece into [start, stop) of about `_CHUNK_BYTES` and of whole units."""
    step = _CHUNK_BYTES // itemsize
    step -= step % unit
    return [(start, min(start + step, numel)) for start in range(0, numel, step)]


class _OrderedSum:
    """Pieces on their way, which are added chunk by chunk as they arrive."""

    def __init__(
        self,
        chunks: Sequence[_Chunk],
        sent: Sequence[dist.Work | None],
        arriving: Sequence[Tensor],  # num_shards times (piece_numel,), the own piece included
        request: ReduceRequest,
    ) -> None:
        self._chunks, self._sent = chunks, sent
        self._arriving, self._request = arriving, request

    def wait(self) -> None:
        for start, stop, received in self._chunks:
            for work, source in received:
                try:
                    Works([work]).wait()
                except RuntimeError as error:
                    raise RuntimeError(f"nothing from rank {source} ({error})") from error
            # While the chunk is still in cache.
            self._request.add_([piece[start:stop] for piece in self._arriving], start, stop)
        # The caller may write to the gradients again when this returns.
        Works(self._sent).wait()

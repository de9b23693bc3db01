"""Sums and gathers by messages between every two ranks, for backends without good ones: gloo."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
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
        # In each round a rank sends to one other, and no two send to the same.
        distances = range(1, self.world_size)
        self._targets = [(self.rank + distance) % self.world_size for distance in distances]
        self._sources = [(self.rank - distance) % self.world_size for distance in distances]

    def start_reduce(self, request: ReduceRequest) -> Handle:
        """See `Collectives.start_reduce`; sums in rank order in the dtype of the shard."""
        assert self._group is not None
        flat = request.flat
        # Sent from where gradients lie; the pool keeps the inbox until the sum is complete.
        outgoing = flat.view(self.num_shards, -1)
        numel = outgoing.shape[1]
        inbox = self._inboxes.take((self.num_shards - 1) * numel, flat.dtype, flat.device)
        pieces = list(inbox.view(self.num_shards - 1, numel))
        pieces.insert(self.shard_index, outgoing[self.shard_index])  # read where it lies
        chunks, sent = post_chunks(
            self._group,
            [(source, pieces[source]) for source in self._sources],
            [(target, outgoing[target]) for target in self._targets],
            request.codec.unit,
        )
        return self._inboxes.lend(_OrderedSum(chunks, sent, pieces, request), inbox)

    def start_gather(self, flat: Tensor) -> Handle:
        """See `Collectives.start_gather`."""
        assert self._group is not None
        pieces = flat.view(self.num_shards, -1)
        chunks, sent = post_chunks(
            self._group,
            [(source, pieces[source]) for source in self._sources],
            [(target, pieces[self.shard_index]) for target in self._targets],
        )
        return Works([*(work for chunk in chunks for work, _ in chunk.received), *sent])


class Chunk(NamedTuple):
    """Elements [start, stop) of every piece that arrives."""

    start: int
    stop: int
    received: list[tuple[dist.Work | None, int]]  # with the sender


def post_chunks(
    group: dist.ProcessGroup,
    arriving: Sequence[tuple[int, Tensor]],
    outgoing: Sequence[tuple[int, Tensor]],
    unit: int = 1,
) -> tuple[list[Chunk], list[dist.Work | None]]:
    """Start to receive and to send pieces of one size, chunk by chunk.

    Args:
        group: Over which they travel.
        arriving: Where to put the piece of each rank of the group.
        outgoing: What to send to each.
        unit: Elements that stay together.

    Returns:
        What arrives, and the messages that were sent.
    """
    like = next(piece for _, piece in (*arriving, *outgoing))
    step = _CHUNK_BYTES // like.element_size()
    step -= step % unit
    members = dist.get_process_group_ranks(group)
    chunks: list[Chunk] = []
    sent: list[dist.Work | None] = []
    for start in range(0, like.numel(), step):
        chunk = Chunk(start, min(start + step, like.numel()), [])
        part = slice(chunk.start, chunk.stop)
        for incoming, going in zip_longest(arriving, outgoing):
            if incoming is not None:
                source, place = incoming
                work = dist.irecv(place[part], members[source], group=group)
                chunk.received.append((work, source))
            if going is not None:
                target, piece = going
                sent.append(dist.isend(piece[part], members[target], group=group))
        chunks.append(chunk)
    return chunks, sent


def await_chunk(chunk: Chunk) -> None:
    """Wait for what arrives.

    Raises:
        RuntimeError: Naming the rank of the group that has not sent.
    """
    for work, source in chunk.received:
        try:
            Works([work]).wait()
        except RuntimeError as error:
            raise RuntimeError(f"nothing from rank {source} ({error})") from error


def add_chunks(chunks: Sequence[Chunk], pieces: Sequence[Tensor], request: ReduceRequest) -> None:
    """Add the pieces of all ranks, in order, chunk by chunk as they arrive."""
    for chunk in chunks:
        await_chunk(chunk)
        # While it is still in cache.
        parts = [piece[chunk.start : chunk.stop] for piece in pieces]
        request.add_(parts, chunk.start, chunk.stop)


class _OrderedSum:
    """Pieces on their way, which are added chunk by chunk as they arrive."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        sent: Sequence[dist.Work | None],
        pieces: Sequence[Tensor],  # num_shards times (piece_numel,), the own one included
        request: ReduceRequest,
    ) -> None:
        self._chunks, self._sent = chunks, sent
        self._pieces, self._request = pieces, request

    def wait(self) -> None:
        add_chunks(self._chunks, self._pieces, self._request)
        # The caller may write to the gradients again when this returns.
        Works(self._sent).wait()

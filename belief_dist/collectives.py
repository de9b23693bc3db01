"""Everything that ranks say to each other, behind one small interface.

Three ways to sum a bucket over the ranks, all writing only this rank's shard:

* `DirectExchange` (default on gloo): every rank sends each peer its piece in chunks and adds what
  arrives in rank order. gloo's own reduce-scatter is an all-reduce underneath: twice the bytes.
* `OrderedAllToAll` (default elsewhere): one all-to-all, then the same sum.
* `Native`: the backend's reduce-scatter, whose order of summation is its own business.

The first two add in rank order and in the compute dtype, so that the result depends neither on
the bucket size nor on timing. Divisions by the world size are left to the update.

All names of torch.distributed that differ between releases are looked up here and nowhere else.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from belief_dist.kernels import ordered_sum_, squared_norm_bins_

Reduction = Literal["auto", "ordered", "native"]

# Larger messages let the two directions of a TCP connection take turns instead of running at once.
_CHUNK_BYTES = 1 << 20
# Reductions whose receive buffers exist at the same time.
_IN_FLIGHT = 2

# torch 2.13 renamed these two and deprecates the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Handle(Protocol):
    """An operation under way."""

    def wait(self) -> None:
        """Return when its result may be used."""


class Done:
    """The handle of an operation that needed no communication."""

    def wait(self) -> None:
        """Return at once."""


class _Works:
    def __init__(self, works: Sequence[dist.Work]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works = ()


class Collectives(ABC):
    """The operations of one optimizer on its process group; this class serves one rank."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1

    @abstractmethod
    def start_reduce(
        self, flat: Tensor, shard: Tensor, bins: Tensor, *, accumulate: bool = False
    ) -> Handle:
        """Sum `flat` over the ranks into `shard`, and its squares into `bins`.

        Args:
            flat: (world_size * shard_numel,), this rank's addends; must not change before the
                returned handle was waited for.
            shard: (shard_numel,), the sum of this rank's piece; may be that piece of `flat`.
            bins: (norm.NUM_WORDS,), int64; the squares of `shard` are added when it is complete.
            accumulate: Start from what is in `shard`, as if it came from a rank before the first.
        """

    def start_gather(self, flat: Tensor) -> Handle:
        """Fill `flat` with every rank's own piece of it, in place; needs two ranks or more."""
        mine = flat.view(self.world_size, -1)[self.rank]
        return _Works([_all_gather(flat, mine, group=self._group, async_op=True)])

    def sum_(self, message: Tensor) -> None:
        """Add a small integer tensor over the ranks, in place; integers add in any order."""
        if self.world_size > 1:
            dist.all_reduce(message, group=self._group)

    def broadcast_(self, flat: Tensor) -> None:
        """Give every rank the values of the first rank of the group."""
        if self.world_size > 1:
            assert self._group is not None
            dist.broadcast(flat, src=dist.get_global_rank(self._group, 0), group=self._group)

    def exchange(self, value: Any) -> list[Any]:
        """Return the picklable `value` of every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values


class Alone(Collectives):
    """One rank: its gradients are the sum."""

    def start_reduce(
        self, flat: Tensor, shard: Tensor, bins: Tensor, *, accumulate: bool = False
    ) -> Handle:
        """Copy the piece, widened, where it is not in place already."""
        if flat.data_ptr() == shard.data_ptr():
            squared_norm_bins_(bins, shard)
        else:
            ordered_sum_(shard, [flat], bins, accumulate=accumulate)
        return Done()


class Native(Collectives):
    """The backend's reduce-scatter."""

    def start_reduce(
        self, flat: Tensor, shard: Tensor, bins: Tensor, *, accumulate: bool = False
    ) -> Handle:
        """See `Collectives.start_reduce`; 16-bit gradients are summed as the backend likes."""
        mine = flat.view(self.world_size, -1)[self.rank]
        work = _reduce_scatter(mine, flat, group=self._group, async_op=True)
        return _Widened(work, mine, shard, bins, accumulate)


class _Widened:
    def __init__(
        self, work: dist.Work, piece: Tensor, shard: Tensor, bins: Tensor, accumulate: bool
    ) -> None:
        self._work, self._piece, self._shard, self._bins = work, piece, shard, bins
        self._accumulate = accumulate

    def wait(self) -> None:
        self._work.wait()
        if self._piece.data_ptr() == self._shard.data_ptr():
            squared_norm_bins_(self._bins, self._shard)
        else:
            ordered_sum_(self._shard, [self._piece], self._bins, accumulate=self._accumulate)


class _Staging:
    """Receive buffers that reductions share in turn, so that only a few ever exist."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._in_flight: deque[_OrderedReduce] = deque()

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """Return at least `nbytes` as uint8, after ending the oldest reduction if need be."""
        while len(self._in_flight) >= _IN_FLIGHT:
            self._in_flight[0].wait()
        fitting = [buffer for buffer in self._free if buffer.numel() >= nbytes]
        if fitting:
            buffer = fitting[0]
            self._free = [other for other in self._free if other is not buffer]
            return buffer
        self._free.clear()
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def lend(self, reduce: _OrderedReduce) -> None:
        self._in_flight.append(reduce)

    def give_back(self, reduce: _OrderedReduce, buffer: Tensor) -> None:
        self._in_flight.remove(reduce)
        self._free.append(buffer)


class _OrderedReduce(ABC):
    """A sum in rank order whose pieces arrive in a staging buffer."""

    def __init__(self, staging: _Staging, buffer: Tensor) -> None:
        self._staging: _Staging | None = staging
        self._buffer = buffer
        staging.lend(self)

    def wait(self) -> None:
        if self._staging is None:
            return
        self._finish()
        self._staging.give_back(self, self._buffer)
        self._staging = None

    @abstractmethod
    def _finish(self) -> None: ...


class DirectExchange(Collectives):
    """Pieces travel directly between every two ranks, in chunks, both ways at once."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__(group)
        assert group is not None
        self._peers = dist.get_process_group_ranks(group)
        self._staging = _Staging()

    def start_reduce(
        self, flat: Tensor, shard: Tensor, bins: Tensor, *, accumulate: bool = False
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
        return _Works(works)

    def _chunks(self, piece: Tensor) -> list[tuple[int, int]]:
        step = _CHUNK_BYTES // piece.element_size()
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


class _DirectReduce(_OrderedReduce):
    def __init__(
        self,
        link: DirectExchange,
        outgoing: Tensor,  # (world_size, shard_numel)
        arriving: Sequence[Tensor],  # world_size times (shard_numel,), own piece included
        shard: Tensor,
        bins: Tensor,
        accumulate: bool,
        staging: _Staging,
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
            ordered_sum_(self._shard[start:stop], pieces, self._bins, accumulate=self._accumulate)
        for work in self._sent:
            work.wait()


class OrderedAllToAll(Collectives):
    """One all-to-all per bucket, then a sum in rank order."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__(group)
        self._staging = _Staging()

    def start_reduce(
        self, flat: Tensor, shard: Tensor, bins: Tensor, *, accumulate: bool = False
    ) -> Handle:
        """See `Collectives.start_reduce`; sums in rank order in the dtype of `shard`."""
        buffer = self._staging.take(flat.nbytes, flat.device)
        arriving = buffer[: flat.nbytes].view(flat.dtype)
        work = dist.all_to_all_single(arriving, flat, group=self._group, async_op=True)
        assert work is not None
        return _AllToAllReduce(
            work, arriving.view(self.world_size, -1), shard, bins, accumulate, self._staging, buffer
        )


class _AllToAllReduce(_OrderedReduce):
    def __init__(
        self,
        work: dist.Work,
        arriving: Tensor,  # (world_size, shard_numel)
        shard: Tensor,
        bins: Tensor,
        accumulate: bool,
        staging: _Staging,
        buffer: Tensor,
    ) -> None:
        super().__init__(staging, buffer)
        self._work, self._arriving, self._shard, self._bins = work, arriving, shard, bins
        self._accumulate = accumulate

    def _finish(self) -> None:
        self._work.wait()
        ordered_sum_(self._shard, list(self._arriving), self._bins, accumulate=self._accumulate)


def _as_group(ranks: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    if isinstance(ranks, DeviceMesh):
        if ranks.ndim != 1:
            names = ranks.mesh_dim_names
            how = f"mesh[{names[-1]!r}]" if names else "a slice of it"
            raise ValueError(
                f"process_group must be a mesh of 1 dimension, got one of {ranks.ndim} {names}; "
                f"pass the dimension to shard over, for example {how}."
            )
        return ranks.get_group()
    if ranks is not None and not isinstance(ranks, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a ProcessGroup, a DeviceMesh or None, got {ranks!r:.100}; "
            f"torch.distributed.new_group(ranks) makes one."
        )
    return ranks


def connect(
    ranks: dist.ProcessGroup | DeviceMesh | None,
    reduction: Reduction,
    device: torch.device,
    timeout: timedelta,
) -> Collectives:
    """Return the operations for a process group, over a communicator of their own.

    A communicator of its own keeps the order of our messages independent of the collectives that
    the training script issues in between, and gives them a deadline of their own.

    Args:
        ranks: The process group, or a mesh of one dimension; None means all ranks.
        reduction: "ordered", "native", or "auto" (which is "ordered").
        device: Where the parameters are.
        timeout: After which a missing rank becomes an error.

    Raises:
        TypeError: `ranks` is something else.
        ValueError: This process is not in the group, or the mesh has several dimensions.
        RuntimeError: torch.distributed is needed, but not initialized.
    """
    process_group = _as_group(ranks)
    if not (dist.is_available() and dist.is_initialized()):
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if process_group is not None or launched > 1:
            raise RuntimeError(
                f"ShardedAdaBelief needs torch.distributed, which is not initialized although "
                f"WORLD_SIZE is {launched}; call torch.distributed.init_process_group() first."
            )
        return Alone(None)
    members = dist.get_process_group_ranks(process_group or dist.group.WORLD)
    if dist.get_rank() not in members:
        raise ValueError(
            f"rank {dist.get_rank()} is not in process_group, whose ranks are {members}."
        )
    if len(members) == 1:
        return Alone(None)
    backend = str(dist.get_backend(process_group))
    own = dist.new_group(members, timeout=timeout, backend=backend, use_local_synchronization=True)
    if reduction == "native":
        return Native(own)
    if "gloo" in backend and device.type == "cpu":
        return DirectExchange(own)
    return OrderedAllToAll(own)

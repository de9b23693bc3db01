"""Everything that ranks say to each other, behind one small interface.

Ways to sum a bucket over the ranks, all writing only this rank's shard:

* `direct.DirectExchange` (default on gloo): every rank sends each peer its piece in chunks and adds
  what arrives in rank order. gloo's own reduce-scatter is an all-reduce inside: twice the bytes.
* `OrderedAllToAll` (default elsewhere): one all-to-all, then the same sum.
* `Native`: the backend's reduce-scatter, whose order of summation is its own business.
* `hybrid.Hybrid`: one of these inside each row of a mesh, and again across the rows.

All but `Native` add in a fixed order and in the compute dtype, so that the result depends neither
on the bucket size nor on timing. Divisions by the number of ranks are left to the update.

All names of torch.distributed that differ between releases are looked up here and nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from belief_dist.kernels import squared_norm_bins_
from belief_dist.sharding.codec import sum_pieces_

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


class Works:
    """Several operations of torch.distributed."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        self._works = works

    def wait(self) -> None:
        """Wait for all of them."""
        for work in self._works:
            work.wait()
        self._works = ()


class Collectives(ABC):
    """The operations of one optimizer on its process group.

    Attributes:
        rank: Which shard this process owns.
        world_size: How many shards there are.
        num_ranks: How many ranks' gradients are added; more than `world_size` if each shard is kept
            by several ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1
        self.num_ranks = self.world_size

    @property
    def members(self) -> list[int]:
        """The global ranks."""
        return [0] if self._group is None else dist.get_process_group_ranks(self._group)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group of all ranks, if there are several."""
        return self._group

    @property
    def rank_of_all(self) -> int:
        """This process among all `num_ranks`."""
        return 0 if self._group is None else dist.get_rank(self._group)

    @property
    def copies(self) -> int:
        """How many ranks keep the same shard."""
        return self.num_ranks // self.world_size

    @abstractmethod
    def start_reduce(
        self, flat: Tensor, shard: Tensor, bins: Tensor | None, *, accumulate: bool = False
    ) -> Handle:
        """Sum `flat` over the ranks into `shard`, and its squares into `bins`.

        Args:
            flat: (world_size * shard_numel,), this rank's addends, or uint8 from `wire.encode_`;
                must not change before the returned handle was waited for.
            shard: (shard_numel,), the sum of this rank's piece; may be that piece of `flat`.
            bins: (norm.NUM_WORDS,), int64; receives squares when `shard` is complete, so that the
                sum of all ranks' bins has every element once. None if nobody asks.
            accumulate: Start from what is in `shard`, as if it came from a rank before the first.
        """

    def start_gather(self, flat: Tensor) -> Handle:
        """Fill `flat` with every rank's own piece of it, in place; needs two ranks or more."""
        mine = flat.view(self.world_size, -1)[self.rank]
        return Works([_all_gather(flat, mine, group=self._group, async_op=True)])

    def sum_(self, message: Tensor) -> None:
        """Add a small integer tensor over the ranks, in place; integers add in any order."""
        if self.num_ranks > 1:
            dist.all_reduce(message, group=self._group)

    def broadcast_(self, flat: Tensor) -> None:
        """Give every rank the values of the first rank of the group."""
        if self.num_ranks > 1:
            assert self._group is not None
            dist.broadcast(flat, src=dist.get_global_rank(self._group, 0), group=self._group)

    def exchange(self, value: Any) -> list[Any]:
        """Return the picklable `value` of every rank."""
        if self.num_ranks == 1:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value, group=self._group)
        return values


class Alone(Collectives):
    """One rank: its gradients are the sum."""

    def start_reduce(
        self, flat: Tensor, shard: Tensor, bins: Tensor | None, *, accumulate: bool = False
    ) -> Handle:
        """Copy the piece, widened, where it is not in place already."""
        _add_piece(flat, shard, bins, accumulate)
        return Done()


class Native(Collectives):
    """The backend's reduce-scatter."""

    def start_reduce(
        self, flat: Tensor, shard: Tensor, bins: Tensor | None, *, accumulate: bool = False
    ) -> Handle:
        """See `Collectives.start_reduce`; 16-bit gradients are summed as the backend likes."""
        mine = flat.view(self.world_size, -1)[self.rank]
        work = _reduce_scatter(mine, flat, group=self._group, async_op=True)
        return _Widened(work, mine, shard, bins, accumulate)


class _Widened:
    def __init__(
        self,
        work: dist.Work,
        piece: Tensor,
        shard: Tensor,
        bins: Tensor | None,
        accumulate: bool,
    ) -> None:
        self._work, self._piece, self._shard, self._bins = work, piece, shard, bins
        self._accumulate = accumulate

    def wait(self) -> None:
        self._work.wait()
        _add_piece(self._piece, self._shard, self._bins, self._accumulate)


def _add_piece(piece: Tensor, shard: Tensor, bins: Tensor | None, accumulate: bool) -> None:
    if piece.data_ptr() != shard.data_ptr():
        sum_pieces_(shard, [piece], bins, accumulate=accumulate)
    elif bins is not None:
        squared_norm_bins_(bins, shard)


class Staging:
    """Receive buffers that reductions share in turn, so that only a few ever exist."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._in_flight: deque[OrderedReduce] = deque()

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

    def lend(self, reduce: OrderedReduce) -> None:
        """Count a reduction that holds a buffer."""
        self._in_flight.append(reduce)

    def give_back(self, reduce: OrderedReduce, buffer: Tensor) -> None:
        """Take a buffer back."""
        self._in_flight.remove(reduce)
        self._free.append(buffer)


class OrderedReduce(ABC):
    """A sum in rank order whose pieces arrive in a staging buffer."""

    def __init__(self, staging: Staging, buffer: Tensor) -> None:
        self._staging: Staging | None = staging
        self._buffer = buffer
        staging.lend(self)

    def wait(self) -> None:
        """Complete the sum."""
        if self._staging is None:
            return
        self._finish()
        self._staging.give_back(self, self._buffer)
        self._staging = None

    @abstractmethod
    def _finish(self) -> None: ...


class OrderedAllToAll(Collectives):
    """One all-to-all per bucket, then a sum in rank order."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__(group)
        self._staging = Staging()

    def start_reduce(
        self, flat: Tensor, shard: Tensor, bins: Tensor | None, *, accumulate: bool = False
    ) -> Handle:
        """See `Collectives.start_reduce`; sums in rank order in the dtype of `shard`."""
        buffer = self._staging.take(flat.nbytes, flat.device)
        arriving = buffer[: flat.nbytes].view(flat.dtype)
        work = dist.all_to_all_single(arriving, flat, group=self._group, async_op=True)
        assert work is not None
        return _AllToAllReduce(
            work, arriving.view(self.world_size, -1), shard, bins, accumulate, self._staging, buffer
        )


class _AllToAllReduce(OrderedReduce):
    def __init__(
        self,
        work: dist.Work,
        arriving: Tensor,  # (world_size, shard_numel)
        shard: Tensor,
        bins: Tensor | None,
        accumulate: bool,
        staging: Staging,
        buffer: Tensor,
    ) -> None:
        super().__init__(staging, buffer)
        self._work, self._arriving, self._shard, self._bins = work, arriving, shard, bins
        self._accumulate = accumulate

    def _finish(self) -> None:
        self._work.wait()
        sum_pieces_(self._shard, list(self._arriving), self._bins, accumulate=self._accumulate)

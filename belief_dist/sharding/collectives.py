"""Everything that ranks say to each other, behind one small interface.

Ways to sum a bucket over the ranks, all writing only this rank's shard:

* `shared_memory.SharedMemory` (default on CPUs, for ranks of one host): every rank reads its
  addends where they lie, in the other ranks' memory; `across_hosts.AcrossHosts` where some ranks
  share a host.
* `point_to_point.PointToPoint` (on gloo otherwise): every rank sends each peer its piece in chunks
  and adds what arrives in rank order. gloo's own reduce-scatter is an all-reduce inside: twice the
  bytes.
* `AllToAll` (default elsewhere): one all-to-all, then the same sum.
* `symmetric_memory.SymmetricMemory` (by choice, for GPUs of one host): one kernel reads the addends
  where they lie, in the other GPUs' memory.
* `BackendReduceScatter`: the backend's reduce-scatter, whose order of summation is its own affair.
* `hsdp.HybridShard`: one of these inside each row of a mesh, and again across the rows.

All but `BackendReduceScatter` add in a fixed order and in the compute dtype, so that the result
depends neither on the bucket size nor on timing. Dividing by the number of ranks is left to the
update.

All names of torch.distributed that differ between releases are looked up here and nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from belief_dist.kernels import squared_norm_bins_
from belief_dist.sharding.buffer_pool import BufferPool, Handle
from belief_dist.sharding.grad_codec import AS_IS, Codec

# Reductions whose receive buffers exist at the same time. A third would only wait for the wire.
RECEIVING = 2

# torch 2.13 renamed these two and deprecates the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True)
class ReduceRequest:
    """A request to sum one bucket over the ranks.

    Attributes:
        flat: (num_shards * piece_numel,), this rank's addends in the codec's form, best in memory
            from `Collectives.buffer`. It must not change before the handle was waited for.
        shard: (shard_numel,), receives the sum of this rank's piece; for one rank it may be `flat`.
        norm_bins: (norm.NUM_WORDS,), int64; receives the squares of the sum when `shard` is
            complete, so that the bins of all ranks have every element once. None if nothing reads
            them.
        codec: In whose form `flat` is.
        accumulate: Start from what is in `shard`, as if it came from a rank before the first.
        num_addends: How many ranks, the first ones, have addends; None if all have. What the others
            send is not added, not even as zeros: 0 + -0 is not -0.
    """

    flat: Tensor
    shard: Tensor
    norm_bins: Tensor | None = None
    codec: Codec = AS_IS
    accumulate: bool = False
    num_addends: int | None = None

    def add_(self, pieces: Sequence[Tensor], start: int = 0, stop: int | None = None) -> None:
        """Complete elements [start, stop) of this rank's piece from those of all ranks, in order.

        Args:
            pieces: (stop - start,) of every rank, in the codec's form.
            start: The first element of the piece, in that form.
            stop: The first that does not belong to it; None for the end.
        """
        shard = self.shard
        if shard.numel() == 0:  # of a bucket of empty parameters
            return
        if stop is not None:
            shard = shard[self.codec.window(start, stop)]
        added = pieces[: self.num_addends]
        self.codec.sum_(shard, added, self.norm_bins, accumulate=self.accumulate)

    def add_own_(self, piece: Tensor) -> None:
        """Complete the shard from a single piece, without a copy where it is in place already."""
        # For one rank at ZeRO-1 in float32, the shard is the gradients' own buffer.
        if piece.data_ptr() != self.shard.data_ptr():
            self.add_([piece])
        elif self.norm_bins is not None:
            squared_norm_bins_(self.norm_bins, self.shard)


class Done:
    """The handle of an operation that needed no communication."""

    def wait(self) -> None:
        """Return at once."""

    def has_ended(self) -> bool:
        """Return True."""
        return True


class Works:
    """Several operations of torch.distributed."""

    def __init__(self, works: Sequence[dist.Work | None]) -> None:
        """Wait for `works`; None stands for one that torch has ended at once."""
        self._works = works

    def has_ended(self) -> bool:
        """Return whether nothing is left to wait for."""
        return all(work is None or work.is_completed() for work in self._works)

    def wait(self) -> None:
        """Wait for all of them."""
        for work in self._works:
            if work is not None:
                work.wait()
        self._works = ()  # and with them the buffers that they hold


class CommunicationError(RuntimeError):
    """A collective of the optimizer has failed, or a rank has not answered in time."""


@contextmanager
def naming(comm: Collectives, what: str) -> Iterator[None]:
    """Say in an error of torch.distributed which rank was doing what.

    Raises:
        CommunicationError: For a RuntimeError inside.
    """
    try:
        yield
    except CommunicationError:
        raise  # of an operation that had to end first
    except RuntimeError as error:
        late = comm.late()
        who = f" Late: {'rank' if len(late) == 1 else 'ranks'} {', '.join(map(str, late))}."
        raise CommunicationError(
            f"rank {comm.rank} of {comm.world_size}, {what}: {error}. A rank has ended, or is late "
            f"by more than the timeout; its own error is the one to look at.{who if late else ''}"
        ) from error


class Named:
    """An operation whose failure says what it was."""

    def __init__(self, operation: Handle, comm: Collectives, what: str) -> None:
        """Wait for `operation` as `naming` does."""
        self._operation, self._comm, self._what = operation, comm, what

    def wait(self) -> None:
        """Wait for it."""
        with naming(self._comm, self._what):
            self._operation.wait()

    def has_ended(self) -> bool:
        """Return whether nothing is left to wait for; False where the operation does not tell."""
        tells = getattr(self._operation, "has_ended", None)
        return tells is not None and tells()


class _Failed:
    """An operation that could not start."""

    def __init__(self, error: CommunicationError) -> None:
        self._error = error

    def wait(self) -> None:
        raise self._error


def start_gather(comm: Collectives, flat: Tensor, bucket: int) -> Named:
    """Start to gather a bucket's parameters.

    One that cannot start fails when it is waited for, as one that fails on its way: a step that has
    begun to update updates all of this rank's shards. Later ones are not started, as the other
    ranks would take them for this one.
    """
    what = f"gathering the parameters of bucket {bucket}"
    if comm.gather_failure is None:
        try:
            with naming(comm, what):
                return Named(comm.start_gather(flat), comm, what)
        except CommunicationError as error:
            comm.gather_failure = error
    return Named(_Failed(comm.gather_failure), comm, what)


class Collectives(ABC):
    """The operations of one optimizer on its process group.

    Attributes:
        rank: This process in the process group.
        world_size: Number of ranks, whose gradients are added.
        shard_index: Which shard this process owns.
        num_shards: How many shards there are; fewer than ranks if several ranks keep each.
        gather_failure: Why no gather can be started any more, or None.
    """

    gather_failure: CommunicationError | None = None

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1
        self.shard_index, self.num_shards = self.rank, self.world_size

    @property
    def num_replicas(self) -> int:
        """How many ranks keep the same shard."""
        return self.world_size // self.num_shards

    @property
    def members(self) -> list[int]:
        """The global ranks."""
        return [0] if self._group is None else dist.get_process_group_ranks(self._group)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group of all ranks, if there are several."""
        return self._group

    def buffer(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a flat tensor of zeros, from which sums and gathers need no copy.

        Called by all ranks together.
        """
        return torch.zeros(numel, dtype=dtype, device=device)

    def scratch(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a flat tensor for addends, whenever this rank needs one."""
        return torch.empty(numel, dtype=dtype, device=device)

    def reserve(self, nbytes: int, device: torch.device, *, in_place: bool) -> None:  # noqa: B027
        """Take what sums need; called by all ranks together.

        Args:
            nbytes: Of the longest addend.
            device: Where addends are.
            in_place: All are in a `buffer`, and none in `scratch`.
        """

    def late(self) -> list[int]:
        """Return the ranks of which it is known that they did not come in time."""
        return []

    @abstractmethod
    def start_reduce(self, request: ReduceRequest) -> Handle:
        """Start to sum over the ranks; the shard is complete when the handle was waited for."""

    def open_gathers(self, flats: Sequence[Tensor]) -> None:  # noqa: B027
        """Let the others write to buffers whose gathers are started next, in this order.

        May be left out. Called by all ranks together, after one of their messages: whoever has
        sent it reads nothing of the buffers any more but its own piece.
        """

    def start_gather(self, flat: Tensor) -> Handle:
        """Fill `flat`, from `buffer`, with every rank's own piece of it; needs two shards or more.

        The own piece may change again as soon as the handle was waited for.
        """
        # In place: the own piece is where the others' will see it, and nothing is copied.
        mine = flat.view(self.num_shards, -1)[self.shard_index]
        return Works([_all_gather(flat, mine, group=self._group, async_op=True)])

    def close_gathers(self) -> None:  # noqa: B027
        """Notice that no gather is started any more, of those that were opened.

        Whatever others need of this rank must be under way when it returns: its script may stand
        behind a collective of its own before it waits for parameters.
        """

    def sum_(self, message: Tensor) -> None:
        """Add a small integer tensor over the ranks, in place; integers add in any order."""
        # The one message of a step is small: what counts is its latency, and no order matters.
        if self.world_size > 1:
            dist.all_reduce(message, group=self._group)

    def broadcast_(self, flat: Tensor, source: int = 0) -> None:
        """Give every rank the values of one rank of the group."""
        if self.world_size > 1:
            assert self._group is not None
            dist.broadcast(flat, src=dist.get_global_rank(self._group, source), group=self._group)

    def exchange(self, value: Any) -> list[Any]:
        """Return the picklable `value` of every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values


class SingleRank(Collectives):
    """One rank: its gradients are the sum.

    The squares of what is in place already wait until somebody asks for them, and are taken
    together: on a GPU that is one launch for all buckets.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self._in_place: list[ReduceRequest] = []

    def start_reduce(self, request: ReduceRequest) -> Handle:
        """Copy the piece, widened, where it is not in place already."""
        if request.flat.data_ptr() != request.shard.data_ptr() or request.norm_bins is None:
            request.add_own_(request.flat)
            return Done()
        self._in_place.append(request)
        return _Squares(self)

    def take_squares(self) -> None:
        """Take the squares that are still to be taken."""
        requests, self._in_place = self._in_place, []
        together: dict[tuple[int, torch.dtype], list[ReduceRequest]] = {}
        for each in requests:
            together.setdefault((id(each.norm_bins), each.shard.dtype), []).append(each)
        for alike in together.values():
            bins = alike[0].norm_bins
            assert bins is not None
            squared_norm_bins_(bins, *(each.shard for each in alike))


class _Squares:
    """Squares that a single rank still has to take."""

    def __init__(self, comm: SingleRank) -> None:
        self._comm = comm

    def wait(self) -> None:
        self._comm.take_squares()


class BackendReduceScatter(Collectives):
    """The backend's reduce-scatter."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__(group)
        self._sums = BufferPool(RECEIVING)

    def start_reduce(self, request: ReduceRequest) -> Handle:
        """See `Collectives.start_reduce`; 16-bit gradients are summed as the backend likes."""
        flat, shard = request.flat, request.shard
        fits = shard.dtype == flat.dtype and not request.accumulate
        out = shard if fits else self._sums.take(shard.numel(), flat.dtype, flat.device)
        work = _reduce_scatter(out, flat, group=self._group, async_op=True)
        return self._sums.lend(_ReduceScatterSum(work, out, request), None if fits else out)


class _ReduceScatterSum:
    """The backend's sum, which must still be widened into the shard."""

    def __init__(self, work: dist.Work, piece: Tensor, request: ReduceRequest) -> None:
        self._work, self._piece, self._request = work, piece, request

    def wait(self) -> None:
        self._work.wait()
        self._request.add_own_(self._piece)


class AllToAll(Collectives):
    """One all-to-all per bucket, then a sum in rank order."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__(group)
        self._inboxes = BufferPool(RECEIVING)

    def start_reduce(self, request: ReduceRequest) -> Handle:
        """See `Collectives.start_reduce`; sums in rank order in the dtype of the shard."""
        flat = request.flat
        inbox = self._inboxes.take(flat.numel(), flat.dtype, flat.device)
        work = dist.all_to_all_single(inbox, flat, group=self._group, async_op=True)
        assert work is not None
        pieces = list(inbox.view(self.num_shards, -1))
        return self._inboxes.lend(_AllToAllSum(work, pieces, request), inbox)


class _AllToAllSum:
    """Pieces on their way, which are added when all have arrived."""

    def __init__(self, work: dist.Work, pieces: Sequence[Tensor], request: ReduceRequest) -> None:
        self._work, self._pieces, self._request = work, pieces, request

    def wait(self) -> None:
        self._work.wait()
        self._request.add_(self._pieces)

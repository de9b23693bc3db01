"""Sums and gathers between GPUs that have mapped each other's memory.

A sum reads its addends where they lie, in the ranks' own buffers, in the order of the ranks, and
takes the squares on its way: one kernel, and nothing is sent, staged or added twice. A gather
copies every rank's piece from where it was updated. Before and after both, ranks meet on their
devices (`kernels.triton_meet`): everything is in the order of streams, the host waits for nothing,
and a CUDA graph may hold it.

    reduce stream   meet, sum of bucket a, meet | meet, sum of bucket b, meet | ...
    gather stream                                 meet, copy pieces of bucket z, meet | ...

The memory is torch's symmetric memory, or whatever else maps equal buffers of all ranks.
"""

from __future__ import annotations

import logging
import weakref
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from belief_dist import async_device, kernels
from belief_dist.host_memory.team import Exchange, Place, own_place
from belief_dist.kernels.build import one_line
from belief_dist.kernels.triton_meet_launch import GATHERS, MESSAGE_BYTES, SUMS, pad_nbytes
from belief_dist.sharding.buffer_pool import Handle
from belief_dist.sharding.collectives import AllToAll, Done, ReduceRequest
from belief_dist.sharding.trial import Trial

logger = logging.getLogger("belief_dist")

_CHECKED = 4096  # elements that each rank sums when ranks connect


class Mapped(NamedTuple):
    """A buffer of every rank, as this process sees them.

    Attributes:
        own: (nbytes,), uint8, this rank's.
        all: Those of all ranks in their order, this one's included.
        keeps: What must live as long.
    """

    own: Tensor
    all: list[Tensor]
    keeps: Any = None


class Memory(Protocol):
    """Makes buffers that the ranks of a group map."""

    def empty(self, nbytes: int, device: torch.device) -> Tensor:
        """Return (nbytes,), uint8, that `share` can share."""

    def share(self, own: Tensor) -> Mapped:
        """Map the equally long buffers of all ranks; called by all ranks together."""


class TorchMemory:
    """torch's symmetric memory."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Serve the ranks of a group."""
        from torch.distributed import _symmetric_memory

        self._torch = _symmetric_memory
        self._group = group

    def empty(self, nbytes: int, device: torch.device) -> Tensor:
        """See `Memory.empty`."""
        return self._torch.empty(nbytes, dtype=torch.uint8, device=device)

    def share(self, own: Tensor) -> Mapped:
        """See `Memory.share`."""
        handle = self._torch.rendezvous(own, self._group)
        ranks = range(dist.get_world_size(self._group))
        every = [handle.get_buffer(rank, (own.numel(),), torch.uint8) for rank in ranks]
        return Mapped(own, every, handle)


class SymmetricMemory(AllToAll):
    """GPUs of one host; see the module.

    Addends that are not in a `buffer` are copied to where the others see them, or, if there is no
    room, sent as `AllToAll` does. That is the same on all ranks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        memory: Memory,
        pads: Mapped,
        timeout: timedelta,
    ) -> None:
        """Connect.

        Args:
            group: The ranks.
            memory: What they map.
            pads: Of `Meetings`, all zero.
            timeout: After which a rank that is waited for becomes an error of the device.

        Raises:
            RuntimeError: There is no kernel for it.
        """
        super().__init__(group)
        self._memory = memory
        self._buffers: dict[int, Mapped] = {}  # by address
        self._staging: Mapped | None = None
        device = pads.own.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pads = pads  # kept as long as the meetings
        self._meetings = kernels.meetings(pads.all, self.rank, timeout)

    def late(self) -> list[int]:
        """See `Collectives.late`."""
        return self._meetings.late()

    def check(self, device: torch.device) -> None:
        """Sum and gather for the first time; called by all ranks.

        Raises:
            RuntimeError: A rank did not come to it, or the bits are not those that they must be.
        """
        trial = Trial(self, _CHECKED, device)
        trial.fill()
        trial.sum()
        is_summed = trial.is_summed()
        trial.place(0)
        trial.gather()
        is_gathered = trial.is_gathered(0)
        late = self.late()
        if late:
            raise RuntimeError(f"no first meeting with {', '.join(f'rank {r}' for r in late)}")
        if not (is_summed and is_gathered):
            raise RuntimeError("a first sum or gather has other bits")
        self._meetings.insist()

    # - Buffers

    def buffer(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Collectives.buffer`; in memory that the others have mapped."""
        if numel == 0:
            return super().buffer(numel, dtype, device)
        mapped = self._map(numel * dtype.itemsize, device)
        address = mapped.own.data_ptr()
        self._buffers[address] = mapped
        flat = mapped.own.view(dtype)
        # What the optimizer drops is not kept for its peers' sake.
        weakref.finalize(flat, self._buffers.pop, address).atexit = False
        return flat

    def reserve(self, nbytes: int, device: torch.device, *, in_place: bool) -> None:
        """See `Collectives.reserve`."""
        if in_place:
            return
        if self._staging is None or nbytes > self._staging.own.nbytes:
            self._staging = self._map(max(nbytes, 1), device)

    def _map(self, nbytes: int, device: torch.device) -> Mapped:
        own = self._memory.empty(nbytes, device)
        own.zero_()
        return self._memory.share(own)

    # - Sums and gathers

    def start_reduce(self, request: ReduceRequest) -> Handle:
        """See `Collectives.start_reduce`; all of it is in the order of the current stream."""
        flat = request.flat
        mapped = self._buffers.get(flat.data_ptr())
        if mapped is None:
            mapped = self._staging
            if mapped is None or flat.nbytes > mapped.own.nbytes:
                return super().start_reduce(request)
            # All have met since they have read the last.
            mapped.own[: flat.nbytes].view(flat.dtype).copy_(flat)
        pieces = [self._piece(each, flat, self.shard_index) for each in mapped.all]
        with self._meetings.between(SUMS):
            request.add_(pieces)
        return Done()

    def start_gather(self, flat: Tensor) -> Handle:
        """See `Collectives.start_gather`; on a stream of its own."""
        if flat.numel() == 0:
            return Done()
        mapped = self._buffers.get(flat.data_ptr())
        if mapped is None:
            return super().start_gather(flat)
        stream = self._stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(flat.device))
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            with self._meetings.between(GATHERS):
                for distance in range(1, self.world_size):  # every rank begins at another one
                    peer = (self.rank + distance) % self.world_size
                    piece = self._piece(mapped.all[peer], flat, peer)
                    self._piece(mapped.own, flat, peer).copy_(piece)
            return _Gather(stream)

    def _piece(self, buffer: Tensor, flat: Tensor, index: int) -> Tensor:
        """Return a piece of a buffer that holds what `flat` does on its rank."""
        nbytes = flat.nbytes // self.num_shards
        return buffer[index * nbytes : (index + 1) * nbytes].view(flat.dtype)

    def sum_(self, message: Tensor) -> None:
        """See `Collectives.sum_`."""
        if message.dtype == torch.int64 and 0 < message.nbytes <= MESSAGE_BYTES:
            self._meetings.add_up(message)
        else:
            super().sum_(message)


class _Gather:
    """Pieces that are copied on a stream."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        if stream is not None:
            self._event = torch.cuda.Event()
            self._event.record(stream)

    def has_ended(self) -> bool:
        if self._stream is None:
            return True
        # A graph that is captured allows no question.
        return not async_device.is_capturing(self._stream.device) and self._event.query()

    def wait(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._event)


class _Card(NamedTuple):
    """What a rank tells the others before they map anything."""

    is_wanted: bool
    place: Place | None = None
    obstacle: str | None = None


def connect(
    group: dist.ProcessGroup, device: torch.device, timeout: timedelta, *, wanted: bool
) -> SymmetricMemory | None:
    """Map the memory of all ranks' GPUs; called by all ranks of the group.

    Args:
        group: The ranks.
        device: Of this rank.
        timeout: See `SymmetricMemory`.
        wanted: False on any rank has all do without.

    Returns:
        None, on all ranks alike, if some rank cannot, or finds wrong bits; one line in the log says
        why not.
    """
    exchange = AllToAll(group).exchange
    card = _Card(wanted)
    if wanted:
        try:
            card = _Card(True, own_place(), kernels.why_plain(device) or None)
        except OSError as error:
            card = _Card(True, obstacle=one_line(error))
    cards: list[_Card] = exchange(card)
    if not all(each.is_wanted for each in cards):
        return None
    obstacle = next((each.obstacle for each in cards if each.obstacle), None)
    if obstacle is None and len({each.place for each in cards}) > 1:
        obstacle = "they are on several hosts, or in several containers"
    comm = None
    if obstacle is None:
        comm, obstacle = _map_all(group, device, timeout, exchange)
    if obstacle is not None and dist.get_rank(group) == 0:
        logger.warning("GPUs send messages, and read no memory of each other: %s", obstacle)
    return comm


def _map_all(
    group: dist.ProcessGroup, device: torch.device, timeout: timedelta, exchange: Exchange
) -> tuple[SymmetricMemory | None, str | None]:
    """Return the operations, or on all ranks alike None and why there are none."""
    rank = dist.get_rank(group)
    memory = pads = comm = None
    obstacle: str | None = None

    def first_memory() -> None:
        nonlocal memory, pads
        memory = TorchMemory(group)
        pads = memory.empty(pad_nbytes(dist.get_world_size(group)), device)
        pads.zero_()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def first_operations() -> None:
        nonlocal comm
        assert memory is not None and pads is not None
        comm = SymmetricMemory(group, memory, memory.share(pads), timeout)
        comm.check(device)

    # None comes to a pad that another has still to make or to clear.
    for work in (first_memory, first_operations):
        problem = None
        try:
            work()
        except Exception as error:  # torch tells in many ways that it has no such memory
            problem = f"rank {rank}: {one_line(error)}"
        obstacle = next(filter(None, exchange(problem)), None)
        if obstacle is not None:
            return None, obstacle
    return comm, None

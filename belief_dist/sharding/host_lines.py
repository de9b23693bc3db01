"""What ranks of one host tell each other through shared memory: numbers, places and messages.

Every rank writes to lines of its own, and the others read them. A number says how many of
something the rank has done, and only grows; `kernels/signals.cpp` says what whoever has seen a
number may rely on. Beside some numbers stands a place: where in its memory the rank has what the
number is about.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from belief_dist.host_memory import Team
from belief_dist.kernels.signals import NBYTES, addresses, signals


class Signal(IntEnum):
    """The numbers."""

    PUBLISHED = 0  # its addends of so many sums are complete, and stay until all have read them
    SUMMED = 1  # it has read all addends of so many sums
    OPENED = 2  # its buffers of so many gathers may be written by the others
    WRITTEN = 3  # its pieces of so many gathers are in all buffers of the host
    MESSAGE = 4  # its part of so many messages can be read
    FAILED = 5  # it has given up: nobody need wait for it


# How many places are kept of each; before the next is told of, all must have used the oldest.
RING = 1024
# Longer messages go elsewhere. Pages that are never written to take no memory.
MESSAGE_BYTES = 1 << 20

_RING_BYTES = 8 * RING
_RINGS = {
    Signal.PUBLISHED: len(Signal) * NBYTES,
    Signal.OPENED: len(Signal) * NBYTES + _RING_BYTES,
}
_MESSAGES = len(Signal) * NBYTES + len(_RINGS) * _RING_BYTES
_BYTES = _MESSAGES + 2 * MESSAGE_BYTES
# How long a wait lasts before it looks whether the peer is alive.
_LOOK_SECONDS = 0.02


class HostLines:
    """The lines of some ranks of this host.

    Attributes:
        team: Knows their memory.
        peers: The other ranks.
    """

    def __init__(
        self,
        team: Team,
        rank: int,
        ranks: Sequence[int],
        exchange: Callable[[Any], list[Any]],
        timeout: timedelta,
    ) -> None:
        """Connect; called by all ranks of the group that has met as `team`.

        Args:
            team: Knows their memory.
            rank: This one in that group.
            ranks: Those of this host, in the order of the group.
            exchange: Tells all ranks of the group a value of each.
            timeout: After which a rank that is waited for becomes an error.
        """
        self.team, self._rank = team, rank
        self.peers = [other for other in ranks if other != rank]
        self._timeout = timeout.total_seconds()
        self._signals = signals()
        # A rank that has dropped its optimizer leaves what slower ones still wait for.
        self._memory = team.arena.take(_BYTES, outlives=True)
        starts: list[int] = exchange(team.arena.offset_of(self._memory))
        self._mappings = {r: team.mapping(r) for r in ranks}
        self._parts = {r: self._mappings[r].bytes(starts[r], _BYTES) for r in ranks}
        firsts = [self._mappings[r].address + starts[r] for r in self.peers]
        self._waits = [addresses([f + signal * NBYTES for f in firsts]) for signal in Signal]
        self._rings = {
            (signal, r): part[start : start + _RING_BYTES].cast("q")
            for signal, start in _RINGS.items()
            for r, part in self._parts.items()
        }
        self._failure: str | None = None

    # - Numbers

    def post(self, signal: Signal, value: int) -> None:
        """Tell a number of this rank's."""
        self._signals.post(self._memory.data_ptr() + signal * NBYTES, value)

    def have_reached(self, signal: Signal, target: int, seconds: float = 0.0) -> bool:
        """Return whether all peers have posted `target` or more, after some seconds at most."""
        return self._signals.first_late(self._waits[signal], target, seconds) is None

    def wait(self, signal: Signal, target: int, what: str) -> None:
        """Wait until all peers have posted `target` or more.

        Args:
            signal: Which number.
            target: Its value.
            what: What a late rank "has not" done, for the error.

        Raises:
            RuntimeError: One has ended, has given up or is late. From then on, all waits fail.
        """
        if self._failure is not None:
            raise RuntimeError(self._failure)
        waits = self._waits[signal]
        deadline = time.monotonic() + self._timeout
        while (late := self._signals.first_late(waits, target, _LOOK_SECONDS)) is not None:
            peer = self.team.peers[self.peers[late]]
            who = f"rank {self.peers[late]} (process {peer.process})"
            problem = None
            if peer.has_ended():
                problem = f"{who} has ended, and has not {what}"
            elif (failed := self._first_failed()) is not None:
                problem = f"rank {failed} has given up, and {who} has not {what}"
            elif time.monotonic() > deadline:
                problem = f"{who} has not {what} in {self._timeout:g} s"
            # It may have done so just before it ended.
            if problem is not None and not self.have_reached(signal, target):
                self.fail(problem)

    @property
    def has_failed(self) -> bool:
        """Whether a wait has failed."""
        return self._failure is not None

    def fail(self, problem: str) -> None:
        """See `give_up`.

        Raises:
            RuntimeError: Always.
        """
        self.give_up(problem)
        raise RuntimeError(problem)

    def give_up(self, problem: str) -> None:
        """Have all waits fail from now on, here and on the ranks that wait for this one."""
        self._failure = self._failure or problem
        self.post(Signal.FAILED, 1)

    def _first_failed(self) -> int | None:
        return next((r for r in self.peers if self._parts[r][Signal.FAILED * NBYTES]), None)

    # - Places

    def tell(self, signal: Signal, number: int, tensor: Tensor) -> None:
        """Write down where the tensor lies that the post of `number` is about."""
        offset = self.team.arena.offset_of(tensor)
        assert offset is not None
        self._rings[signal, self._rank][number % RING] = offset

    def told(self, signal: Signal, rank: int, number: int, like: Tensor, start: int) -> Tensor:
        """Return a part of what a rank has told of.

        Args:
            signal: As for `tell`.
            rank: A peer that has posted.
            number: As for `tell`.
            like: Of the part's dtype and size.
            start: Its first element.
        """
        offset = self._rings[signal, rank][number % RING] + start * like.element_size()
        return self._mappings[rank].tensor(offset, like.numel(), like.dtype)

    # - Messages

    def message(self, rank: int, number: int, like: Tensor) -> Tensor:
        """Return the place of a rank's message; two take turns."""
        start = _MESSAGES + number % 2 * MESSAGE_BYTES
        part = self._parts[rank][start : start + like.nbytes]
        return torch.frombuffer(part, dtype=like.dtype).view(like.shape)

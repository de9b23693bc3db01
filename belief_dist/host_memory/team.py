"""The ranks of one host, which map each other's memory."""

from __future__ import annotations

import logging
import os
import select
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from belief_dist.host_memory.arena import Arena, FileName, Mapping, open_peer
from belief_dist.kernels.build import Unavailable
from belief_dist.kernels.signals import signals

logger = logging.getLogger("belief_dist")

# Values of all ranks, given one's own.
Exchange = Callable[[Any], list[Any]]


class Place(NamedTuple):
    """Where a process runs: only processes of equal places can map each other's memory."""

    host: str
    namespaces: tuple[str, ...]
    user: int


def own_place() -> Place:
    """Return where this process runs.

    Network namespaces count: whoever separates them means hosts, as far as training goes.

    Raises:
        OSError: The system does not tell.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Place(
        boot, tuple(os.readlink(f"/proc/self/ns/{n}") for n in ("pid", "net")), os.getuid()
    )


class _Card(NamedTuple):
    """What a rank tells the others of itself."""

    may_share: bool
    place: Place | None = None
    file: FileName | None = None
    obstacle: str | None = None


class Peer:
    """A process of this host, and its memory."""

    def __init__(self, file: FileName) -> None:
        """Map its memory.

        Raises:
            OSError: It cannot be mapped.
        """
        self.process = file.process
        self.memory = open_peer(file)
        self._descriptor = os.pidfd_open(file.process)  # readable when the process has ended
        weakref.finalize(self, os.close, self._descriptor).atexit = False

    def has_ended(self) -> bool:
        """Return whether the process has ended."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(0))


class Team:
    """The ranks of this host, this one included.

    Attributes:
        arena: The memory of this rank.
        peers: The other ranks of the host, by their number in the group that has met.
        hosts: Of every rank of that group, the number of its host.
    """

    def __init__(self, arena: Arena, peers: dict[int, Peer], hosts: list[int]) -> None:
        self.arena, self.peers, self.hosts = arena, peers, hosts

    def mapping(self, rank: int) -> Mapping:
        """Return the memory of a rank of this host."""
        peer = self.peers.get(rank)
        return self.arena.mapping if peer is None else peer.memory


def meet(rank: int, exchange: Exchange, *, may_share: bool) -> Team | None:
    """Map the memory of all ranks of this host; called by all ranks of a group.

    Args:
        rank: This one in the group.
        exchange: Tells all ranks a value of each.
        may_share: False on any rank has all do without.

    Returns:
        None, on all ranks alike, if no two ranks share a host, or if some rank cannot map the
        others' memory; one line in the log says why not.
    """
    arena: Arena | None = None
    card = _Card(may_share)
    if may_share:
        try:
            signals()
            arena = Arena()
            card = _Card(True, own_place(), arena.name)
        except (OSError, AttributeError, Unavailable) as error:
            card = _Card(True, obstacle=f"rank {rank}: {error}")
    cards: list[_Card] = exchange(card)
    if not all(each.may_share for each in cards):
        return None
    places = [each.place for each in cards]
    processes = {(each.place, each.file and each.file.process) for each in cards}
    if len(processes) < len(cards) and None not in places:
        return None  # ranks are threads
    peers: dict[int, Peer] = {}
    if card.obstacle is None:
        try:
            for other, each in enumerate(cards):
                if other != rank and each.place == card.place and each.file is not None:
                    peers[other] = Peer(each.file)
        except OSError as error:
            card = card._replace(obstacle=f"rank {rank}: {error}")
    obstacle = next(filter(None, exchange(card.obstacle)), None)
    if arena is not None:
        arena.hide()
    if obstacle is not None and rank == 0:
        logger.warning("ranks of one host send messages, and share no memory: %s", obstacle)
    distinct = list(dict.fromkeys(places))
    if obstacle is not None or arena is None or len(distinct) == len(places):
        return None
    return Team(arena, peers, [distinct.index(each) for each in places])

"""Rendezvous under torchrun: a fresh store for every generation of workers.

The store of torchrun's agent survives a restart of the workers, with all keys that the previous
generation wrote, torch's own included. So rank 0 serves a new store and publishes its port through
the agent's. Each request for the port has a unique number, so that a rank never reads the answer
to a request of an earlier generation.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from belief_dist.distributed.errors import LaunchError
from belief_dist.distributed.rank_info import RankInfo

_REQUESTS = "belief_dist/requests"
_POLL_SECONDS = 0.02


@contextmanager
def answering(agent: Store, port: int) -> Iterator[None]:
    """Answer requests for the port of this generation's store; called by rank 0."""
    stopped = threading.Event()
    thread = threading.Thread(
        target=_answer, args=(agent, port, stopped), daemon=True, name="belief_dist port"
    )
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _answer(agent: Store, port: int, stopped: threading.Event) -> None:
    answered = 0
    while not stopped.wait(_POLL_SECONDS):
        try:
            asked = agent.add(_REQUESTS, 0)  # reads the counter; get() would wait for the key
            for number in range(answered + 1, asked + 1):
                agent.set(f"{_REQUESTS}/{number}", str(port))
        except dist.DistError:
            return  # the agent's store is gone, which the requesting ranks notice themselves
        answered = asked


def ask_for_port(agent: Store, info: RankInfo) -> int:
    """Return the port of rank 0's store; called by the other ranks.

    Raises:
        LaunchError: Rank 0 does not answer within the timeout of the agent's store.
    """
    number = agent.add(_REQUESTS, 1)
    try:
        return int(agent.get(f"{_REQUESTS}/{number}"))
    except dist.DistError:
        raise LaunchError(
            f"rank 0 has not answered rank {info.rank} at the store of torchrun in time: see what "
            f"rank 0 says."
        ) from None

"""How the ranks of torchrun meet at a store of their own.

The store of torchrun's agent outlives a restart, and keeps what the ranks before it have written:
torch's own keys too. So rank 0 serves a fresh one, whose port it tells through the agent's. Every
question there has a number that no other has, so no answer of the past is taken for the present.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from belief_dist.distributed.errors import LaunchError
from belief_dist.distributed.rank_info import Place

_QUESTIONS = "belief_dist/questions"
_INTERVAL = 0.02  # seconds between two looks for questions


@contextmanager
def answering(agent: Store, port: int) -> Iterator[None]:
    """Tell everyone who asks the port of this generation's store; called by rank 0."""
    ended = threading.Event()
    thread = threading.Thread(
        target=_answer, args=(agent, port, ended), daemon=True, name="belief_dist port"
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _answer(agent: Store, port: int, ended: threading.Event) -> None:
    answered = 0
    while not ended.wait(_INTERVAL):
        try:
            asked = agent.add(_QUESTIONS, 0)
            for number in range(answered + 1, asked + 1):
                agent.set(f"{_QUESTIONS}/{number}", str(port))
        except dist.DistError:
            return  # the agent has gone: whoever still asks notices that, too
        answered = asked


def ask_for_port(agent: Store, place: Place) -> int:
    """Return the port of rank 0's store; called by the other ranks.

    Raises:
        LaunchError: Rank 0 does not answer within the timeout of the agent's store.
    """
    number = agent.add(_QUESTIONS, 1)
    try:
        return int(agent.get(f"{_QUESTIONS}/{number}"))
    except dist.DistError:
        raise LaunchError(
            f"rank 0 has not answered rank {place.rank} at the store of torchrun in time: see what "
            f"rank 0 says."
        ) from None

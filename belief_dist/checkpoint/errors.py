"""Errors of one rank, raised with the same message on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from belief_dist.sharding.collectives import Collectives

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file or the parameter."""


def run_together(comm: Collectives, what: str, action: Callable[[], T]) -> T:
    """Run `action` and return its result, or raise on every rank if it fails on any.

    Called by all ranks. `action` must not communicate.

    Args:
        comm: All ranks.
        what: Start of the message, such as "cannot save step 3 to run".
        action: Raises if it fails.

    Raises:
        CheckpointError: On every rank, with the message of the lowest rank that failed.
    """
    problem: Exception | None = None
    try:
        result = action()
    except Exception as error:
        problem = error
    messages = comm.exchange(None if problem is None else _message(problem))
    for rank, message in enumerate(messages):
        if message is not None:
            where = f"{what}: " if comm.world_size == 1 else f"{what}: rank {rank}: "
            raise CheckpointError(where + message) from problem
    return result


def from_dcp_failure(what: str, failure: CheckpointException) -> CheckpointError:
    """Return an error, equal on all ranks, for a failure that DCP has gathered from them."""
    rank = min(failure.failures)
    problem = failure.failures[rank][0]
    return CheckpointError(f"{what}: rank {rank}: {_message(problem)}")


def _message(problem: BaseException) -> str:
    # These carry a whole sentence; for others, the type is needed to make sense of the text.
    known = isinstance(problem, (CheckpointError, ValueError, OSError))
    return str(problem) if known else f"{type(problem).__name__}: {problem}"

"""One sentence on every rank, whichever rank has met the problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.distributed.checkpoint.api import CheckpointException

from belief_dist.sharding.collectives import Collectives

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the sentence names the file or the parameter."""


def together(team: Collectives, what: str, action: Callable[[], T]) -> T:
    """Run `action` and return its result, or raise on every rank if it fails on any.

    Called by all ranks. `action` must not communicate.

    Args:
        team: All ranks.
        what: Is tried, for example "cannot save step 3 to folder".
        action: Raises if it fails.

    Raises:
        CheckpointError: On every rank, with the sentence of the first rank that has failed.
    """
    problem: Exception | None = None
    try:
        result = action()
    except Exception as error:
        problem = error
    sentences = team.exchange(None if problem is None else _sentence(problem))
    for rank, sentence in enumerate(sentences):
        if sentence is not None:
            where = f"{what}: " if team.world_size == 1 else f"{what}: rank {rank}: "
            raise CheckpointError(where + sentence) from problem
    return result


def of_dcp(what: str, failure: CheckpointException) -> CheckpointError:
    """Return the error for a failure that DCP has gathered from all ranks, the same on each."""
    rank = min(failure.failures)
    problem = failure.failures[rank][0]
    return CheckpointError(f"{what}: rank {rank}: {_sentence(problem)}")


def _sentence(problem: BaseException) -> str:
    known = isinstance(problem, (CheckpointError, ValueError, OSError))
    return str(problem) if known else f"{type(problem).__name__}: {problem}"

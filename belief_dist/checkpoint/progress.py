"""How far long work on files is, told to whoever shows it; with nobody, nothing is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Advance = Callable[[int], object]  # takes a number of bytes that are done
Begin = Callable[[str, int], Advance]  # takes what is done, and its bytes, or 0 if they are unknown

# Threads that save in the background have a context of their own, and show nothing.
_begin: ContextVar[Begin | None] = ContextVar("begin", default=None)


@contextmanager
def shown_by(begin: Begin) -> Iterator[None]:
    """Show the work inside the context.

    Args:
        begin: Called at the start of each piece of work.
    """
    token = _begin.set(begin)
    try:
        yield
    finally:
        _begin.reset(token)


def started(what: str, nbytes: int = 0) -> Advance:
    """Say that work begins, and return what to call whenever some bytes are done.

    Args:
        what: Such as "checking step-00000200".
        nbytes: All that will be done; 0 if that is unknown.
    """
    begin = _begin.get()
    return begin(what, nbytes) if begin is not None else _ignore


def _ignore(nbytes: int) -> None:
    pass

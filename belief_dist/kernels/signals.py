"""Sequence numbers in shared memory, by which processes of one host wait for each other.

See `signals.cpp` for what is visible to whom, and when.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

from belief_dist.kernels.build import Unavailable, find_library

NBYTES = 64  # of a number: a cache line, at a multiple of that
_BITS = 32


class Signals:
    """The functions of `signals.cpp`.

    Raises:
        Unavailable: There is no compiled library, or not for this operating system.
    """

    def __init__(self) -> None:
        library, _ = find_library()
        try:
            self._post, self._await = library.belief_post, library.belief_await
        except AttributeError as error:
            raise Unavailable("futexes are Linux's") from error
        size, word, pointer = ctypes.c_int64, ctypes.c_uint32, ctypes.c_void_p
        self._post.argtypes, self._post.restype = [pointer, word], None
        self._await.argtypes, self._await.restype = [size, pointer, word, size], size

    def post(self, address: int, value: int) -> None:
        """Store a number that this process owns, and wake those who wait for it."""
        self._post(address, value % (1 << _BITS))

    def first_late(
        self, addresses: ctypes.Array[ctypes.c_void_p], target: int, seconds: float = 0.0
    ) -> int | None:
        """Wait until all numbers have reached `target`, for some seconds at most.

        Returns:
            None, or the position of the first number that has not.
        """
        value = target % (1 << _BITS)
        late: int = self._await(len(addresses), addresses, value, int(seconds * 1e9))
        return None if late < 0 else late


def addresses(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_void_p]:
    """Return addresses in the form that `Signals.first_late` takes."""
    return (ctypes.c_void_p * len(numbers))(*numbers)


@lru_cache(maxsize=1)
def signals() -> Signals:
    """Return the functions, loaded once.

    Raises:
        Unavailable: See `Signals`.
    """
    return Signals()

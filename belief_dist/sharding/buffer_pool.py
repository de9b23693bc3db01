"""Buffers that operations under way share in turn, so that only a few ever exist."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Handle(Protocol):
    """An operation under way."""

    def wait(self) -> None:
        """Return when its result may be used."""


class BufferPool:
    """Hands out flat buffers, and gets them back when the operations that use them have ended."""

    def __init__(
        self,
        limit: int,
        least_nbytes: int = 1,
        allocate: Callable[[int, torch.dtype, torch.device], Tensor] | None = None,
    ) -> None:
        """Begin without any buffer.

        Args:
            limit: Buffers that exist at the same time, unless more are taken than operations
                under way could give back.
            least_nbytes: Size of the smallest buffer in bytes.
            allocate: Makes flat buffers, of elements of a dtype on a device; torch.empty if None.
        """
        self._limit = limit
        # Buffers are told apart by their address, and one of no bytes has none.
        self._least_nbytes = max(least_nbytes, 1)
        self._allocate = allocate
        self._free: list[Tensor] = []  # uint8
        self._taken: dict[int, Tensor] = {}  # likewise, by address
        self._running: deque[_Loan] = deque()

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a flat buffer (numel,) whose contents are undefined.

        If `limit` buffers are in use, the oldest operations are waited for first.
        """
        while len(self._taken) >= self._limit and self._will_get_back():
            self._running[0].wait()
        nbytes = numel * dtype.itemsize
        whole = None
        for position, candidate in enumerate(self._free):
            if candidate.numel() >= nbytes:
                whole = self._free.pop(position)
                break
        if whole is None:
            self._free.clear()  # all are too small
            size = max(nbytes, self._least_nbytes)
            if self._allocate is None:
                whole = torch.empty(size, dtype=torch.uint8, device=device)
            else:
                whole = self._allocate(size, torch.uint8, device)
        self._taken[whole.data_ptr()] = whole
        return whole[:nbytes].view(dtype)

    def give_back(self, buffer: Tensor) -> None:
        """Take back what `take` has returned."""
        # By storage: a slice of no elements has no address of its own.
        self._free.append(self._taken.pop(buffer.untyped_storage().data_ptr()))

    def lend(self, operation: Handle, buffer: Tensor | None = None) -> Handle:
        """Leave `buffer` to an operation under way, and return the handle to wait by.

        Args:
            operation: Is waited for once, by the returned handle, by `take` or by `drain`.
            buffer: From `take`; it comes back when the operation has ended. None if the operation
                uses none, but must be waited for in its turn.
        """
        loan = _Loan(self, operation, buffer)
        self._running.append(loan)
        return loan

    def drain(self) -> None:
        """Wait for all operations, in the order in which they began."""
        while self._running:
            self._running[0].wait()

    def nbytes(self) -> int:
        """Return the bytes of all buffers, in use or not."""
        return sum(buffer.numel() for buffer in (*self._free, *self._taken.values()))

    def _will_get_back(self) -> bool:
        return any(loan.buffer is not None for loan in self._running)

    def _end(self, loan: _Loan) -> None:
        self._running.remove(loan)
        if loan.buffer is not None:
            self.give_back(loan.buffer)


class _Loan:
    """An operation that gives its buffer back to the pool."""

    def __init__(self, pool: BufferPool, operation: Handle, buffer: Tensor | None) -> None:
        self.buffer = buffer
        self._pool = pool
        self._operation = operation
        self._is_running = True

    def wait(self) -> None:
        if self._is_running:
            self._operation.wait()  # one that fails stays, and raises at every wait
            self._is_running = False
            self._pool._end(self)

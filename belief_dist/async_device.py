"""Devices that work through a queue, while the host is already further on.

Everything that is different there hangs on `runs_behind`, which is looked up in this module, so
that a test can send CPU tensors down that very path: values that the host needs are copied to it in
the queue's order and read later, small tables are uploaded without waiting, and many small
operations are one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_NOT_THERE_YET = -1


def runs_behind(device: torch.device) -> bool:
    """Return whether reading a value of this device makes the host wait for all its work."""
    return device.type != "cpu"


def is_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph records what is launched now, instead of running it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which `device` is the current one: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def upload(
    numbers: Sequence[float] | Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return (len(numbers),) on the device, without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    # torch keeps pinned memory until the copy has ended.
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class LateRead:
    """A number of the device, not negative, that the host reads later."""

    def __init__(self, number: Tensor) -> None:
        """Start to copy `number`, one element, int64."""
        self._event: torch.cuda.Event | None = None
        if number.device.type != "cuda":
            self._copy = number
            return
        self._copy = torch.full((1,), _NOT_THERE_YET, dtype=torch.int64, pin_memory=True)
        self._copy.copy_(number.view(1), non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(number.device))

    def get(self) -> int:
        """Return the number; waits until the device has come to it, but not for what follows.

        Raises:
            RuntimeError: It is not there yet, and a CUDA graph is captured, which must not wait.
        """
        # The memory itself tells: asking the event is not allowed while a graph is captured.
        found = int(self._copy)
        if found == _NOT_THERE_YET and self._event is not None:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "the outcome of the last step is not known yet: call torch.cuda.synchronize() "
                    "before a CUDA graph captures a step."
                )
            self._event.synchronize()
            found = int(self._copy)
        return found

"""Ranks that wait for each other on their GPUs, in the order of a stream; the host waits for none.

See `triton_meet` for how. A pad is memory that every rank has mapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from belief_dist.async_device import current

# Of a pad: one for every kind of meeting, all of whose launches are on one stream.
SUMS, GATHERS, MESSAGES = _LINES = range(3)
# Longer ones go elsewhere.
MESSAGE_BYTES = 1 << 16
_WORD = 8  # bytes of a number
_LINE_BYTES = 128  # lines begin in lines of the cache of their own

# How often a second looks, where there is no clock: in the interpreter, and on AMD's GPUs about.
_LOOKS_INTERPRETED, _LOOKS = 1_000, 1_000_000
_TILE = 256
_WARP = 64  # threads of the widest
# Kernels are compiled by the first ones.
_FIRST = timedelta(seconds=60)


def pad_nbytes(world_size: int) -> int:
    """Return the bytes of a rank's pad, which must be zero before the first meeting."""
    return len(_LINES) * _line_nbytes(world_size) + MESSAGE_BYTES


def _line_nbytes(world_size: int) -> int:
    return -(-(1 + _width(world_size)) * _WORD // _LINE_BYTES) * _LINE_BYTES


def _width(world_size: int) -> int:
    # No thread has to share a slot with another: of these, Triton 3.4 gives one the result.
    return max(_WARP, 1 << (world_size - 1).bit_length())


class Meetings:
    """The meetings of one rank."""

    def __init__(
        self, pads: Sequence[Tensor], rank: int, timeout: timedelta, *, interprets: bool
    ) -> None:
        """Meet with the ranks to whom `pads` belong.

        Args:
            pads: Of all ranks, in their order, (pad_nbytes,), uint8, as this process has them
                mapped.
            rank: This one among them.
            timeout: After which a rank that is missing ends the work of the device, once
                `insist` was called; until then it is one of `late`, after a minute at most.
            interprets: The pads are in memory of the host.
        """
        from belief_dist.kernels import triton_meet

        self._kernels = triton_meet
        self._rank, self._world_size = rank, len(pads)
        self._interprets = interprets
        device = pads[rank].device
        size = _line_nbytes(len(pads))
        # The host reads it whatever has become of the device.
        self._late = torch.zeros(
            _width(len(pads)), dtype=torch.int64, pin_memory=device.type == "cuda"
        )
        self._late_words = self._late.numpy()
        lines = [pads[rank][line * size :][:size].view(torch.int64) for line in _LINES]
        self._message = pads[rank][len(_LINES) * size :].view(torch.int64)
        self._own = lines
        *self._pads, self._messages = (
            torch.tensor([pad.data_ptr() + start * size for pad in pads]).to(device)
            for start in (*_LINES, len(_LINES))
        )
        is_nvidia = device.type == "cuda" and torch.version.hip is None
        self._units = 10**9 if is_nvidia else _LOOKS_INTERPRETED if interprets else _LOOKS
        self._timeout = timeout
        self._limit = int(min(timeout, _FIRST).total_seconds() * self._units)
        self._options: dict[str, Any] = {
            "PTX": is_nvidia,
            "WIDTH": _width(len(pads)),
            "ASSERTS": False,
        }
        self._warps = {} if interprets else {"num_warps": 1, "num_stages": 1}
        if not interprets:
            self._options |= {**self._warps, "debug": True}  # assertions count

    def insist(self) -> None:
        """From now on end the work of the device if a rank does not come in time."""
        self._options["ASSERTS"] = True
        self._limit = int(self._timeout.total_seconds() * self._units)

    def meet(self, line: int) -> None:
        """Let what follows on the current stream wait until all ranks have come as often as this.

        What a rank has written before, on the stream of its meeting, can be read after it.

        Args:
            line: The kind of meeting; all ranks have those of a kind in one order.

        Raises:
            RuntimeError: A rank is late, where kernels are interpreted; on a GPU that surfaces as
                an error of the device, and `late` tells who it was.
        """
        with current(self._own[line].device):
            self._kernels.meet[(1,)](
                self._pads[line],
                self._own[line],
                self._late,
                self._rank,
                self._world_size,
                self._limit,
                **self._options,
            )
        if self._interprets and self.late():
            raise RuntimeError("a rank has not come in time")

    @contextmanager
    def between(self, line: int) -> Iterator[None]:
        """Read what others have written, between two meetings.

        Args:
            line: As for `meet`.
        """
        self.meet(line)
        # An error of this rank alone must not leave it a meeting behind the others.
        try:
            yield
        finally:
            self.meet(line)

    def add_up(self, message: Tensor) -> None:
        """Add a small message over the ranks, in place, on the current stream.

        Args:
            message: (n,), int64, contiguous, MESSAGE_BYTES at most.

        Raises:
            RuntimeError: See `meet`.
        """
        numel = message.numel()
        self._message[:numel].copy_(message.view(-1))
        with self.between(MESSAGES), current(message.device):
            self._kernels.add_words[(-(-numel // _TILE),)](
                message, self._messages, numel, self._world_size, TILE=_TILE, **self._warps
            )

    def late(self) -> list[int]:
        """Return the ranks that did not come in time, as far as is known by now."""
        found: list[int] = self._late_words.nonzero()[0].tolist()
        return found

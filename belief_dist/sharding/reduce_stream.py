"""A CUDA stream for reductions and sums, so that backward never waits for what is on the wire.

A backend's `wait` makes the current stream wait. On backward's own stream that would hold up the
next layers until a bucket has travelled; here it holds up only the sum behind it.

    backward   layers 9 8 | 7 6 | 5 4 | 3 2 | 1 0            | step
    this       bucket a ->  sum a, bucket c ->  sum c        |
               (b and d likewise, two at a time)             | backward's stream waits once

Buffers that are read here are the optimizer's own and stay, or were taken here, so torch's
allocator gives none of them to another stream.
"""

from __future__ import annotations

import torch

from belief_dist.sharding.buffer_pool import Handle
from belief_dist.sharding.collectives import Collectives, ReduceRequest


class ReduceStream:
    """Starts reductions, on CUDA on a stream of its own."""

    def __init__(self, device: torch.device, world_size: int) -> None:
        """Serve `device`; a single rank waits for nobody, and needs no other stream."""
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda" and world_size > 1:
            self._stream = torch.cuda.Stream(device)

    def start(self, comm: Collectives, request: ReduceRequest) -> Handle:
        """Start a reduction of what the current stream has written so far."""
        if self._stream is None:
            return comm.start_reduce(request)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            return _OnStream(comm.start_reduce(request), self._stream)


class _OnStream:
    """A reduction whose sum runs on `stream`."""

    def __init__(self, operation: Handle, stream: torch.cuda.Stream) -> None:
        self._operation, self._stream = operation, stream

    def wait(self) -> None:
        """Make the current stream wait; the host goes on, unless the backend stops it."""
        with torch.cuda.stream(self._stream):
            self._operation.wait()
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

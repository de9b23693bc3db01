"""Gradients on their way to the host, where states and master weights are.

While the host updates one bucket, the gradients of the next come over: two buffers take turns. On
CUDA they are pinned and copied on a stream of their own; on the CPU a copy is just a copy. Updated
parameters go back in the order of the main stream, in front of their gather.

Source: ZeRO-Offload, arXiv:2101.06840, sections 4 and 5.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from belief_dist.kernels.threads import idle_cores, one_thread_sentence
from belief_dist.sharding.bucket import BucketBuffers


class HostGradients:
    """Two host buffers for the gradients of a bucket's shard."""

    def __init__(self, buckets: Sequence[BucketBuffers]) -> None:
        """Allocate for the largest of `buckets`, of which there is at least one."""
        size = max(bucket.grad_shard.nbytes for bucket in buckets)
        self._device = buckets[0].grad_shard.device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        pinned = self._stream is not None
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]

    def fetch(self, buckets: Sequence[BucketBuffers]) -> Iterator[Tensor]:
        """Start to copy, and return the gradients (shard_numel,) of each bucket, one by one.

        They are those at the time of the call: what the device does afterwards is not waited for.
        Each is valid until the next is asked for.
        """
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return self._arrivals(buckets, [self._start(each, n) for n, each in enumerate(buckets[:2])])

    def _arrivals(
        self, buckets: Sequence[BucketBuffers], copies: list[tuple[Tensor, torch.cuda.Event | None]]
    ) -> Iterator[Tensor]:
        for turn in range(len(buckets)):
            if 1 <= turn < len(buckets) - 1:  # what came before has been used
                copies.append(self._start(buckets[turn + 1], turn + 1))
            host, event = copies[turn]
            if event is not None:
                event.synchronize()
            yield host

    def _start(self, bucket: BucketBuffers, turn: int) -> tuple[Tensor, torch.cuda.Event | None]:
        grads = bucket.grad_shard
        host = self._buffers[turn % 2][: grads.nbytes].view(grads.dtype)
        if self._stream is None:
            return host.copy_(grads), None
        with torch.cuda.stream(self._stream):
            host.copy_(grads, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return host, event

    def nbytes(self) -> int:
        """Return the bytes of both buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)


def warn_of_one_thread(offload: str | float, num_ranks: int) -> None:
    """Warn if the update on the host will use one core though this rank could have more."""
    share = idle_cores(num_ranks)
    if share:
        warnings.warn(f"offload={offload!r} {one_thread_sentence(share)}", stacklevel=4)

"""Tables of addresses in device memory: many tensors for one launch.

Everything in a table stays where it is from step to step, but for gradients, which are new tensors
each time. So their addresses are a vector of its own, and all that a step uploads. Uploads come
from pinned memory and the host never waits: torch's allocator of pinned memory gives a block out
again only when an event behind its last copy has passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from belief_dist.async_device import is_capturing

# Ten addresses as in Operands without its gradient, numel, key, first, address of the sums or 0,
# and which of the update's scalars are its own.
Row = tuple[int, ...]
ADDRESSES = 10
_ALIGNED = 7  # the leading ones; exponents are read one by one and need no alignment

# What captured graphs read, which keep addresses and no references.
_held: list[Tensor] = []


def chunks_of(lengths: Sequence[int], size: int) -> Tensor:
    """Return the map from programs to segments: (chunks,), int64.

    Args:
        lengths: Of the segments.
        size: Of a chunk, the last of a segment being shorter.

    Returns:
        Of each chunk segment << 32 | number of the chunk in its segment.
    """
    counts = torch.tensor([-(-length // size) for length in lengths])
    before = (counts.cumsum(0) - counts).repeat_interleave(counts)
    segment = torch.arange(len(lengths)).repeat_interleave(counts)
    return segment << 32 | torch.arange(len(before)) - before


@dataclass
class Uploaded:
    """The arguments of `update_many` on the device, and whether all addresses are aligned."""

    segments: Tensor  # (segments, 15), int64
    chunks: Tensor  # (chunks,), int64
    grads: Tensor  # (segments,), int64
    addresses: Sequence[int]  # the same
    aligned: bool


class Table:
    """The tensors of one launch, wherever their gradients lie.

    Args:
        rows: One for each segment.
        device: Of all tensors.
        chunk: Elements that share an entry of the map from programs to segments.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device, chunk: int) -> None:
        self._device = device
        self._chunks = chunks_of([row[ADDRESSES] for row in rows], chunk)
        self._segments = torch.tensor(rows, dtype=torch.int64)
        self._aligned = not (self._segments[:, :_ALIGNED] % 16).any()
        # For each stream, as memory that one stream gives back another might still read.
        self._uploaded: dict[int, Uploaded] = {}

    def upload(self, grads: Sequence[int]) -> Uploaded | None:
        """Return the table on the device, with gradients at these addresses.

        Returns:
            None while a graph is captured, if this table is not there yet: an upload would become
            part of the graph, which would need the host memory on every replay.
        """
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device).cuda_stream if on_gpu else 0
        found = self._uploaded.get(stream)
        if is_capturing(self._device):
            # Whoever captures has waited for the device: uploads of other streams are there.
            there = [each for each in self._uploaded.values() if each.addresses == grads]
            if not there:
                return None
            found = there[0]
            _held.extend((found.segments, found.chunks, found.grads))
            return found
        if found is None or found.addresses != grads:
            # A new vector: a captured graph may read the one before.
            vector = self._copy(torch.tensor(grads, dtype=torch.int64))
            segments = self._copy(self._segments) if found is None else found.segments
            chunks = self._copy(self._chunks) if found is None else found.chunks
            aligned = self._aligned and reduce(or_, grads) % 16 == 0
            found = Uploaded(segments, chunks, vector, grads, aligned)
            self._uploaded[stream] = found
        return found

    def _copy(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

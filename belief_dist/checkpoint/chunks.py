"""Cut a range of a flattened tensor into rectangular chunks: pure arithmetic on integers.

An optimizer owns a range of the flattened parameter, but torch.distributed.checkpoint stores and
reshards rectangular chunks of the tensor in its own shape. A range that covers whole rows is one
chunk; any other takes at most ``2 * ndim - 1``. Elements keep their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Largest chunk, in elements. A chunk is read or written at once, so this bounds the extra memory.
MAX_NUMEL = 4 << 20


class Chunk(NamedTuple):
    """The elements ``offsets[d] <= index[d] < offsets[d] + sizes[d]`` of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int  # of its elements in the flattened tensor, where they are consecutive

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


def chunks_of_range(
    shape: Sequence[int], start: int, stop: int, *, max_numel: int = MAX_NUMEL
) -> Iterator[Chunk]:
    """Yield the chunks that hold elements [start, stop) of the flattened tensor, in order.

    Args:
        shape: Shape of the contiguous tensor.
        start: First element, >= 0.
        stop: End of the range (exclusive), <= the tensor's number of elements.
        max_numel: Elements of the largest chunk, >= 1.
    """
    if start >= stop:
        return
    if not shape:
        yield Chunk((), (), start)
        return
    inner_shape = tuple(shape[1:])
    row_numel = math.prod(inner_shape)  # > 0, because the range is not empty
    row = start // row_numel
    while start < stop:
        row_start, row_stop = row * row_numel, (row + 1) * row_numel
        whole_rows = (stop - start) // row_numel if start == row_start else 0
        rows = min(whole_rows, max_numel // row_numel)
        if rows == 0:
            # Part of a row, or a row larger than max_numel: cut the row itself.
            inner = chunks_of_range(
                inner_shape, start - row_start, min(stop, row_stop) - row_start, max_numel=max_numel
            )
            for chunk in inner:
                yield Chunk((row, *chunk.offsets), (1, *chunk.sizes), row_start + chunk.start)
            start, row = row_stop, row + 1
            continue
        yield Chunk((row, *(0 for _ in inner_shape)), (rows, *inner_shape), start)
        start, row = start + rows * row_numel, row + rows


def memory_order(strides: Sequence[int]) -> tuple[int, ...]:
    """Return the dimensions of a dense tensor from the slowest-varying in memory to the fastest."""
    return tuple(sorted(range(len(strides)), key=lambda d: (-strides[d], d)))


def permuted(values: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Return one value per dimension, reordered to `order`."""
    return tuple(values[d] for d in order)


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """Return the permutation that undoes `order`."""
    return tuple(sorted(range(len(order)), key=lambda position: order[position]))

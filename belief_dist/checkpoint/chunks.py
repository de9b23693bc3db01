"""Ranges of a flattened tensor as boxes of its shape: pure arithmetic on integers.

An optimizer owns ranges of the flattened parameter, and files hold boxes of the shaped one: boxes
are what torch.distributed.checkpoint reshards. A range is one box where it covers whole rows, and
at most ``2 * ndim - 1`` otherwise. Both hold the same elements in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Elements of a box, at most: what is read or written at once, so that memory stays small.
MAX_NUMEL = 4 << 20


class Box(NamedTuple):
    """The elements ``offsets[d] <= index[d] < offsets[d] + sizes[d]`` of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int  # where its elements begin in the flattened tensor; they are consecutive

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


def boxes(
    shape: Sequence[int], start: int, stop: int, *, max_numel: int = MAX_NUMEL
) -> Iterator[Box]:
    """Cut elements [start, stop) of the flattened tensor into boxes, in their order.

    Args:
        shape: Of the tensor, contiguous.
        start: First element, >= 0.
        stop: First element that is not meant any more, <= the tensor's number of elements.
        max_numel: Size of the largest box, >= 1.
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), (), start)
        return
    rest = tuple(shape[1:])
    inner = math.prod(rest)  # > 0, because there are elements
    row = start // inner
    while start < stop:
        row_stop = (row + 1) * inner
        whole = (stop - start) // inner if start == row * inner else 0
        rows = min(whole, max_numel // inner)
        if rows == 0:  # a part of a row, or one that is too large
            first = row * inner
            inside = boxes(rest, start - first, min(stop, row_stop) - first, max_numel=max_numel)
            for box in inside:
                yield Box((row, *box.offsets), (1, *box.sizes), box.start + first)
            start, row = row_stop, row + 1
            continue
        yield Box((row, *(0 for _ in rest)), (rows, *rest), start)
        start, row = start + rows * inner, row + rows


def memory_order(strides: Sequence[int]) -> tuple[int, ...]:
    """Return the dimensions of a dense tensor from the slowest to the fastest in memory."""
    return tuple(sorted(range(len(strides)), key=lambda d: (-strides[d], d)))


def permuted(values: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Return `values` in another order of the dimensions."""
    return tuple(values[d] for d in order)


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """Return the order that undoes `order`."""
    return tuple(sorted(range(len(order)), key=lambda position: order[position]))

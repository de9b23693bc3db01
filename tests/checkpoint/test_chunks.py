"""Boxes of a range: the same elements, in the same order, each once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from belief_dist.checkpoint.chunks import chunks_of_range
from belief_dist.checkpoint.dcp_tensor import make_dcp_tensor


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 5), max_size=4), st.data())
def test_boxes_hold_the_range(shape: list[int], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    limit = data.draw(st.integers(1, 40))
    whole = torch.arange(numel).view(shape)
    found = list(chunks_of_range(shape, start, stop, max_numel=limit))
    for box in found:
        part = whole
        for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
            part = part.narrow(dim, offset, size)
        assert part.flatten().tolist() == list(range(box.start, box.start + box.numel))
        assert 1 <= box.numel <= limit
    assert [e for b in found for e in range(b.start, b.start + b.numel)] == list(range(start, stop))


@pytest.mark.parametrize("strides", [(1, 8, 4), (12, 4, 1), (4, 1, 8)])
def test_pieces_are_boxes_of_the_logical_tensor(strides: tuple[int, ...]) -> None:
    """A range of memory, of a tensor whose dimensions lie there in another order."""
    sizes = {(1, 8, 4): (4, 3, 2), (12, 4, 1): (2, 3, 4), (4, 1, 8): (2, 4, 3)}[strides]
    memory = torch.arange(24)
    logical = memory.as_strided(sizes, strides)
    parts = make_dcp_tensor(memory[5:17], 5, 17, sizes, torch.int64, strides=strides)
    seen = []
    for offsets, piece in parts.chunks.items():
        part = logical
        for dim, (offset, size) in enumerate(zip(offsets, piece.sizes, strict=True)):
            part = part.narrow(dim, offset, size)
        assert torch.equal(piece.read(), part)
        seen += part.flatten().tolist()
    assert sorted(seen) == list(range(5, 17))

"""The checksum of replicas: the same number from every backend, and what it notices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from belief_dist import kernels
from belief_dist.kernels import checksums, eager
from belief_dist.kernels.cpp import CppKernel

MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1


def by_definition(words: list[int], first: int) -> int:
    """Add up with Python's integers."""
    total = 0
    for place, word in enumerate(words, first):
        low = (word + place * 0x9E3779B1 + 0x7FEB352D) & MASK32
        high = ((word >> 32) + place * 0x85EBCA77 + 0x846CA68B) & MASK32
        total += low * high
    total &= MASK64
    return total - (1 << 64) if total >> 63 else total


WORDS = st.integers(-(1 << 63), (1 << 63) - 1)


@settings(deadline=None)  # the first call may compile
@given(st.lists(WORDS, min_size=1, max_size=40), st.integers(0, 1 << 40))
def test_all_backends_follow_the_definition(words: list[int], first: int) -> None:
    flat = torch.tensor(words, dtype=torch.int64)
    expected = by_definition([word & MASK64 for word in words], first)
    assert int(kernels.checksums([flat], [first])) == expected
    assert int(eager.checksum(flat, first)) == expected


def test_long_buffers(threads: int, kernel: CppKernel) -> None:
    for dtype, count in ((torch.float32, 300_002), (torch.bfloat16, 70_004), (torch.float64, 5)):
        flat = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
        assert kernel.checksum(flat, 7) == int(eager.checksum(flat, 7))


def swap_rows(flat: Tensor) -> None:
    flat.view(-1, 8)[[2, 5]] = flat.view(-1, 8)[[5, 2]]


def two_signs(flat: Tensor) -> None:
    flat[[25, 29]] *= -1


def neighbours(flat: Tensor) -> None:
    flat[[10, 11]] = flat[[11, 10]]


def opposite(flat: Tensor) -> None:
    words = flat.view(torch.int64)
    words[3] += 1 << 20
    words[9] -= 1 << 20


CHANGES = [swap_rows, two_signs, neighbours, opposite]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_plain_sum_does_not_notice(change: object, dtype: torch.dtype) -> None:
    flat = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = checksums([flat], [0])
    change(flat)  # type: ignore[operator]
    assert not torch.equal(before, checksums([flat], [0]))


def test_every_bit_counts() -> None:
    flat = torch.randn(64)
    before = int(checksums([flat], [0]))
    bits = flat.view(torch.int64)
    for word in range(len(bits)):
        for bit in range(64):
            mask = (1 << bit) - (1 << 64 if bit == 63 else 0)
            bits[word] ^= mask
            assert int(checksums([flat], [0])) != before, (word, bit)
            bits[word] ^= mask


def test_buckets_that_change_places() -> None:
    first, second = torch.randn(32), torch.randn(32)
    assert (
        checksums([first, second], [0, first.nbytes // 8]).sum()
        != checksums([second, first], [0, second.nbytes // 8]).sum()
    )

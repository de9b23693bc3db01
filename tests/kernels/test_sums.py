"""Sums in rank order, and the square root, with the bits that IEEE 754 defines."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from belief_dist import kernels
from belief_dist.kernels import eager
from belief_dist.kernels.cpp import CppKernel
from belief_dist.norm import NUM_WORDS, norm_from_bins
from belief_dist.rule import (
    correctly_rounded_sqrt,
)
from tests.harness.kernels import bits, values

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


# - The square root


@pytest.mark.parametrize("dtype, decades", [(F32, 38), (F32, 45), (F64, 300), (F64, 323)])
def test_square_roots_are_correctly_rounded(dtype: torch.dtype, decades: int) -> None:
    """As IEEE 754 has it, and as numpy computes; torch.sqrt does not everywhere."""
    exponent = torch.empty(300_000, dtype=F64).uniform_(-decades, min(decades, 38))
    x = (torch.rand(300_000, dtype=F64) * 10**exponent).to(dtype)
    x[:3] = torch.tensor([0.0, float("inf"), 1.0])
    assert np.array_equal(correctly_rounded_sqrt(x).numpy(), np.sqrt(x.numpy()))
    assert correctly_rounded_sqrt(torch.tensor([-1.0, float("nan")], dtype=dtype)).isnan().all()


# - Sums in rank order


@pytest.mark.parametrize("dtype, total", [(F32, F32), (BF16, F32), (F16, F32), (F64, F64)])
@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_sums_in_order(
    dtype: torch.dtype, total: torch.dtype, backend: str, threads: int, kernel: CppKernel
) -> None:
    """Equal to adding one piece after the other, whichever piece the result overwrites."""
    for world_size, n in itertools.product((1, 2, 3, 4, 5, 9), (0, 1, 17, 70_001)):
        generator = torch.Generator().manual_seed(world_size)
        pieces = [values(n, 1, dtype, generator) for _ in range(world_size)]
        expected = pieces[0].to(total, copy=True)
        for piece in pieces[1:]:
            expected += piece.to(total)
        # A sum may go on from what is in the result, as if that were another first piece.
        out = pieces[0].to(total, copy=True)
        if world_size > 1:
            ordered_sum_ = kernels.ordered_sum_ if backend == "cpp" else eager.ordered_sum_
            ordered_sum_(out, pieces[1:], accumulate=True)
        assert torch.equal(bits(out), bits(expected)), (world_size, n)
        for own in range(world_size) if dtype == total else [None]:
            given_pieces = [piece.clone() for piece in pieces]
            out = torch.empty(n, dtype=total) if own is None else given_pieces[own]
            squares, expected_squares = (torch.zeros(NUM_WORDS, dtype=torch.int64) for _ in "12")
            if backend == "cpp":
                kernels.ordered_sum_(out, given_pieces, squares)
                kernels.squared_norm_bins_(expected_squares, expected)
            else:
                eager.ordered_sum_(out, given_pieces)
            assert torch.equal(bits(out), bits(expected)), (world_size, n, own)
            # What two calls add to the bins may be carried differently, but is one number.
            assert torch.equal(
                bits(norm_from_bins(squares)), bits(norm_from_bins(expected_squares))
            )


@pytest.mark.parametrize("total", [F32, F64])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_sums_into_another_dtype(dtype: torch.dtype, total: torch.dtype) -> None:
    pieces = [values(100, 1, dtype, torch.Generator().manual_seed(i)) for i in range(3)]
    out = torch.empty(100, dtype=total)
    kernels.ordered_sum_(out, pieces)
    first, second, third = (piece.to(total) for piece in pieces)
    assert torch.equal(bits(out), bits(first + second + third))

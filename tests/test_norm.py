"""The global norm is an exact sum: its bits depend on the numbers alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from belief_dist import kernels, norm

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BACKENDS = [kernels.squared_norm_bins_, norm.add_squares_]
# Decades of gradients that are usual, wide, denormal, huge.
RANGES = [(-2, 2), (-38, 38), (-45, -30), (10, 38)]


def numbers(n: int, decades: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.empty(n, dtype=F64).uniform_(*decades, generator=generator)
    return (torch.randn(n, dtype=F64, generator=generator) * 10**exponent).to(dtype)


def bins_of(pieces: list[Tensor], add: Callable[[Tensor, Tensor], None]) -> Tensor:
    """Return the sum of the bins that each piece gives, as ranks would add them."""
    total = torch.zeros(norm.NUM_WORDS, dtype=torch.int64)
    for piece in pieces:
        own = torch.zeros_like(total)
        add(own, piece)
        total += own
    return total


def leading(bins: Tensor) -> tuple[int, ...]:
    """Return the highest bin in use, and what it and the two below count: all that is read."""
    low, high = bins[: 2 * norm.NUM_BINS : 2].tolist(), bins[1 : 2 * norm.NUM_BINS : 2].tolist()
    counts = [0, 0, *(first + (second << 32) for first, second in zip(low, high, strict=True))]
    top = max((place for place, count in enumerate(counts) if count), default=2)
    return top, *counts[top - 2 : top + 1]


def exact_norm(values: Tensor) -> float:
    """Return the root of the sum of squares in rational arithmetic, rounded at the end."""
    total = sum((Fraction(v) ** 2 for v in values.double().tolist()), Fraction(0))
    if total == 0:
        return 0.0
    shift = 2 * ((total.numerator.bit_length() - total.denominator.bit_length() - 160) // 2)
    scaled = total / Fraction(2) ** shift
    return math.ldexp(math.isqrt(scaled.numerator // scaled.denominator), shift // 2)


@given(
    n=st.integers(0, 20_000),
    decades=st.sampled_from(RANGES),
    dtype=st.sampled_from([F32, F64]),
    cuts=st.lists(st.floats(0, 1), max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_order_cuts_and_backend_do_not_matter(
    n: int, decades: tuple[int, int], dtype: torch.dtype, cuts: list[float], seed: int
) -> None:
    values = numbers(n, decades, dtype, seed)
    places = sorted(int(cut * n) for cut in cuts)
    shuffled = values[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    bins = [
        bins_of(pieces, add)
        for add in BACKENDS
        for pieces in ([values], [shuffled], list(torch.tensor_split(shuffled, places)))
    ]
    assert len({norm.norm_from_bins(sums).item() for sums in bins}) == 1
    # Rounding would hide most differences.
    assert len({leading(sums) for sums in bins}) == 1


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_threads_do_not_matter(dtype: torch.dtype) -> None:
    """Long enough that threads share the work and plain torch takes several chunks."""
    values = numbers(2 * norm._CHUNK + 5, (-45, 38) if dtype != F16 else (-8, 4), dtype, seed=8)
    before = torch.get_num_threads()
    norms = set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for add in BACKENDS:
                bins = bins_of([values], add)
                norms.add((norm.norm_from_bins(bins).item(), norm.nonfinite_count(bins).item()))
    finally:
        torch.set_num_threads(before)
    assert len(norms) == 1


@pytest.mark.parametrize("add", BACKENDS)
@pytest.mark.parametrize("bin_", range(norm.LOW_BIN + 1, norm.HIGH_BIN + 1))
def test_where_squares_round_into_the_bin_above(
    add: Callable[[Tensor, Tensor], None], bin_: int
) -> None:
    """Both sides of half a unit, next to numbers far below: none is lost or counted twice."""
    edge = 2.0 ** (16 * bin_) * math.sqrt(0.5)
    around = [math.nextafter(edge, 0.0), edge, math.nextafter(edge, math.inf)]
    for value, more in itertools.product(around, (0, 1, 1000)):
        values = torch.tensor([value] + [edge * 2.0**-9] * more, dtype=F64)
        got = norm.norm_from_bins(bins_of(list(values.split(7)), add)).item()
        assert math.isclose(got, exact_norm(values), rel_tol=2 * 2**-52)


def test_the_largest_number_that_counts() -> None:
    """Both backends draw the line at the same number."""
    for add in BACKENDS:
        for value, count in ((2.0**144, 1), (math.nextafter(2.0**144, 0.0), 0)):
            bins = bins_of([torch.tensor([value, -value], dtype=F64)], add)
            assert norm.nonfinite_count(bins) == 2 * count


@pytest.mark.parametrize("add", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("decades", RANGES)
def test_equals_exact_arithmetic(
    add: Callable[[Tensor, Tensor], None], dtype: torch.dtype, decades: tuple[int, int]
) -> None:
    """To 2 ulp of float64: one each for the sum of the leading bins and for the root."""
    values = numbers(3000, decades, dtype, seed=5)
    values = values[values.isfinite()]
    expected = exact_norm(values)
    got = norm.norm_from_bins(bins_of([values], add)).item()
    # Squares below 2^-320 count as zero; no float32 number has one.
    assert math.isclose(got, expected, rel_tol=2 * 2**-52)


@pytest.mark.parametrize("add", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_what_is_not_finite_is_counted_apart(
    add: Callable[[Tensor, Tensor], None], dtype: torch.dtype
) -> None:
    values = numbers(5000, (-2, 2), dtype, seed=6)
    finite = values.clone()
    for place, bad in ((0, math.nan), (17, math.inf), (4999, -math.inf)):
        values[place], finite[place] = bad, 0.0
    bins = bins_of([values], add)
    assert norm.nonfinite_count(bins) == 3
    assert torch.equal(norm.norm_from_bins(bins), norm.norm_from_bins(bins_of([finite], add)))


def test_a_number_whose_square_overflows_is_not_finite_either() -> None:
    """Documented for float64; the largest float32 numbers are well inside."""
    for add in BACKENDS:
        assert norm.nonfinite_count(bins_of([torch.tensor([1e50], dtype=F64)], add)) == 1
        largest = torch.full((100_000,), torch.finfo(F32).max)
        bins = bins_of([largest], add)
        assert norm.nonfinite_count(bins) == 0
        expected = torch.finfo(F32).max * math.sqrt(100_000)
        assert math.isclose(norm.norm_from_bins(bins).item(), expected, rel_tol=1e-14)


def test_a_float32_sum_would_depend_on_the_order() -> None:
    """The control: the ordinary way fails what the tests above ask for."""
    values = numbers(20_000, (-2, 2), F32, seed=7)
    orders = [torch.randperm(20_000, generator=torch.Generator().manual_seed(s)) for s in range(8)]
    assert len({float(np.cumsum(values[order].square().numpy())[-1]) for order in orders}) > 1

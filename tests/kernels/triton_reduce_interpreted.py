"""Sums, squares, checksums and factors of the GPU on CPU tensors, bit for bit.

test_triton_reduce.py runs this in a process: see triton_interpreted.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from belief_dist import kernels
from belief_dist.kernels import eager
from belief_dist.kernels.cpp import CppKernel
from belief_dist.kernels.triton_reduce_launch import Shape, TritonReductions
from belief_dist.norm import NUM_WORDS, add_squares_, norm_from_bins
from tests.harness.kernels import bits, values

# numpy, which the interpreter computes with, warns of what special numbers do.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CPP = CppKernel()


def reductions() -> TritonReductions:
    """Return small tiles and few programs, so that every program has several tiles."""
    found = TritonReductions(interprets=True)
    found.shape = Shape(64, 64, 1)
    found.checksum_tile, found.checksum_chunk = 32, 2
    return found


def new_bins() -> Tensor:
    return torch.zeros(NUM_WORDS, dtype=torch.int64)


def numbers(n: int, dtype: torch.dtype, seed: int, decades: float) -> Tensor:
    """Return numbers around a magnitude of their own each, special ones among some."""
    generator = torch.Generator().manual_seed(seed)
    if decades > 30:
        return values(n, seed % 3, dtype, generator)
    power = torch.empty(n, dtype=torch.float64).uniform_(-decades, decades, generator=generator)
    # In runs, so that the highest bin of a tile moves up and down.
    run = torch.empty(n // 64 + 1, dtype=torch.float64).uniform_(-decades, decades)
    power = (power * 0.1 + run.repeat_interleave(64)[:n]).clamp(max=4 if dtype == DTYPES[2] else 37)
    return (torch.randn(n, dtype=torch.float64, generator=generator) * 10**power).to(dtype)


def same_norm(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether bins stand for one number; lower bins than are read may differ."""
    return torch.equal(ours[-1], theirs[-1]) and torch.equal(
        bits(norm_from_bins(ours)), bits(norm_from_bins(theirs))
    )


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([1, 2, 3, 4, 8, 9, 13]),
    st.integers(0, 700),
    st.integers(0, 1 << 30),
    st.sampled_from([0.5, 6.0, 18.0, 40.0]),
    st.booleans(),
    st.booleans(),
)
def test_sums_and_squares_in_one_pass(
    dtype: torch.dtype,
    world_size: int,
    n: int,
    seed: int,
    decades: float,
    accumulate: bool,
    apart: bool,
) -> None:
    """Against the C++ kernel, which is tested against the definition."""
    messages = numbers(world_size * n, dtype, seed, decades).view(world_size, n)
    pieces = [piece.clone() for piece in messages] if apart else list(messages)
    total = torch.float64 if dtype == torch.float64 else torch.float32
    out = numbers(n, total, seed + 1, decades)
    expected, ours, theirs = out.clone(), new_bins(), new_bins()
    CPP.ordered_sum_(expected, pieces, theirs, accumulate=accumulate)
    reductions().ordered_sum_(out, pieces, ours, accumulate=accumulate)
    assert torch.equal(bits(out), bits(expected))
    assert same_norm(ours, theirs)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(DTYPES),
    st.integers(0, 1000),
    st.integers(0, 1 << 30),
    st.sampled_from([0.5, 6.0, 18.0, 40.0]),
)
def test_squares_alone(dtype: torch.dtype, n: int, seed: int, decades: float) -> None:
    """Of what is not finite each element counts once, and nothing else of it."""
    x = numbers(n, dtype, seed, decades)
    ours, theirs = new_bins(), new_bins()
    reductions().add_squares_(ours, [x])
    add_squares_(theirs, x)
    assert same_norm(ours, theirs)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 40), min_size=2, max_size=4),
    st.integers(0, 1 << 30),
    st.sampled_from([0.5, 18.0, 40.0]),
)
def test_squares_of_many(dtype: torch.dtype, sizes: list[int], seed: int, decades: float) -> None:
    """Some of no element, and some that end in the middle of a tile."""
    many = [numbers(16 * size, dtype, seed + number, decades) for number, size in enumerate(sizes)]
    many = [x.clone() for x in many]  # at addresses as buckets have
    ours, theirs = new_bins(), new_bins()
    reductions().add_squares_(ours, many)
    for x in many:
        add_squares_(theirs, x)
    assert same_norm(ours, theirs)


def test_squares_at_the_edges_of_bins() -> None:
    """Powers of two, and what is just above and below: there a digit rounds to the bin above."""
    powers = torch.tensor([2.0**e for e in range(-149, 128)], dtype=torch.float64)
    near = torch.stack([powers * (1 - 2**-24), powers, powers * (1 + 2**-23), powers * 1.5])
    near = near.flatten().float()
    for one in (*near.unbind(), near):
        ours, theirs = new_bins(), new_bins()
        reductions().add_squares_(ours, [one.view(-1)])
        add_squares_(theirs, one.view(-1))
        assert same_norm(ours, theirs), one


def test_what_the_result_overwrites_may_be_a_piece() -> None:
    for own in range(4):
        pieces = [torch.randn(300) for _ in range(4)]
        expected = pieces[0].clone()
        for piece in pieces[1:]:
            expected += piece
        reductions().ordered_sum_(pieces[own], pieces, None)
        assert torch.equal(pieces[own], expected)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=4), st.integers(0, 1 << 40))
def test_checksums_of_many_buffers(sizes: list[int], first: int) -> None:
    generator = torch.Generator().manual_seed(len(sizes))
    flats = [torch.randn(2 * size, generator=generator) for size in sizes]
    firsts = [first + 1000 * number for number in range(len(sizes))]
    expected = [int(eager.checksum(*pair)) for pair in zip(flats, firsts, strict=True)]
    assert reductions().checksums(flats, firsts).tolist() == expected


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 1 << 30),
    st.sampled_from([0.5, 6.0, 18.0, 40.0]),
    st.integers(1, 1000),
    st.sampled_from([None, 1.0, 2.0**16, 3.0]),
    st.sampled_from([None, 1e-3, 1.0, 1e30]),
)
def test_factors(
    seed: int, decades: float, world_size: int, loss_scale: float | None, limit: float | None
) -> None:
    bins = new_bins()
    for rank in range(seed % 3):  # none: a norm of zero
        add_squares_(bins, numbers(200, torch.float32, seed + rank, decades))
    scale = None if loss_scale is None else torch.tensor(loss_scale)
    expected = eager.grad_scales(bins, world_size=world_size, loss_scale=scale, limit=limit)
    found = reductions().grad_scales(bins, world_size, scale, limit)
    assert torch.equal(bits(found), bits(expected))


def test_they_try_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does before the first sum, and what is found if a kernel is wrong."""
    found = reductions()
    assert found.find_problem("cpu") is None
    monkeypatch.setattr(found, "checksums", lambda flats, firsts: torch.zeros(1, dtype=torch.int64))
    assert found.find_problem("cpu") == "a first sum has other bits than plain torch"
    monkeypatch.delattr(found._kernels, "reduce")
    problem = found.find_problem("cpu")
    assert problem is not None and "a first launch failed (AttributeError" in problem


def test_the_choice_falls_on_them() -> None:
    """What the package calls are these kernels, where Triton serves the device."""
    kernel = kernels._kernel(torch.device("cpu"))
    out, piece = torch.zeros(5), torch.randn(5)
    calls = []
    original = TritonReductions.ordered_sum_

    def counted(*args: object, **named: object) -> None:
        calls.append(args)
        original(*args, **named)  # type: ignore[arg-type]

    TritonReductions.ordered_sum_ = counted  # type: ignore[method-assign,assignment]
    try:
        kernels.ordered_sum_(out, [piece])
        kernels.squared_norm_bins_(new_bins(), piece)
    finally:
        TritonReductions.ordered_sum_ = original  # type: ignore[method-assign]
    assert len(calls) == 2 and torch.equal(out, piece) and hasattr(kernel, "reductions")

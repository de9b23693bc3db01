"""Every backend gives the bits of the reference: that is what makes them interchangeable."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from belief_dist import kernels
from belief_dist.kernels import eager
from belief_dist.kernels.cpp import CppKernel
from belief_dist.norm import NUM_WORDS, norm_from_bins
from belief_dist.options import DEFAULTS
from belief_dist.rule import (
    StepScalars,
    compute_dtype,
    correctly_rounded_sqrt,
    step_scalars,
    update_reference_,
)
from belief_dist.storage import Operands

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
OPTIONS = {**DEFAULTS, "lr": 0.01, "eps": 1e-8, "weight_decay": 0.1}
SWITCHES = [
    {},
    {"weight_decay": 0.0},
    {"amsgrad": True},
    {"maximize": True},
    {"weight_decouple": False},
    {"weight_decouple": False, "amsgrad": True},
    {"rectify": True},
    {"rectify": True, "degenerated_to_sgd": False},
]
# Of parameter, gradient and the low-precision copy of the parameter.
DTYPES = [
    (F32, F32, None),
    (F32, F32, BF16),
    (F32, BF16, BF16),
    (F32, F16, F16),
    (BF16, BF16, None),
    (F16, F16, None),
    (F64, F64, None),
]
LENGTHS = [0, 1, 7, 8, 15, 16, 17, 1023]
SPECIAL = [0.0, -0.0, 1e-40, -1e-45, 1e30, -1e-30, float("inf"), -float("inf"), float("nan")]

Update = Callable[..., None]


@pytest.fixture
def kernel() -> CppKernel:
    found = kernels._cpp()
    assert isinstance(found, CppKernel), f"tests need a C++ compiler: {found}"
    return found


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def any_backend(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: StepScalars,
    *,
    grad_scale: Tensor | float = 1.0,
    skip: Tensor | None = None,
    fused: bool | None = None,
    **optional: Tensor | None,
) -> None:
    operands = Operands(param, grad, exp_avg, exp_avg_sq, **optional)
    kernels.update_([operands], scalars, grad_scale=grad_scale, skip=skip, fused=fused)


cpp = partial(any_backend, fused=True)
chunked = partial(any_backend, fused=False)


def values(n: int, offset: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return n numbers over sixty decades, special ones among them, not aligned to a vector."""
    largest = 4 if dtype == F16 else 30
    exponent = torch.empty(n + offset, dtype=F64).uniform_(-30, largest, generator=generator)
    made = torch.randn(n + offset, dtype=F64, generator=generator) * 10**exponent
    # At places of its own in each tensor, so that every special number meets ordinary ones.
    special = torch.rand(n + offset, generator=generator) < 0.1
    which = torch.randint(len(SPECIAL), (n + offset,), generator=generator)
    made = torch.where(special, torch.tensor(SPECIAL, dtype=F64)[which], made)
    return made.to(dtype)[offset:]


def bits(tensor: Tensor | None) -> Tensor | None:
    """Return integers that are equal where the numbers are: -0 is not 0, and any NaN is NaN."""
    if tensor is None:
        return None
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor).view(width)


def check(
    update: Update,
    n: int,
    switches: dict[str, Any] | None = None,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None] = (F32, F32, None),
    *,
    offset: int = 0,
    step: int = 3,
    seed: int = 0,
) -> None:
    """Apply one step by `update` and by the reference to equal tensors and compare all bits."""
    options = {**OPTIONS, **(switches or {})}
    generator = torch.Generator().manual_seed(seed)
    param_dtype, grad_dtype, out_dtype = dtypes
    state_dtype = compute_dtype(param_dtype)
    tensors: dict[str, Tensor | None] = {
        "param": values(n, offset, param_dtype, generator),
        "grad": values(n, offset, grad_dtype, generator),
        "exp_avg": values(n, offset, state_dtype, generator),
        "exp_avg_sq": values(n, offset, state_dtype, generator).abs(),
        "max_exp_avg_sq": None,
        "param_out": None if out_dtype is None else torch.zeros(n, dtype=out_dtype),
    }
    if options["amsgrad"]:
        tensors["max_exp_avg_sq"] = values(n, offset, state_dtype, generator).abs()
    more = {"scalars": step_scalars(options, step), "grad_scale": 0.37}
    expected = {name: None if t is None else t.clone() for name, t in tensors.items()}
    update_reference_(**expected, **more)
    update(**tensors, **more)
    for name, tensor in tensors.items():
        ours, theirs = bits(tensor), bits(expected[name])
        if ours is None or theirs is None:
            continue
        wrong = (ours != theirs).nonzero().flatten().tolist()
        assert not wrong, f"{name} differs at {wrong[:5]} of {n}, {options}, {dtypes}"


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("update", [cpp, chunked])
def test_every_switch_length_and_alignment(
    update: Update, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None], kernel: CppKernel
) -> None:
    for n, switches, offset in itertools.product(LENGTHS, SWITCHES, (0, 1, 3)):
        check(update, n, switches, dtypes, offset=offset, seed=n)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_million_elements_on_several_threads(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None], threads: int, kernel: CppKernel
) -> None:
    check(cpp, 1_000_003, {}, dtypes, offset=1)


def test_the_fallback_works_through_many_pieces() -> None:
    for dtypes in ((F32, F32, None), (F32, BF16, BF16)):
        check(chunked, 3 * eager._LEAN_PIECE + 7, {}, dtypes)


@pytest.mark.parametrize("param_dtype", [F32, F64, BF16, F16])
def test_any_mixture_of_dtypes(param_dtype: torch.dtype) -> None:
    """The kernel knows one arithmetic at a time; what mixes two is left to plain torch."""
    for grad_dtype, out_dtype in itertools.product((F32, F64, BF16, F16), (None, F32, BF16, F16)):
        check(any_backend, 100, {}, (param_dtype, grad_dtype, out_dtype))


@given(
    n=st.integers(0, 5000),
    offset=st.integers(0, 17),
    step=st.integers(1, 10_000),
    seed=st.integers(0, 2**32 - 1),
    switches=st.sampled_from(SWITCHES),
    dtypes=st.sampled_from(DTYPES),
)
@settings(max_examples=100, deadline=None)
def test_any_length_step_and_alignment(
    n: int, offset: int, step: int, seed: int, switches: dict[str, Any], dtypes: Any
) -> None:
    check(cpp, n, switches, dtypes, offset=offset, step=step, seed=seed)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_multi_tensor_operations(switches: dict[str, Any]) -> None:
    """What accelerators without a kernel of their own run, here on the CPU."""

    def update(scalars: StepScalars, grad_scale: float, **tensors: Any) -> None:
        # Optimizers without clipping hand over unscaled gradients only.
        tensors["grad"] = tensors["grad"].to(tensors["exp_avg"].dtype) * grad_scale
        kernels.foreach_update_([tensors], scalars)

    for dtypes in ((F32, F32, None), (BF16, BF16, None), (F64, F64, None)):
        check(update, 1023, switches, dtypes)


def test_scale_as_a_tensor_is_the_same_number(kernel: CppKernel) -> None:
    """The clipping factor lives on the device in float64; it is rounded once, like a float."""
    scalars = step_scalars(OPTIONS, 3)
    scale = torch.tensor(0.1234567890123456789, dtype=F64)
    made = [torch.randn(1000), torch.randn(1000), torch.randn(1000), torch.rand(1000)]
    results = []
    for update, factor in ((cpp, scale), (cpp, scale.item()), (chunked, scale)):
        tensors = [t.clone() for t in made]
        update(*tensors, scalars, grad_scale=factor)
        results.append(tensors)
    update_reference_(*made, scalars, grad_scale=scale)
    for tensors in results:
        assert all(torch.equal(a, b) for a, b in zip(tensors, made, strict=True))


@pytest.mark.parametrize("update", [cpp, chunked])
def test_a_skipped_step_touches_nothing(update: Update, kernel: CppKernel) -> None:
    tensors = [torch.rand(100) for _ in range(4)]
    before = [t.clone() for t in tensors]
    update(*tensors, step_scalars(OPTIONS, 1), skip=torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    update(*tensors, step_scalars(OPTIONS, 1), skip=torch.tensor(False))
    assert not torch.equal(tensors[0], before[0])


def test_a_skip_is_not_read_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_on_cpu", lambda tensor: False)
    for with_maximum in (False, True):
        tensors = [torch.rand(100) for _ in range(4)]
        more = {"max_exp_avg_sq": torch.rand(100)} if with_maximum else {}
        before = [t.clone() for t in (*tensors, *more.values())]
        operands = Operands(*tensors, **more)
        eager.update_(operands, step_scalars(OPTIONS, 1), skip=torch.tensor(True))
        after = (*tensors, *more.values())
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        eager.update_(operands, step_scalars(OPTIONS, 1), skip=torch.tensor(False))
        assert not torch.equal(tensors[0], before[0])


def test_the_fused_update_is_no_torch_operation(kernel: CppKernel) -> None:
    """One call works in place: torch neither runs an operation nor allocates."""

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"{func} ran")

    tensors = [torch.rand(5000) for _ in range(4)]
    with Refuse():
        cpp(*tensors, step_scalars(OPTIONS, 1))


def test_fused_true_says_why_it_cannot(kernel: CppKernel) -> None:
    strided = torch.rand(20)[::2]
    with pytest.raises(
        RuntimeError, match=r"no compiled kernel serves torch\.float32 tensors on cpu"
    ):
        cpp(strided, torch.rand(10), torch.rand(10), torch.rand(10), step_scalars(OPTIONS, 1))


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


# - The choice of a backend


@pytest.fixture
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    kernels._cpp.cache_clear()
    kernels._triton.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    kernels._cpp.cache_clear()
    kernels._triton.cache_clear()


def test_the_environment_forbids_the_kernel(
    fresh_choice: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="belief_dist")
    fresh_choice.setenv("BELIEF_DIST_BACKEND", "eager")
    assert [usable for _, usable, _ in kernels.backends()] == [False, False, True]
    with pytest.raises(RuntimeError, match="BELIEF_DIST_BACKEND=eager forbids it"):
        kernels.require_fused()
    assert len(caplog.records) == 1


def test_the_environment_has_an_unknown_value(fresh_choice: pytest.MonkeyPatch) -> None:
    fresh_choice.setenv("BELIEF_DIST_BACKEND", "cuda")
    with pytest.raises(ValueError, match="must be one of auto, cpp, triton, eager, got 'cuda'"):
        kernels.backends()


def test_one_line_says_what_is_used(
    fresh_choice: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="belief_dist")
    for _ in range(3):
        chunked(*(torch.rand(3) for _ in range(4)), step_scalars(OPTIONS, 1))
        cpp(*(torch.rand(3) for _ in range(4)), step_scalars(OPTIONS, 1))
    (record,) = caplog.records
    assert "C++" in record.getMessage()

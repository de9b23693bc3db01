"""Every backend gives the bits of the reference: that is what makes them interchangeable."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from belief_dist import kernels
from belief_dist.kernels import eager
from belief_dist.kernels.cpp import CppKernel
from belief_dist.operands import BLOCK, WATCHED, Operands, cut
from belief_dist.options import DEFAULTS
from belief_dist.rule import (
    StepScalars,
    compute_dtype,
    step_scalars,
    update_reference_,
)
from belief_dist.state_formats import (
    encode_m,
    encode_s,
    split_master,
    split_rounded_master,
    update_stored_reference_,
    word_sums,
    wrapped,
)
from tests.harness.kernels import bits, chunked, cpp, several_scalars, values

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
U8, I8, I16 = torch.uint8, torch.int8, torch.int16
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


class Form(NamedTuple):
    """What is stored in which dtype."""

    param: torch.dtype = F32
    grad: torch.dtype = F32
    out: torch.dtype | None = None  # of the low-precision copy of the parameter
    state: torch.dtype | None = None  # None: as the rule computes
    split: torch.dtype | None = None  # of the rest of its master, whose upper half it is
    average: torch.dtype | None = None  # of the parameter


PLAIN = [
    Form(),
    Form(F32, F32, BF16),
    Form(F32, BF16, BF16),
    Form(F32, F16, F16),
    Form(BF16, BF16),
    Form(F16, F16),
    Form(F64, F64),
]
FORMS = [
    *PLAIN,
    Form(state=BF16),
    Form(state=U8),
    Form(F32, BF16, BF16, state=BF16),
    Form(F32, BF16, BF16, state=U8),
    Form(BF16, BF16, state=BF16),
    Form(F16, F16, state=U8),
    Form(BF16, BF16, split=I16),
    Form(BF16, F32, F16, state=BF16, split=I8),
    Form(BF16, BF16, state=U8, split=I16),
    Form(average=F32),
    Form(average=BF16),
    Form(F16, F16, average=F32),
    Form(F64, F64, average=F64),
    Form(F32, BF16, BF16, state=BF16, average=BF16),
    Form(BF16, BF16, state=U8, split=I8, average=BF16),
    Form(BF16, BF16, split=I8, average=F32),
]
LENGTHS = [0, 1, 7, 8, 15, 16, 17, 255, 256, 257, 1023, 1024, 1025]

Update = Callable[..., None]


def moved(tensor: Tensor, offset: int) -> Tensor:
    """Return a copy that starts `offset` elements into its memory."""
    return torch.cat([tensor[:0].new_zeros(offset), tensor])[offset:]


def make(
    n: int,
    form: Form,
    *,
    amsgrad: bool = False,
    offset: int = 0,
    first: int = 0,
    slots: int = 0,
    generator: torch.Generator,
) -> Operands:
    """Return everything that a step needs of n elements in some form."""
    state_dtype = form.state or compute_dtype(form.param)
    made: dict[str, Any] = {"first": first}
    made["key"] = int(torch.randint(1 << 32, (), generator=generator))
    made["grad"] = values(n, offset, form.grad, generator)
    if form.split is not None:
        master = values(n, offset, F32, generator)
        parts = split_master(master) if form.split == I16 else split_rounded_master(master, 0)
        made["param"], made["remainder"] = (moved(part, offset) for part in parts)
    else:
        made["param"] = values(n, offset, form.param, generator)
    for name in ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad:
        state = values(n, offset, state_dtype if state_dtype == F64 else F32, generator)
        state = state if name == "exp_avg" else state.abs()
        if state_dtype == U8:
            random = torch.randint(1 << 16, (n,), generator=generator)
            encode = encode_m if name == "exp_avg" else encode_s
            made[name], made[f"{name}_exponent"] = encode(state, random)
        else:
            made[name] = state.to(state_dtype)
        made[name] = moved(made[name], offset)
    if form.out is not None:
        made["param_out"] = torch.zeros(n, dtype=form.out)
    if form.average is not None:
        average = values(n, offset, F64 if form.average == F64 else F32, generator)
        made["param_ema"] = moved(average.to(form.average), offset)
    made["sums"] = torch.zeros(slots, 2, WATCHED, dtype=torch.int32) if slots else None
    return Operands(**made)


def tensors_of(operands: Operands) -> dict[str, Tensor]:
    """Return all but the sums, which are no tensor of the parameter."""
    found = {name: t for name, t in operands._asdict().items() if isinstance(t, Tensor)}
    found.pop("sums", None)
    return found


def copied(operands: Operands) -> Operands:
    """Return the same in other memory, where every tensor is aligned."""
    sums = None if operands.sums is None else operands.sums.clone()
    return operands._replace(
        **{name: t.clone() for name, t in tensors_of(operands).items()}, sums=sums
    )


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """Plain torch would wake the others for every operation, which takes long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_same(ours: Operands, expected: Operands, about: str = "") -> None:
    for name, tensor in tensors_of(expected).items():
        wrong = (bits(getattr(ours, name)) != bits(tensor)).nonzero().flatten().tolist()
        assert not wrong, f"{name} differs at {wrong[:5]} of {ours.param.numel()}{about}"


def total(sums: Tensor) -> Tensor:
    """Return what is in all slots: (2, WATCHED)."""
    return wrapped(sums.sum(0, dtype=torch.int64))


def check(
    update: Update,
    lengths: Sequence[int] | int,
    switches: dict[str, Any] | None = None,
    form: Form = PLAIN[0],
    *,
    offset: int = 0,
    first: int = 0,
    step: int = 3,
    seed: int = 0,
    slots: int = 0,
    ema_weight: float = 0.3,
) -> None:
    """Apply one step by one `update` and by the reference to equal tensors; compare all bits."""
    options = {**OPTIONS, **(switches or {})}
    generator = torch.Generator().manual_seed(seed)
    with on_one_thread():
        work = [
            make(
                n,
                form,
                amsgrad=options["amsgrad"],
                offset=offset,
                first=first,
                slots=slots,
                generator=generator,
            )
            for n in ([lengths] if isinstance(lengths, int) else lengths)
        ]
        expected = [copied(operands) for operands in work]
    scalars = step_scalars(options, step, ema_weight=ema_weight)
    update(work, scalars, grad_scale=0.37)
    with on_one_thread():
        for ours, theirs in zip(work, expected, strict=True):
            read = word_sums(theirs)
            update_stored_reference_(theirs, scalars, grad_scale=0.37)
            assert_same(ours, theirs, f", {options}, {form}")
            for each in (ours, theirs) if slots else ():  # they may have different NaNs
                assert each.sums is not None
                assert torch.equal(total(each.sums), torch.stack([read, word_sums(each)]))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("update", [cpp, chunked])
def test_every_switch_length_and_alignment(update: Update, form: Form, kernel: CppKernel) -> None:
    # Plain torch knows no alignment.
    offsets = (0, 1, 3) if update is cpp else (1,)
    for seed, (switches, offset) in enumerate(itertools.product(SWITCHES, offsets)):
        check(update, LENGTHS, switches, form, offset=offset, seed=seed)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("update", [cpp, chunked])
def test_sums_of_what_is_read_and_written(update: Update, form: Form, kernel: CppKernel) -> None:
    for seed, switches in enumerate([{}, {"amsgrad": True}]):
        check(update, LENGTHS, switches, form, offset=seed, seed=seed, slots=1 + seed)
    check(update, 70_001, {}, form, slots=1)  # several threads, many pieces


def test_sums_tell_every_flipped_bit() -> None:
    """In each byte of everything that is watched, and nowhere else."""
    for form, amsgrad in itertools.product(FORMS, (False, True)):
        operands = make(300, form, amsgrad=amsgrad, generator=torch.Generator().manual_seed(0))
        before = word_sums(operands)
        for name, tensor in tensors_of(operands).items():
            watched = name not in ("grad", "param_out") and (name != "param" or form.split is None)
            flat = tensor.view(torch.uint8)
            for place in range(0, flat.numel(), 37):
                flat[place] ^= 1 << place % 8
                differs = (word_sums(operands) != before).sum().item()
                assert differs == watched, (name, place, form)
                flat[place] ^= 1 << place % 8


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_million_elements_on_several_threads(form: Form, threads: int, kernel: CppKernel) -> None:
    check(cpp, 1_000_003, {}, form, offset=1)


@pytest.mark.parametrize("form", FORMS[6:], ids=str)
def test_threads_share_segments_of_any_length(form: Form, threads: int, kernel: CppKernel) -> None:
    for seed, lengths in enumerate([[70_001, 3, 0, 40_000, 1], [5] * 100 + [90_001], [301] * 300]):
        check(cpp, lengths, {"amsgrad": True}, form, offset=seed, seed=seed)


@pytest.mark.parametrize("state", [BF16, U8])
def test_numbers_of_elements_beyond_32_bits(state: torch.dtype, kernel: CppKernel) -> None:
    """The noise of the elements before and after the carry."""
    for first in ((1 << 32) - 256, (1 << 32) - 1024, 1 << 32, (5 << 32) - 512):
        form = Form(state=state, average=BF16)
        check(cpp, [2000, 300, 100], {"amsgrad": True}, form, first=first)
    if state == BF16:  # no blocks, and so any number
        check(cpp, 2000, {}, Form(state=state), first=(1 << 32) - 777)


def test_the_fallback_works_through_many_pieces() -> None:
    for form in (Form(), Form(average=F32), Form(F32, BF16, BF16), Form(state=U8)):
        check(chunked, 3 * eager._LEAN_PIECE + 7, {}, form)


@pytest.mark.parametrize("param_dtype", [F32, F64, BF16, F16])
def test_any_mixture_of_dtypes(param_dtype: torch.dtype) -> None:
    """The kernel knows one arithmetic at a time; what mixes two is left to plain torch."""
    for grad_dtype, out_dtype in itertools.product((F32, F64, BF16, F16), (None, F32, BF16, F16)):
        for state in (None, U8):
            form = Form(param_dtype, grad_dtype, out_dtype, state, average=BF16)
            check(kernels.update_, 100, {}, form._replace(average=None))
            check(kernels.update_, 100, {}, form)


@given(
    lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=4),
    offset=st.integers(0, 17),
    step=st.sampled_from([1, 2, 10, 10_000, 1 << 31, (1 << 32) + 1, 1 << 40]),
    seed=st.integers(0, 2**32 - 1),
    switches=st.sampled_from(SWITCHES),
    hyperparameters=st.fixed_dictionaries(
        {
            "lr": st.sampled_from([0.0, 1e-3, 10.0]),
            "betas": st.tuples(*[st.sampled_from([1e-6, 0.5, 0.9, 0.999, 1 - 1e-7])] * 2),
            "eps": st.sampled_from([1e-300, 1e-45, 1e-16, 1e-2, 1e10]),
            "weight_decay": st.sampled_from([0.0, 0.1, 10.0]),
        }
    ),
    param=st.sampled_from([F32, BF16, F16]),
    grad=st.sampled_from([F32, BF16, F16]),
    out=st.sampled_from([None, BF16, F16]),
    state=st.sampled_from([None, BF16, U8]),
    split=st.sampled_from([None, I16, I8]),
    average=st.sampled_from([None, F32, BF16]),
    ema_weight=st.sampled_from([1e-7, 0.001, 0.1, 0.5, 1 - 1e-9]),
    first=st.integers(0, 1 << 34),
)
@settings(max_examples=200, deadline=None)
def test_any_form_length_and_hyperparameters(
    lengths: list[int],
    offset: int,
    step: int,
    seed: int,
    switches: dict[str, Any],
    hyperparameters: dict[str, Any],
    param: torch.dtype,
    grad: torch.dtype,
    out: torch.dtype | None,
    state: torch.dtype | None,
    split: torch.dtype | None,
    average: torch.dtype | None,
    ema_weight: float,
    first: int,
) -> None:
    form = Form(param if split is None else BF16, grad, out, state, split, average)
    first = first // BLOCK * BLOCK if state == U8 else first
    options = {**hyperparameters, **switches}
    about: dict[str, Any] = {"offset": offset, "first": first, "step": step, "seed": seed}
    check(cpp, lengths, options, form, ema_weight=ema_weight, **about)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_parts_of_a_parameter_get_the_bits_of_the_whole(form: Form, kernel: CppKernel) -> None:
    """Cut between blocks, as ranks cut it: the noise is anchored in the parameter."""
    scalars = step_scalars({**OPTIONS, "amsgrad": True}, 7, ema_weight=0.3)
    for at in (256, 1024, 1280, 4864):
        generator = torch.Generator().manual_seed(at)
        whole = make(5000, form, amsgrad=True, generator=generator)
        parts = copied(whole)
        cpp([whole], scalars)
        cpp([cut(parts, at, 5000), cut(parts, 0, at)], scalars)
        assert_same(parts, whole)


@pytest.mark.parametrize("form", [Form(), Form(state=BF16), *FORMS[-2:]], ids=str)
def test_thousands_of_tensors_as_one_by_one(form: Form, threads: int, kernel: CppKernel) -> None:
    scalars = step_scalars({**OPTIONS, "amsgrad": True}, 7, ema_weight=0.3)
    generator = torch.Generator().manual_seed(0)
    made = [make(n, form, amsgrad=True, generator=generator) for n in range(50)]
    together = [copied(operands) for _ in range(100) for operands in made]
    cpp(together, scalars)
    for operands in made:
        cpp([operands], scalars)
    for position, operands in enumerate(together):
        assert_same(operands, made[position % 50])


@pytest.mark.parametrize("update", [cpp, chunked])
@pytest.mark.parametrize("form", [Form(), Form(F64, F64), *FORMS[-2:]], ids=str)
def test_scalars_of_their_own(update: Update, form: Form, threads: int, kernel: CppKernel) -> None:
    """Tensors of different groups, steps and directions in one call have the bits of several."""
    each = several_scalars()
    generator = torch.Generator().manual_seed(0)
    made = [make(n, form, generator=generator) for n in (*LENGTHS, 3000)]
    numbered = [m._replace(scalars=number % len(each)) for number, m in enumerate(made)]
    ours = [copied(operands) for operands in numbered]
    with on_one_thread() if update is chunked else contextlib.nullcontext():
        update(ours, each, grad_scale=0.37)
    for operands, expected in zip(ours, numbered, strict=True):
        update([expected._replace(scalars=0)], each[expected.scalars], grad_scale=0.37)
        assert_same(operands, expected)


def test_one_call_into_the_library_for_all_tensors(
    kernel: CppKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no Python function that is called for each of them."""

    def calls(count: int) -> tuple[int, int]:
        generator = torch.Generator().manual_seed(0)
        work = [make(3, Form(state=BF16), generator=generator) for _ in range(count)]
        python = library = 0

        def on_event(frame: Any, event: str, argument: Any) -> None:
            nonlocal python
            python += event == "call"

        def belief_update(*arguments: Any) -> None:
            nonlocal library
            library += 1

        scalars = step_scalars(OPTIONS, 1)
        with monkeypatch.context() as patch:
            patch.setattr(kernel._library, "belief_update", belief_update)
            cpp(work, scalars)
            sys.setprofile(on_event)
            try:
                cpp(work, scalars)
            finally:
                sys.setprofile(None)
        return python, library

    python, library = calls(1000)
    assert python < 50 and library == 2


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_tensors_unlike_the_first_never_reach_the_library(form: Form, kernel: CppKernel) -> None:
    """It would write to memory that is not theirs."""
    generator = torch.Generator().manual_seed(0)
    made = [make(600, form, amsgrad=True, generator=generator) for _ in range(3)]
    scalars = step_scalars({**OPTIONS, "amsgrad": True}, 1)
    cpp(made, scalars)
    for name, tensor in tensors_of(made[0]).items():
        strided = torch.stack([tensor, tensor], 1)[:, 0]
        unlike = [tensor[:-1], strided, tensor.to(torch.complex64), tensor.to("meta")]
        for wrong in [*unlike, *[None] * (name not in Operands._fields[:4])]:
            for position in range(3):
                work = [copied(operands) for operands in made]
                work[position] = work[position]._replace(**{name: wrong})
                assert not kernel.update_(work, scalars, 1.0)
                for i in {0, 1, 2} - {position}:
                    assert_same(work[i], made[i])
    for name in ("exp_avg_sq", "max_exp_avg_sq"):  # states of two dtypes
        mixed = made[0]._replace(**{name: getattr(made[0], name).to(F16)})
        assert not kernel.update_([mixed], scalars, 1.0)
    if form.state == U8:  # blocks that start elsewhere than the parameter's
        assert not kernel.update_([made[0], made[1]._replace(first=100)], scalars, 1.0)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_multi_tensor_operations(switches: dict[str, Any]) -> None:
    """What accelerators without a kernel of their own run, here on the CPU."""

    def update(work: list[Operands], scalars: StepScalars, grad_scale: float) -> None:
        # Optimizers without clipping hand over unscaled gradients only.
        scaled = [o._replace(grad=o.grad.to(o.exp_avg.dtype) * grad_scale) for o in work]
        kernels.foreach_update_(scaled, scalars)

    for form in (Form(), Form(BF16, BF16), Form(F64, F64)):
        check(update, [1023, 17], switches, form)


def test_scale_as_a_tensor_is_the_same_number(kernel: CppKernel) -> None:
    """The clipping factor lives on the device in float64; it is rounded once, like a float."""
    scalars = step_scalars(OPTIONS, 3)
    scale = torch.tensor(0.1234567890123456789, dtype=F64)
    made = [torch.randn(1000), torch.randn(1000), torch.randn(1000), torch.rand(1000)]
    results = []
    for update, factor in ((cpp, scale), (cpp, scale.item()), (chunked, scale)):
        tensors = [t.clone() for t in made]
        update([Operands(*tensors)], scalars, grad_scale=factor)
        results.append(tensors)
    update_reference_(*made, scalars, grad_scale=scale)
    for tensors in results:
        assert all(torch.equal(a, b) for a, b in zip(tensors, made, strict=True))


@pytest.mark.parametrize("update", [cpp, chunked])
def test_a_skipped_step_touches_nothing(update: Update, kernel: CppKernel) -> None:
    tensors = [torch.rand(100) for _ in range(4)]
    before = [t.clone() for t in tensors]
    update([Operands(*tensors)], step_scalars(OPTIONS, 1), skip=torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    update([Operands(*tensors)], step_scalars(OPTIONS, 1), skip=torch.tensor(False))
    assert not torch.equal(tensors[0], before[0])


def test_a_skip_is_not_read_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_on_cpu", lambda tensor: False)
    for with_maximum in (False, True):
        tensors = [torch.rand(100) for _ in range(4)]
        names = ["max_exp_avg_sq", "param_ema"] if with_maximum else []
        more = {name: torch.rand(100) for name in names}
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
        cpp([Operands(*tensors)], step_scalars(OPTIONS, 1))


def test_fused_true_says_why_it_cannot(kernel: CppKernel) -> None:
    strided = torch.rand(20)[::2]
    with pytest.raises(
        RuntimeError, match=r"no compiled kernel serves torch\.float32 tensors on cpu"
    ):
        cpp([Operands(strided, *(torch.rand(10) for _ in "123"))], step_scalars(OPTIONS, 1))

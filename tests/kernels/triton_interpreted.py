"""The Triton kernels on CPU tensors, bit for bit; test_triton.py runs this in a process.

Triton decides when it is imported whether it compiles or interprets, so this needs
TRITON_INTERPRET=1 and BELIEF_DIST_BACKEND=triton from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from belief_dist import AdaBelief, kernels, rule
from belief_dist import device_scalars as on_device
from belief_dist.kernels import eager, triton_kernel
from belief_dist.kernels.triton_launch import TritonKernel
from belief_dist.kernels.triton_tables import Table
from belief_dist.operands import BLOCK, WATCHED, Operands
from belief_dist.rule import StepScalars, compute_dtype
from belief_dist.state_formats import (
    encode_m,
    encode_s,
    noise_key,
    split_master,
    split_rounded_master,
    update_stored_reference_,
    word_sums,
    wrapped,
)
from benchmarks.gpu.forms import FORMS as MEASURED
from benchmarks.gpu.forms import has_same_bits
from test_kernels import BF16, F16, F32, F64, OPTIONS, SWITCHES, bits, values
from tests.harness.kernels import several_scalars

# numpy, which the interpreter computes with, warns of what special numbers do.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

U8, I8, I16 = torch.uint8, torch.int8, torch.int16
step_scalars = partial(rule.step_scalars, ema_weight=0.3)
device_scalars = partial(on_device.device_scalars, ema_weight=0.3)
LENGTHS = [1, 7, 255, 256, 257, 1023, 1024, 1025, 3000]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs without work cost the interpreter as much as a GPU's cost nothing."""
    monkeypatch.setattr(triton_kernel, "CHUNK_TILES", 2)


class Form(NamedTuple):
    """The dtypes of `operands.Operands`."""

    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    out: torch.dtype | None = None
    remainder: torch.dtype | None = None
    average: torch.dtype | None = None


FORMS = [
    Form(F32, F32, F32),
    Form(F32, BF16, F32, BF16),
    Form(F32, F16, F32, F16),
    Form(BF16, BF16, F32),
    Form(F16, F16, F32),
    Form(BF16, F32, F32),
    Form(F64, F64, F64),
    Form(F64, F32, F64, BF16),
    Form(BF16, BF16, F32, remainder=I16),
    Form(F32, F32, BF16),
    Form(F32, BF16, BF16, BF16),
    Form(BF16, BF16, BF16, remainder=I8),
    Form(F32, F32, U8),
    Form(F32, BF16, U8, BF16),
    Form(F32, F16, U8, F16),
    Form(BF16, BF16, U8, remainder=I16),
    Form(F32, F32, F32, average=F32),
    Form(F64, F64, F64, average=F64),
    Form(F32, BF16, BF16, BF16, average=BF16),
    Form(BF16, BF16, F32, remainder=I8, average=BF16),
    Form(BF16, BF16, U8, remainder=I8, average=F32),
]


def make(
    form: Form, n: int, amsgrad: bool, seed: int, first: int = 0, sums: Tensor | None = None
) -> Operands:
    """Return operands with special values of every kind among their numbers."""
    generator = torch.Generator().manual_seed(seed)
    optional: dict[str, Any] = {}
    param = values(n, 0, form.param, generator)
    if form.remainder is not None:
        master = values(n, 0, F32, generator)
        parts = split_master(master) if form.remainder == I16 else split_rounded_master(master, 0)
        param, optional["remainder"] = parts
    if form.out is not None:
        optional["param_out"] = torch.zeros(n, dtype=form.out)
    if form.average is not None:
        average = values(n, 0, F64 if form.average == F64 else F32, generator)
        optional["param_ema"] = average.to(form.average)
    names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * amsgrad
    states: dict[str, Tensor] = {}
    for name in names:
        state = values(n, 0, F64 if form.state == F64 else F32, generator)
        state = state if name == "exp_avg" else state.abs()
        if form.state == U8:
            if n > BLOCK:  # special numbers in one block only, or few blocks would be without
                state[BLOCK:] = torch.rand(n - BLOCK, generator=generator) * 1e-3
            noise16 = torch.randint(1 << 16, (n,), generator=generator)
            encode = encode_m if name == "exp_avg" else encode_s
            states[name], optional[f"{name}_exponent"] = encode(state, noise16)
        else:
            states[name] = state.to(form.state)
    return Operands(
        param,
        values(n, 0, form.grad, generator),
        **states,
        **optional,
        key=noise_key(seed, n),
        first=first,
        sums=sums,
    )


def copy(operands: Operands) -> Operands:
    return Operands(*(x.clone() if isinstance(x, Tensor) else x for x in operands))


def check(work: Sequence[Operands], scalars: StepScalars, given: Any = None, **more: Any) -> None:
    """Update by Triton and by the reference, and compare all bits."""
    expected = [copy(operands) for operands in work]
    for operands in expected:
        update_stored_reference_(operands, scalars, **more)
    kernels.update_(work, scalars if given is None else given, fused=True, **more)
    compare(work, expected)


def compare(work: Sequence[Operands], expected: Sequence[Operands]) -> None:
    for ours, theirs in zip(work, expected, strict=True):
        for name, a, b in zip(Operands._fields, ours, theirs, strict=True):
            if isinstance(a, Tensor) and name != "sums":
                x, y = (bits(t) if t.is_floating_point() else t for t in (a, b))
                wrong = (x != y).nonzero().flatten().tolist()
                assert not wrong, f"{name} differs at {wrong[:5]} of {len(a)}: {a[wrong[0]]}"


def test_the_interpreter_serves() -> None:
    assert isinstance(kernels._kernel(torch.device("cpu")), TritonKernel)
    assert ("triton", True) in [(name, usable) for name, usable, _ in kernels.backends()]
    kernels.require_fused()


# What averages add follows the rest of a step, whatever that was.
COMBINED = [(form, each) for form in FORMS for each in SWITCHES[:: 4 if form.average else 1]]


@pytest.mark.parametrize(("form", "switches"), COMBINED, ids=str)
def test_many_tensors_in_one_launch(form: Form, switches: dict[str, Any]) -> None:
    options = {**OPTIONS, **switches}
    work = [make(form, n, options["amsgrad"], n, first=n * BLOCK) for n in LENGTHS]
    check(work, step_scalars(options, 3), grad_scale=0.37)


@pytest.mark.parametrize("form", [FORMS[i] for i in (0, 6, 10, 15, 16, 18)], ids=str)
def test_many_tensors_with_scalars_of_their_own(form: Form) -> None:
    """In one launch, and with one that the host does not know; a last one is alone."""
    each = several_scalars()
    lengths = (7, 256, 1025, 300, 1)
    work = [make(form, n, False, n)._replace(scalars=i) for i, n in enumerate(lengths)]
    values = torch.tensor([float(x) for x in each[1]], dtype=F64)  # one alike on the device
    late = on_device.DeviceScalars(values, each[1].coupled_decay != 0.0)
    for given in (each, on_device.together([each[0], late, *each[2:]])):
        for members in (work, work[3:4]):
            expected = [copy(operands) for operands in members]
            for operands in expected:
                update_stored_reference_(operands, each[operands.scalars], grad_scale=0.37)
            kernels.update_(members, given, fused=True, grad_scale=0.37)
            compare(members, expected)


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_sums_of_what_is_read_and_written(form: Form, slots: int) -> None:
    """Tensors that share them, in one launch and alone, over programs that share a slot."""
    scalars = step_scalars({**OPTIONS, "amsgrad": slots > 1}, 3)
    for lengths in ([700, 1, 1024, 5000], [3000]):
        sums = torch.zeros(slots, 2, WATCHED, dtype=torch.int32)
        work = [make(form, n, slots > 1, n, sums=sums) for n in lengths]
        read = [word_sums(operands) for operands in work]
        check(work, scalars)
        written = [word_sums(operands) for operands in work]
        expected = torch.stack([torch.stack(each).sum(0) for each in (read, written)])
        assert torch.equal(wrapped(sums.sum(0)), wrapped(expected))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_one_tensor(form: Form) -> None:
    options = {**OPTIONS, "weight_decouple": False, "amsgrad": True, "maximize": True}
    for n in (7, 256, 1025):
        check([make(form, n, True, n)], step_scalars(options, 12345))


@pytest.mark.parametrize("param", [F32, F64, BF16, F16])
def test_any_mixture_of_dtypes(param: torch.dtype) -> None:
    """Both arithmetics meet every dtype of gradients and copies."""
    state = compute_dtype(param)
    for grad, out in zip((F32, F64, BF16, F16), (F64, F16, F32, BF16), strict=True):
        work = [make(Form(param, grad, state, out), 600, True, 1)]
        check(work, step_scalars({**OPTIONS, "amsgrad": True}, 3), grad_scale=0.1)


@pytest.mark.parametrize("form", [FORMS[i] for i in (0, 6, 10, 13, 16, 17)], ids=str)
def test_what_the_device_alone_knows(form: Form) -> None:
    """A factor, a verdict, a step and a learning rate that the host never reads."""
    scale = torch.tensor([0.1234567890123456789], dtype=F64)
    for switches in ({"maximize": True}, {"weight_decouple": False}, {"rectify": True}):
        options = {**OPTIONS, **switches}
        for step in (1, 100):
            host, lr = step_scalars(options, step), torch.tensor(OPTIONS["lr"], dtype=F64)
            device = device_scalars({**options, "lr": None}, torch.tensor(step), lr)
            for n in (1030,):
                check([make(form, n, False, n)], host, grad_scale=scale)
                check([make(form, n, False, n)], device.on_host()[0], device)
                check([make(form, n, False, n)], device.on_host()[0], device, grad_scale=scale)
                check([make(form, n, False, n)], device.on_host()[0], device, grad_scale=0.37)
    for skip in (torch.tensor(1.0), torch.tensor(True), torch.tensor([3])):
        work = [make(form, n, True, n) for n in (7, 1030)]
        before = [copy(operands) for operands in work]
        kernels.update_(work, host, skip=skip, fused=True)
        kernels.update_(work[:1], host, skip=skip, fused=True)
        compare(work, before)
        kernels.update_(work, host, skip=torch.zeros_like(skip), fused=True)
        with pytest.raises(AssertionError):
            compare(work, before)


def test_noise_goes_on_beyond_four_billion_elements() -> None:
    """`first` is 64 bits wide, and an index may cross 2**32 in the middle of a tile."""
    for form in (FORMS[9], FORMS[13], FORMS[19]):
        for first in ((1 << 32) - 512, 1 << 32, 5 << 32):
            check([make(form, 1500, False, 1, first)], step_scalars(OPTIONS, 7))


def test_views_that_start_anywhere() -> None:
    """Gradients inside of buckets: addresses with no more than their element's alignment."""
    for count in (1, 2):
        work = []
        for _ in range(count):
            whole = make(FORMS[1], 2000, False, 5)
            work.append(Operands(*(x[3:] if isinstance(x, Tensor) else x for x in whole)))
        check(work, step_scalars(OPTIONS, 2))


def test_segments_of_several_chunks() -> None:
    for form in (FORMS[0], FORMS[13]):
        work = [make(form, n, False, n) for n in (5000, 1, 2048, 2049)]
        check(work, step_scalars(OPTIONS, 2))


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of what is copied to the device."""
    lengths: list[int] = []
    copy_ = Table._copy
    monkeypatch.setattr(Table, "_copy", lambda self, x: lengths.append(x.numel()) or copy_(self, x))
    return lengths


def test_a_table_is_uploaded_once_for_the_same_tensors(uploads: list[int]) -> None:
    work = [make(FORMS[0], n, False, n) for n in (10, 20, 30)]
    for step in (1, 2, 3):
        check(work, step_scalars(OPTIONS, step))
    once = [3, 3 * 15, 3]  # gradients, rows, chunks
    assert uploads == once
    for step in (4, 5):  # new gradients in the same places' stead
        for other, _ in enumerate(work):
            work[other] = work[other]._replace(grad=torch.full_like(work[other].grad, step))
        check(work, step_scalars(OPTIONS, step))
    assert uploads == [*once, 3, 3]
    check([*work[:2], make(FORMS[0], 30, False, 0)], step_scalars(OPTIONS, 4))
    assert uploads == [*once, 3, 3, *once]


def test_the_optimizer_updates_all_tensors_of_a_kind_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    kernel = kernels._triton()
    assert isinstance(kernel, TritonKernel)
    update = kernel.update_
    monkeypatch.setattr(
        kernel, "update_", lambda work, *a, **k: calls.append(len(work)) or update(work, *a, **k)
    )
    params = [torch.rand(7, 5, dtype=dtype) for dtype in (F32, BF16, F32, F32, BF16)]
    twins = [param.clone() for param in params]
    for group, fused in ((params, None), (twins, False)):
        optimizer = AdaBelief([param.requires_grad_() for param in group], fused=fused)
        for step in (1.0, 2.0):
            for param in group:
                param.grad = torch.full_like(param, step)
            optimizer.step()
    assert sorted(calls) == [2, 2, 3, 3]
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


@pytest.mark.parametrize("form", MEASURED.values(), ids=MEASURED)
def test_the_benchmark_compares_bits(form: Any) -> None:
    """What `python -m benchmarks.gpu` asserts on a GPU, here for its own sake."""
    assert has_same_bits(form, "cpu", 700)


class Twins:
    """The same training twice: by Triton, and by plain torch or without plans."""

    def __init__(self, options: dict[str, Any], looked_up: list[int]) -> None:
        self.ours, self.theirs = self.both = pair_of_optimizers(options)
        self.generator = torch.Generator().manual_seed(1)
        self._looked_up = looked_up

    def steps(self, count: int, without: int = -1) -> int:
        """Return how many parameters were looked up."""
        before = len(self._looked_up)
        for _ in range(count):
            pairs = zip(*(each.param_groups[0]["params"] for each in self.both), strict=True)
            for number, pair in enumerate(pairs):
                grad = torch.randn(pair[0].shape, generator=self.generator)
                grad = grad.to(pair[0].dtype).contiguous(memory_format=layout(pair[0]))
                for param in pair:
                    param.grad = None if number == without else grad.clone()
            self.ours.step()
            done = len(self._looked_up)
            self.theirs.step()
            del self._looked_up[done:]
            same(self.ours, self.theirs)
        return len(self._looked_up) - before


@pytest.mark.parametrize("options", [{"amsgrad": True, "weight_decay": 0.1}, {"capturable": True}])
def test_a_step_like_the_one_before_is_planned_once(
    monkeypatch: pytest.MonkeyPatch, uploads: list[int], options: dict[str, Any]
) -> None:
    """Bits and states stay right, whatever changes between two steps."""
    monkeypatch.setattr(triton_kernel, "CHUNK_TILES", 1)
    looked_up: list[int] = []
    operands_of = AdaBelief._operands
    monkeypatch.setattr(
        AdaBelief, "_operands", lambda self, p: looked_up.append(1) or operands_of(self, p)
    )
    twins = Twins(options, looked_up)
    params = twins.ours.param_groups[0]["params"]
    everything = len(params)

    assert twins.steps(3) == 3 * everything  # no states yet; seen; seen again, planned and kept
    del uploads[:]
    assert twins.steps(1) == 0
    assert uploads[:2] == [3, 2]  # new gradients of each dtype, and nothing else
    assert set(uploads) == {3, 2}
    assert twins.steps(1, without=1) == everything - 1
    twins.steps(3)
    # Memory and states that others exchange.
    params[0].data = params[0].data.clone()
    assert twins.steps(1) == everything
    assert twins.steps(2) == everything
    twins.ours.state[params[0]]["exp_avg"] = twins.ours.state[params[0]]["exp_avg"].clone()
    assert twins.steps(1) == everything
    for optimizer in twins.both:
        optimizer.load_state_dict(optimizer.state_dict())
    assert twins.steps(1) == everything
    twins.steps(2)
    for optimizer in twins.both:
        optimizer.param_groups[0]["lr"] = 0.3
    assert twins.steps(1) == 0
    for optimizer in twins.both:  # updated apart from the others from here on
        state = optimizer.state[optimizer.param_groups[0]["params"][2]]
        state["step"] = state["step"] + 5
    assert twins.steps(1) == everything


def test_a_graph_that_is_captured_uploads_nothing(
    monkeypatch: pytest.MonkeyPatch, uploads: list[int]
) -> None:
    """Tensors whose gradients are elsewhere than in the table are then updated one by one."""
    twins = Twins({}, [])
    twins.steps(3)
    monkeypatch.setattr(Table, "upload", lambda self, grads: None)
    del uploads[:]
    twins.steps(2)
    assert not uploads


def layout(tensor: Tensor) -> torch.memory_format:
    last = tensor.dim() == 4 and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def pair_of_optimizers(options: dict[str, Any]) -> tuple[AdaBelief, AdaBelief]:
    """Return the same training twice, of mixed dtypes and layouts, by Triton and by plain torch."""
    made = []
    for fused in (None, False):
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=order)
            for shape, dtype, order in (
                ((7, 5), F32, torch.contiguous_format),
                ((300,), BF16, torch.contiguous_format),
                ((2, 3, 4, 5), F32, torch.channels_last),
                ((), F32, torch.contiguous_format),
                ((9, 2), BF16, torch.contiguous_format),
            )
        ]
        own = {**options, "fused": fused} if not options.get("capturable") else options
        made.append(AdaBelief([p.requires_grad_() for p in params], lr=0.01, **own))
    if options.get("capturable"):  # which plain torch does not do: compare with one launch each
        made[1]._update_again = lambda *_: False  # type: ignore[method-assign]
    return made[0], made[1]


def same(ours: AdaBelief, theirs: AdaBelief) -> None:
    pairs = zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True)
    for a, b in pairs:
        assert torch.equal(a, b)
        for name, value in theirs.state[b].items():
            found = ours.state[a][name]
            assert type(found) is type(value) and torch.equal(*map(torch.as_tensor, (found, value)))


def test_checksums() -> None:
    for dtype, count in ((F32, 9002), (BF16, 4), (F64, 4096), (F32, 0)):
        flat = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
        for first in (0, 3, (1 << 33) + 5):
            assert int(kernels.checksums([flat], [first])) == int(eager.checksum(flat, first))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("blocks", [0, 1, 8, 21])
def test_gradients_in_8_bits(dtype: torch.dtype, blocks: int) -> None:
    """Blocks of every scale, down to one that is zero beside numbers that are not; and special."""
    for seed in range(3 if blocks else 1):
        generator = torch.Generator().manual_seed(seed)
        n = blocks * eager.CODE_BLOCK
        pair = []
        for _ in range(2):
            magnitude = torch.randint(-150, 128, (blocks, 1), generator=generator)
            drawn = torch.randn(blocks, eager.CODE_BLOCK, generator=generator)
            drawn = (drawn.double() * 2.0**magnitude).float()
            drawn[torch.rand(drawn.shape, generator=generator) < 0.1] = 0.0
            drawn[torch.rand(drawn.shape, generator=generator) < 0.1] *= -0.0
            pair.append(drawn.view(n).to(dtype))
        given, error = pair
        if blocks > 8:
            error[: 3 * 256] = 0.0
            given[:256] = values(256, 0, dtype, generator)  # with all that is not finite
            given[256:512] = torch.arange(-127, 129).to(dtype) / 2  # halfway cases
            given[300], given[301] = 127.0, -0.0
            given[512:768] = -0.0
            error[512:640] = -0.0
            tiny = torch.arange(256) * 2.0**-149  # the scale is one or two of the smallest steps
            given[768:1024], error[768:1024] = tiny.to(dtype), 0.0
            given[1024:1280], error[1024:1280] = (tiny / 16).to(dtype), 0.0
            given[1300] = float("-inf")
            error[1600] = float("nan")
        wires = [torch.zeros(blocks * eager.CODE_BYTES, dtype=U8) for _ in range(2)]
        errors = [error.clone(), error.clone()]
        kernel = kernels._triton()
        assert isinstance(kernel, TritonKernel) and kernel.encodes(wires[0], given, errors[0])
        kernels.encode_int8_(wires[0], given, errors[0])
        eager.encode_int8_(wires[1], given, errors[1])
        scales = [wire.view(-1, eager.CODE_BYTES)[:, :4].clone().view(F32) for wire in wires]
        assert torch.equal(bits(scales[0]), bits(scales[1]))
        codes = [wire.view(-1, eager.CODE_BYTES)[:, 4:] for wire in wires]
        assert torch.equal(*codes)
        assert torch.equal(bits(errors[0]), bits(errors[1]))

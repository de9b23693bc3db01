"""The update in each of its forms: the dtypes, and the reference's bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from belief_dist import kernels
from belief_dist.operands import BLOCK, Operands
from belief_dist.options import DEFAULTS
from belief_dist.rule import step_scalars
from belief_dist.state_formats import (
    NEAREST8,
    noise_key,
    split_master,
    split_rounded_master,
    update_stored_reference_,
)
from benchmarks.gpu.cases import SAME, Case, Outcome, Size

F32, F64 = torch.float32, torch.float64
BF16, F16 = torch.bfloat16, torch.float16
U8, I8, I16 = torch.uint8, torch.int8, torch.int16
OPTIONS = {**DEFAULTS, "lr": 1e-3, "weight_decay": 0.1}


class Form(NamedTuple):
    """Dtypes as `operands.Operands` has them."""

    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    out: torch.dtype | None = None
    remainder: torch.dtype | None = None
    amsgrad: bool = False
    average: torch.dtype | None = None


FORMS = {
    "float32": Form(F32, F32, F32),
    "float32, amsgrad": Form(F32, F32, F32, amsgrad=True),
    "float64": Form(F64, F64, F64),
    "bfloat16 parameters": Form(BF16, BF16, F32),
    "float32 masters, bfloat16": Form(F32, BF16, F32, BF16),
    "float32 masters, float16": Form(F32, F16, F32, F16),
    "remainder": Form(BF16, BF16, F32, None, I16),
    "masters, bfloat16 states": Form(F32, BF16, BF16, BF16),
    "remainder, bfloat16 states": Form(BF16, BF16, BF16, None, I16),
    "masters, 8-bit states": Form(F32, BF16, U8, BF16),
    "remainder, 8-bit states": Form(BF16, BF16, U8, None, I16),
    "remainder8": Form(BF16, BF16, F32, None, I8),
    "remainder8, 8-bit states": Form(BF16, BF16, U8, None, I8),
    "remainder, 8-bit states, amsgrad": Form(BF16, BF16, U8, None, I16, True),
    "float32, average": Form(F32, F32, F32, average=F32),
    "remainder, bfloat16 average": Form(BF16, BF16, F32, None, I16, average=BF16),
}


def make(form: Form, n: int, device: str) -> Operands:
    optional: dict[str, Any] = {}
    param = torch.randn(n, device=device)
    if form.remainder is not None:
        is_long = form.remainder == I16
        parts = split_master(param) if is_long else split_rounded_master(param, NEAREST8)
        param, optional["remainder"] = parts
    if form.out is not None:
        optional["param_out"] = torch.empty(n, dtype=form.out, device=device)
    if form.average is not None:
        optional["param_ema"] = torch.randn(n, device=device).to(form.average)
    states: list[Tensor] = []
    for name in ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * form.amsgrad:
        if form.state == U8:
            states.append(torch.randint(128, (n,), dtype=U8, device=device))
            exponent = torch.full((-(-n // BLOCK),), 100, dtype=U8, device=device)
            optional[f"{name}_exponent"] = exponent
        else:
            states.append((torch.rand(n, device=device) * 1e-3).to(form.state))
    grad = torch.randn(n, device=device).mul_(1e-2).to(form.grad)
    return Operands(param.to(form.param), grad, *states, **optional, key=noise_key(1, 2))


def moved(operands: Operands, device: str) -> Operands:
    return Operands(*(x.to(device, copy=True) if isinstance(x, Tensor) else x for x in operands))


def same(ours: Operands, theirs: Operands) -> bool:
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(a, Tensor)]
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


def traffic(operands: Operands) -> int:
    """Return the bytes that an update has to move."""
    sizes = {n: t.nbytes for n, t in operands._asdict().items() if isinstance(t, Tensor)}
    once = sizes["grad"] + sizes.get("param_out", 0)
    return 2 * sum(sizes.values()) - once


def has_same_bits(form: Form, device: str, n: int) -> bool:
    """Update on the device and, by the reference, on the CPU: alone and several at once."""
    here = [make(form, size, "cpu") for size in (n, 1, n // 3)]
    there = [moved(operands, device) for operands in here]
    for step in (1, 2, 1000):
        scalars = step_scalars(OPTIONS, step, ema_weight=1e-3)
        for operands in here:
            update_stored_reference_(operands, scalars, grad_scale=0.37)
        work = [there] if step == 2 else [[each] for each in there]
        for some in work:
            kernels.update_(some, scalars, grad_scale=0.37, fused=True)
    return all(same(a, b) for a, b in zip(there, here, strict=True))


def cases(device: str, size: Size) -> list[Case]:
    def check(form: Form) -> Outcome:
        served = kernels.serving(torch.device(device))
        return {
            "elements": size.bits,
            "kernel": served,
            SAME: has_same_bits(form, device, size.bits),
        }

    return [
        Case("Update, against the reference on the CPU", name, lambda form=form: check(form))
        for name, form in FORMS.items()
    ]

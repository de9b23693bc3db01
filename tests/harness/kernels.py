"""The two CPU updates, and numbers that try them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from belief_dist import kernels
from belief_dist.operands import BLOCK
from belief_dist.options import DEFAULTS
from belief_dist.rule import StepScalars, step_scalars

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


SPECIAL = [0.0, -0.0, 1e-40, -1e-45, 1e30, -1e-30, float("inf"), -float("inf"), float("nan")]


cpp = partial(kernels.update_, fused=True)
chunked = partial(kernels.update_, fused=False)


def values(n: int, offset: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return n numbers, not aligned to a vector.

    In some blocks they are of one magnitude; in others they span sixty decades, special numbers
    among them.
    """
    total, largest = n + offset, 4 if dtype == F16 else 30
    block = (torch.arange(total) - offset) // BLOCK
    wild = (torch.rand(total + 1, generator=generator) < 0.5)[block]
    exponent = torch.empty(total + 1, dtype=F64).uniform_(-30, largest, generator=generator)
    exponent = torch.where(wild, exponent[:total], exponent[block])
    made = torch.randn(total, dtype=F64, generator=generator) * 10**exponent
    # At places of its own in each tensor, so that every special number meets ordinary ones.
    special = wild & (torch.rand(total, generator=generator) < 0.1)
    which = torch.randint(len(SPECIAL), (total,), generator=generator)
    made = torch.where(special, torch.tensor(SPECIAL, dtype=F64)[which], made)
    made = made.to(dtype)
    if dtype == F32:  # NaNs of either sign with all bits set: rounded as a number, they would wrap
        all_bits = torch.where(torch.arange(total) % 2 == 0, 0x7FFFFFFF, -1).to(torch.int32)
        made = torch.where(made.isnan(), all_bits, made.view(torch.int32)).view(F32)
    return made[offset:]


def several_scalars() -> list[StepScalars]:
    """Return scalars of every direction, with coupled decay and without, of several steps."""
    switches: list[dict[str, Any]] = [
        {},
        {"weight_decouple": False},
        {"rectify": True},
        {"rectify": True, "degenerated_to_sgd": False, "maximize": True},
        {"lr": 0.5, "betas": (0.5, 0.7), "eps": 1e-3},
    ]
    options = {**DEFAULTS, "weight_decay": 0.1}
    return [
        step_scalars({**options, **each}, step, ema_weight=0.1 * step)
        for step, each in enumerate(switches, start=1)
    ]


def bits(tensor: Tensor) -> Tensor:
    """Return integers that are equal where the numbers are: -0 is not 0, and any NaN is NaN."""
    if not tensor.is_floating_point():
        return tensor
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor).view(width)

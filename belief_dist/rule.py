"""The AdaBelief rule: the one definition that every kernel reproduces bit for bit.

For a gradient g at step t >= 1, elementwise::

    m_t = m_{t-1} + (1 - b1) (g_t - m_{t-1})
    s_t = b2 s_{t-1} + (1 - b2) (g_t - m_t)^2 + eps
    p_t = decay p_{t-1} - step_size * m_t / (sqrt(s_t) * denom_scale + eps)

with ``decay = 1 - lr * weight_decay``, ``step_size = lr / (1 - b1^t)`` and
``denom_scale = 1 / sqrt(1 - b2^t)``. Here ``exp_avg`` is m and ``exp_avg_sq`` is s. An average
of the parameter, where one is kept, follows::

    a_t = a_{t-1} + ema_weight (p_t - a_{t-1})

Every arithmetic operation of `update_reference_` is rounded on its own, in the order written
there, in the dtype of the states. A fused multiply-add would round twice at once, so kernels must
switch contraction off. Everything that does not depend on an element is computed once per step on
the host in float64 (`step_scalars`) and rounded to the compute dtype when it meets a tensor.

Source: Zhuang et al., "AdaBelief Optimizer", arXiv:2010.07468, Algorithm 2; rectification:
Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", arXiv:1908.03265, in the
form of adabelief-pytorch 0.2.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Direction(IntEnum):
    """What a step moves the parameter along."""

    ADAPTIVE = 0  # m / (sqrt(s) * denom_scale + eps)
    MOMENTUM = 1  # m: rectified AdaBelief while the variance of s is intractable
    NONE = 2  # nothing but decay: the same phase with degenerated_to_sgd=False


class StepScalars(NamedTuple):
    """What one step needs besides the tensors; Python floats are float64."""

    weight1: float  # 1 - beta1, formed in float64: in float32 1 - 0.999 is off by 1.3e-5
    beta2: float
    weight2: float  # 1 - beta2
    eps: float  # added to s at every step, and to the denominator
    decay: float  # factor on the parameter; 1 without decoupled decay
    coupled_decay: float  # multiple of the parameter added to the gradient; 0 when decoupled
    step_size: float
    denom_scale: float
    direction: Direction
    sign: float  # -1 to maximize, else 1; multiplies the gradient
    step: int  # 1-based; keys the noise of states that are rounded stochastically
    ema_weight: float = 0.0  # of the new parameter in its average: 1 - ema_decay


# Below this length of the simple moving average the variance of s is intractable
# (adabelief-pytorch 0.2.1; arXiv:1908.03265 has > 4).
RECTIFY_THRESHOLD = 5.0


def step_scalars(options: Mapping[str, Any], step: int, *, ema_weight: float = 0.0) -> StepScalars:
    """Return the host scalars of step number `step` (1-based) under a param group's options."""
    lr = float(options["lr"])
    beta1, beta2 = (float(beta) for beta in options["betas"])
    weight_decay = float(options["weight_decay"])
    bias1 = 1.0 - beta1**step
    bias2 = 1.0 - beta2**step

    direction = Direction.ADAPTIVE
    step_size = lr / bias1
    denom_scale = 1.0 / math.sqrt(bias2)
    if options["rectify"]:
        sma_max = 2.0 / (1.0 - beta2) - 1.0
        sma = sma_max - 2.0 * step * beta2**step / bias2
        if sma >= RECTIFY_THRESHOLD:
            rectification = math.sqrt(
                bias2
                * (sma - 4.0) / (sma_max - 4.0)
                * (sma - 2.0) / sma
                * sma_max / (sma_max - 2.0)
            )  # fmt: skip
            step_size = lr * rectification / bias1
            denom_scale = 1.0  # the bias correction of s is inside the rectification term
        else:
            direction = Direction.MOMENTUM if options["degenerated_to_sgd"] else Direction.NONE

    decay, coupled_decay = 1.0, 0.0
    if options["weight_decouple"]:
        decay = 1.0 - (weight_decay if options["fixed_decay"] else lr * weight_decay)
    else:
        coupled_decay = weight_decay
    return StepScalars(
        weight1=1.0 - beta1,
        beta2=beta2,
        weight2=1.0 - beta2,
        eps=float(options["eps"]),
        decay=decay,
        coupled_decay=coupled_decay,
        step_size=step_size,
        denom_scale=denom_scale,
        direction=direction,
        sign=-1.0 if options["maximize"] else 1.0,
        step=step,
        ema_weight=ema_weight,
    )


def compute_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states and arithmetic for parameters of `param_dtype`."""
    return torch.float64 if param_dtype == torch.float64 else torch.float32


def correctly_rounded_sqrt(x: Tensor) -> Tensor:
    """Return the float32 or float64 number nearest to each square root, as IEEE 754 defines it.

    `torch.sqrt` does so on GPUs. On CPUs it may call Intel's vector library, which is off by one
    unit in the last place for up to a sixth of all float32 numbers.
    """
    if x.device.type != "cpu":
        return x.sqrt()
    if x.dtype == torch.float64:  # the complex root of a real number is the C library's own sqrt
        root = x.to(torch.complex128).sqrt().real
        return torch.where(x < 0, math.nan, root)
    # A root of a float32 number is never so near to the middle between two of them that an error
    # in the last place of a float64 root could change the rounding.
    return x.double().sqrt().to(x.dtype)


@torch.no_grad()
def update_reference_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: StepScalars,
    *,
    grad_scale: Tensor | float = 1.0,
    max_exp_avg_sq: Tensor | None = None,
    param_out: Tensor | None = None,
    param_ema: Tensor | None = None,
) -> None:
    """Apply one step in place, in plain torch: the definition.

    Args:
        param: Any shape; float64, float32, bfloat16 or float16. Updated in place. A 16-bit
            parameter is widened to float32, updated and rounded to nearest even.
        grad: Same shape, any of these dtypes; read only.
        exp_avg: m, same shape, `compute_dtype(param.dtype)`. Updated in place.
        exp_avg_sq: s, likewise.
        scalars: From `step_scalars`.
        grad_scale: Factor on the gradient: a float, or a tensor with one element (so that a
            value which depends on gradients need not visit the host). It is multiplied by
            `scalars.sign` and rounded to the compute dtype before it meets the gradient.
        max_exp_avg_sq: The running maximum of s (amsgrad), or None. Updated in place.
        param_out: A 16-bit tensor that receives the rounded new parameter, or None.
        param_ema: The average of the parameter, in the dtype of `exp_avg`, or None. It follows the
            new parameter before that is rounded. Updated in place.
    """
    compute = exp_avg.dtype
    if isinstance(grad_scale, Tensor):
        scale: Tensor | float = (
            (grad_scale.to(torch.float64) * scalars.sign).to(compute).reshape(())
        )
    else:
        scale = float(grad_scale) * scalars.sign
    p = param if param.dtype == compute else param.to(compute)
    g = grad.to(compute) * scale
    if scalars.coupled_decay != 0.0:
        g += p * scalars.coupled_decay

    delta = g - exp_avg
    delta *= scalars.weight1
    exp_avg += delta

    surprise = g - exp_avg
    increment = surprise * scalars.weight2
    increment *= surprise
    exp_avg_sq *= scalars.beta2
    exp_avg_sq += increment
    exp_avg_sq += scalars.eps

    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
        second = max_exp_avg_sq

    if scalars.decay != 1.0:
        p *= scalars.decay
    if scalars.direction == Direction.ADAPTIVE:
        denom = correctly_rounded_sqrt(second)
        denom *= scalars.denom_scale
        denom += scalars.eps
        change = exp_avg / denom
        change *= scalars.step_size
        p -= change
    elif scalars.direction == Direction.MOMENTUM:
        p -= exp_avg * scalars.step_size

    if p is not param:
        param.copy_(p)
    if param_out is not None:
        param_out.copy_(p)
    if param_ema is not None:
        way = p - param_ema
        way *= scalars.ema_weight
        param_ema += way

"""A step like the one before: what need not be looked up again.

Most steps update the same tensors at the same places, with new gradients. On a GPU, one launch
updates them all, and Python's work for each is what a step costs. So what a step rests on is
written down in numbers: if these are those of the step before, so is all that followed from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from belief_dist.kernels import Again
from belief_dist.sharding.dtensor import local_part

_PLAIN = {torch.nn.Parameter, Tensor}


class Look(NamedTuple):
    """What a step finds: `rests_on` decides whether a plan is still right."""

    rests_on: list[Any]
    grads: list[int]  # addresses
    states: list[dict[str, Any]]


class Part(NamedTuple):
    """Parameters that one launch updates."""

    launch: Again
    members: list[int]  # their numbers among the parameters that have a gradient


class Plan:
    """What follows from `rests_on`; made when it has been found twice."""

    def __init__(self, rests_on: list[Any]) -> None:
        self.rests_on = rests_on
        self.parts: list[Part] | None = None


def look(
    params: Sequence[Tensor],
    states: Mapping[Tensor, dict[str, Any]],
    *,
    amsgrad: bool,
    capturable: bool,
) -> Look | None:
    """Return what the next step of parameters with a gradient rests on.

    It keeps no tensor, which others may want to free: addresses, dtypes and sizes say the same.

    Returns:
        None if something is unusual: a state is missing, a count is no number (with capturable, no
        tensor), a gradient is sparse, tensors are laid out in different ways.
    """
    rests_on: list[Any] = []
    grads: list[int] = []
    found: list[dict[str, Any]] = []
    first, plain, strided = None, _PLAIN, torch.strided  # names that are found sooner
    for param in params:
        state = states[param]
        grad: Any = param.grad
        try:
            m, s, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
        except KeyError:
            return None
        largest = state.get("max_exp_avg_sq")
        if type(param) not in plain or type(grad) is not Tensor:
            param, grad, m, s = map(local_part, (param, grad, m, s))
            largest = None if largest is None else local_part(largest)
        if grad.layout is not strided or (amsgrad and largest is None):
            return None
        if (type(step) is int) == capturable:
            return None
        # What has taken the same steps is updated together.
        if capturable:
            ahead = id(step)
        else:
            first = step if first is None else first
            ahead = step - first
        rests_on += (
            ahead, param.data_ptr(), m.data_ptr(), s.data_ptr(), param.numel(),
            param.dtype, grad.dtype, m.dtype, s.dtype,
        )  # fmt: skip
        if largest is not None:
            rests_on += (largest.data_ptr(), largest.dtype, largest.is_contiguous())
        if not (
            param.is_contiguous()
            and grad.is_contiguous()
            and m.is_contiguous()
            and s.is_contiguous()
        ):
            layout = param.stride()
            if not layout == grad.stride() == m.stride() == s.stride():
                return None
            rests_on += (param.shape, layout)
        grads.append(grad.data_ptr())
        found.append(state)
    return Look(rests_on, grads, found)

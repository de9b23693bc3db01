"""Fused updates, and which of them is used where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from belief_dist.kernels import eager
from belief_dist.kernels.foreach import foreach_update_
from belief_dist.norm import add_squares_
from belief_dist.rule import StepScalars

__all__ = [
    "backends",
    "foreach_update_",
    "ordered_sum_",
    "prefers_foreach",
    "require_fused",
    "squared_norm_bins_",
    "update_",
]


def backends() -> list[tuple[str, bool, str]]:
    """Return (name, usable, reason) of every backend."""
    return [("eager", True, "plain torch in cache-sized pieces")]


def require_fused() -> None:
    """Raise unless a compiled kernel is usable."""
    raise RuntimeError("fused=True needs a compiled kernel, and none is usable here.")


def prefers_foreach(
    work: Sequence[Mapping[str, Any]], foreach: bool | None, fused: bool | None
) -> bool:
    """Tell whether a group's tensors are best updated together."""
    if foreach is not None or not work:
        return bool(foreach)
    return not fused and work[0]["param"].device.type != "cpu"


def update_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: StepScalars,
    *,
    grad_scale: Tensor | float = 1.0,
    skip: Tensor | None = None,
    max_exp_avg_sq: Tensor | None = None,
    param_out: Tensor | None = None,
    fused: bool | None = None,
) -> None:
    """Apply one step in place to contiguous tensors; see `rule.update_reference_`."""
    eager.update_(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        scalars,
        grad_scale=grad_scale,
        skip=skip,
        max_exp_avg_sq=max_exp_avg_sq,
        param_out=param_out,
    )


def ordered_sum_(out: Tensor, pieces: Sequence[Tensor]) -> None:
    """Add `pieces` in their order into `out`, every addition rounded on its own."""
    eager.ordered_sum_(out, pieces)


def squared_norm_bins_(bins: Tensor, values: Tensor) -> None:
    """See `norm.add_squares_`."""
    add_squares_(bins, values)

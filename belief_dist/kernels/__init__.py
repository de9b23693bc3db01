"""The fused updates, and which of them serves which tensors.

The compiled C++ kernel serves CPU tensors where it is usable; chunked plain torch serves the rest.
All give the same bits as `belief_dist.storage.update_stored_reference_`. One log line says which
is used; the environment variable BELIEF_DIST_BACKEND ("auto", "cpp" or "eager") forces one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from belief_dist import norm
from belief_dist.kernels import eager
from belief_dist.kernels.build import Unavailable
from belief_dist.kernels.cpp import CppKernel
from belief_dist.kernels.foreach import foreach_update_
from belief_dist.rule import StepScalars, compute_dtype
from belief_dist.storage import Operands

__all__ = [
    "backends",
    "foreach_update_",
    "ordered_sum_",
    "prefers_foreach",
    "require_fused",
    "squared_norm_bins_",
    "update_",
]

logger = logging.getLogger("belief_dist")

_CHOICES = ("auto", "cpp", "eager")


@lru_cache(maxsize=1)
def _cpp() -> CppKernel | Unavailable:
    """Return the compiled kernel or the reason why there is none; say once which it is."""
    choice = os.environ.get("BELIEF_DIST_BACKEND", "auto")
    if choice not in _CHOICES:
        raise ValueError(
            f"BELIEF_DIST_BACKEND must be one of {', '.join(_CHOICES)}, got {choice!r}."
        )
    if choice == "eager":
        logger.info("CPU updates run in chunked plain torch, as BELIEF_DIST_BACKEND asks")
        return Unavailable("BELIEF_DIST_BACKEND=eager forbids it")
    try:
        kernel = CppKernel()
    except Unavailable as reason:
        if choice == "cpp":
            raise RuntimeError(
                f"BELIEF_DIST_BACKEND=cpp, but {reason}. Install g++ (apt install g++) or unset it."
            ) from reason
        logger.warning(
            "CPU updates run in chunked plain torch, 5 to 8 times slower than C++, because %s; "
            "install g++ (apt install g++) to end this",
            reason,
        )
        return reason
    logger.info("CPU updates run in %s", kernel.description)
    return kernel


def backends() -> list[tuple[str, bool, str]]:
    """Return (name, usable, description or reason) of every update backend."""
    kernel = _cpp()
    usable = isinstance(kernel, CppKernel)
    return [
        ("cpp", usable, kernel.description if isinstance(kernel, CppKernel) else str(kernel)),
        ("eager", True, "chunked plain torch, on every device"),
    ]


def require_fused() -> None:
    """Check that a compiled kernel is usable.

    Raises:
        RuntimeError: It is not; says why.
    """
    kernel = _cpp()
    if isinstance(kernel, Unavailable):
        raise RuntimeError(f"fused=True needs the compiled kernel, but {kernel}.")


def prefers_foreach(param: Tensor, foreach: bool | None, fused: bool | None) -> bool:
    """Tell whether tensors like `param` are best updated together by multi-tensor operations."""
    if foreach is not None:
        return foreach
    return not fused and param.device.type != "cpu"


def update_(
    work: Sequence[Operands],
    scalars: StepScalars,
    *,
    grad_scale: Tensor | float = 1.0,
    skip: Tensor | None = None,
    fused: bool | None = None,
) -> None:
    """Apply one step in place by the fastest usable backend: one call for many tensors.

    Args:
        work: With contiguous tensors. All entries have the same dtypes and the same optional
            tensors, on one device.
        scalars: From `rule.step_scalars`.
        grad_scale: As for `rule.update_reference_`.
        skip: One element on the tensors' device; unless it is zero, everything stays as it is.
        fused: True insists on a compiled kernel, False refuses it, None takes it if it is usable.

    Raises:
        RuntimeError: `fused` is True and no compiled kernel serves these tensors.
    """
    if not work:
        return
    kernel = None if fused is False else _cpp()
    if isinstance(kernel, CppKernel) and kernel.update_(work, scalars, grad_scale, skip):
        return
    if fused:
        first = work[0].param
        raise RuntimeError(
            f"fused=True, but no compiled kernel serves {first.dtype} tensors on {first.device}."
        )
    for operands in work:
        eager.update_(operands, scalars, grad_scale=grad_scale, skip=skip)


def ordered_sum_(
    out: Tensor, pieces: Sequence[Tensor], bins: Tensor | None = None, *, accumulate: bool = False
) -> None:
    """Add tensors in their order, every addition rounded on its own.

    Args:
        out: (n,), float32 or float64; may be one of `pieces`.
        pieces: Tensors (n,) of one dtype, widened to that of `out` before they are added.
        bins: Receives the squares of the sums, as from `squared_norm_bins_`, or None.
        accumulate: Start from what is in `out`, as if it were the first piece.
    """
    kernel = _cpp()
    if (
        isinstance(kernel, CppKernel)
        and kernel.supports(out, *pieces)
        and out.dtype == compute_dtype(pieces[0].dtype)
    ):
        kernel.ordered_sum_(out, pieces, bins, accumulate=accumulate)
        return
    eager.ordered_sum_(out, pieces, accumulate=accumulate)
    if bins is not None:
        norm.add_squares_(bins, out)


def squared_norm_bins_(bins: Tensor, values: Tensor) -> None:
    """Add the squares of `values` to `bins`, exactly; see `norm.add_squares_`."""
    kernel = _cpp()
    if isinstance(kernel, CppKernel) and kernel.supports(values):
        kernel.add_squares_(bins, values)
    else:
        norm.add_squares_(bins, values)

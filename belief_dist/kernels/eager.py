"""Plain torch in pieces that stay in cache: several times faster than whole tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from threading import get_ident

import torch
from torch import Tensor

from belief_dist.rule import Direction, StepScalars, update_reference_

# Elements per piece, as measured: what a piece touches stays in cache and its temporary tensors
# below the size that the C library returns to the system. Accelerators have neither concern.
_PIECE = 1 << 15
_LEAN_PIECE = 1 << 17
_ACCELERATOR_PIECE = 1 << 26


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
) -> None:
    """Apply one step piece by piece; bit for bit `update_reference_`."""
    on_cpu = _on_cpu(param)
    if on_cpu and skip is not None and bool(skip):
        return
    tensors = (param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, param_out)
    flat = [None if tensor is None else tensor.view(-1) for tensor in tensors]
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    lean = on_cpu and dtypes == {torch.float32} and max_exp_avg_sq is None and param_out is None
    size = _LEAN_PIECE if lean else _PIECE if on_cpu else _ACCELERATOR_PIECE
    for start in range(0, param.numel(), size):
        p, g, m, s, maximum, out = (
            None if tensor is None else tensor[start : start + size] for tensor in flat
        )
        assert p is not None and g is not None and m is not None and s is not None
        if lean:
            _update_float32_(p, g, m, s, scalars, float(grad_scale))
            continue
        results = [t for t in (p, m, s, maximum, out) if t is not None]
        before = [] if skip is None or on_cpu else [t.clone() for t in results]
        update_reference_(
            p, g, m, s, scalars, grad_scale=grad_scale, max_exp_avg_sq=maximum, param_out=out
        )
        # An accelerator would stop for the host to read `skip`.
        if skip is not None and not on_cpu:
            for old, new in zip(before, results, strict=True):
                new.copy_(torch.where(skip.bool(), old, new))


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


@lru_cache(maxsize=8)
def _scratch(thread: int) -> tuple[Tensor, ...]:
    """Return memory that a thread reuses: two pieces in float32, one in float64."""
    return tuple(
        torch.empty(_LEAN_PIECE, dtype=dtype)
        for dtype in (torch.float32, torch.float32, torch.float64)
    )


@torch.no_grad()
def _update_float32_(
    p: Tensor, g: Tensor, m: Tensor, s: Tensor, scalars: StepScalars, grad_scale: float
) -> None:
    """The common case of `update_reference_`, the same operations without a new tensor."""
    grad, work, wide = (scratch[: p.numel()] for scratch in _scratch(get_ident()))
    torch.mul(g, grad_scale * scalars.sign, out=grad)
    if scalars.coupled_decay != 0.0:
        grad += torch.mul(p, scalars.coupled_decay, out=work)

    torch.sub(grad, m, out=work)
    m += work.mul_(scalars.weight1)

    grad -= m
    torch.mul(grad, scalars.weight2, out=work)
    s.mul_(scalars.beta2).add_(work.mul_(grad)).add_(scalars.eps)

    if scalars.decay != 1.0:
        p *= scalars.decay
    if scalars.direction == Direction.ADAPTIVE:
        denom = grad.copy_(wide.copy_(s).sqrt_())  # rule.correctly_rounded_sqrt
        denom.mul_(scalars.denom_scale).add_(scalars.eps)
        p -= torch.div(m, denom, out=work).mul_(scalars.step_size)
    elif scalars.direction == Direction.MOMENTUM:
        p -= torch.mul(m, scalars.step_size, out=work)


def ordered_sum_(out: Tensor, pieces: Sequence[Tensor], *, accumulate: bool = False) -> None:
    """Add `pieces` in their order into `out`."""
    if accumulate:
        pieces = (out, *pieces)
    # `out` may be any of the pieces, so a part is complete before it is stored.
    size = _LEAN_PIECE if out.device.type == "cpu" else _ACCELERATOR_PIECE
    total = torch.empty(min(size, out.numel()), dtype=out.dtype, device=out.device)
    for start in range(0, out.numel(), size):
        stop = min(start + size, out.numel())
        part = total[: stop - start].copy_(pieces[0][start:stop])
        for piece in pieces[1:]:
            part += piece[start:stop].to(out.dtype)
        out[start:stop] = part

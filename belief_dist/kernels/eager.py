"""The update in plain torch, on pieces that stay in cache, which is several times faster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from belief_dist.norm import norm_from_bins
from belief_dist.operands import Operands, cut
from belief_dist.rule import Direction, StepScalars
from belief_dist.state_formats import update_stored_reference_, word_sums

# Elements per piece, as measured: operands stay in cache, and temporary tensors below the size at
# which the C library returns memory to the system. Neither matters on accelerators.
_PIECE = 1 << 15
_LEAN_PIECE = 1 << 17
_ACCELERATOR_PIECE = 1 << 26
# Words of 8 bytes.
_CHECKSUM_PIECE = 1 << 14
_LOW_HALF = (1 << 32) - 1

# Of gradients that travel in 8 bits: elements of a block, and its bytes with its scale in front.
CODE_BLOCK = 256
CODE_BYTES = 4 + CODE_BLOCK


def update_(
    operands: Operands,
    scalars: StepScalars,
    *,
    grad_scale: Tensor | float = 1.0,
    skip: Tensor | None = None,
) -> None:
    """Apply one step piece by piece; same bits as `state_formats.update_stored_reference_`."""
    on_cpu = _on_cpu(operands.param)
    if on_cpu and skip is not None and bool(skip):
        return
    lean = on_cpu and _is_plain_float32(operands)
    size = _LEAN_PIECE if lean else _PIECE if on_cpu else _ACCELERATOR_PIECE
    flat: dict[str, Any] = {
        name: value.view(-1)
        for name, value in operands._asdict().items()
        if isinstance(value, Tensor) and name != "sums"
    }
    operands = operands._replace(**flat)
    for start in range(0, operands.param.numel(), size):
        piece = cut(operands, start, min(start + size, operands.param.numel()))
        if lean:
            if piece.sums is not None:
                piece.sums[0, 0] += word_sums(piece)
            _update_float32_(*piece[:4], scalars, float(grad_scale), piece.param_ema)
            if piece.sums is not None:
                piece.sums[0, 1] += word_sums(piece)
            continue
        written = [t for name, t in piece._asdict().items() if name not in ("grad", "sums")]
        results = [tensor for tensor in written if isinstance(tensor, Tensor)]
        before = [] if skip is None or on_cpu else [tensor.clone() for tensor in results]
        update_stored_reference_(piece, scalars, grad_scale=grad_scale)
        # Reading `skip` on the host would synchronize with the accelerator, so select there.
        if skip is not None and not on_cpu:
            for old, new in zip(before, results, strict=True):
                new.copy_(torch.where(skip.bool(), old, new))


def _is_plain_float32(operands: Operands) -> bool:
    """Return whether the operands are just four float32 tensors, and maybe an average."""
    o = operands
    needed = [*o[:4], *([] if o.param_ema is None else [o.param_ema])]
    optional = [o.max_exp_avg_sq, o.param_out, o.remainder, o.exp_avg_exponent]
    return all(t.dtype == torch.float32 for t in needed) and all(t is None for t in optional)


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


@lru_cache(maxsize=8)
def _scratch(thread: int) -> tuple[Tensor, ...]:
    """Return a thread's scratch memory: two pieces in float32, one in float64."""
    return tuple(
        torch.empty(_LEAN_PIECE, dtype=dtype)
        for dtype in (torch.float32, torch.float32, torch.float64)
    )


@torch.no_grad()
def _update_float32_(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    s: Tensor,
    scalars: StepScalars,
    grad_scale: float,
    average: Tensor | None,
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
    if average is not None:
        average += torch.sub(p, average, out=work).mul_(scalars.ema_weight)


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


def checksum(flat: Tensor, first: int) -> Tensor:
    """Return a sum over 64-bit words that depends on their order, as one int64 element.

    Each word counts as (low half + key) * (high half + another key), all modulo 2**32 and the sum
    modulo 2**64, with keys made from the position. So it notices words in another order, and two
    changes that would cancel in a plain sum (two flipped signs); others pass with 2**-32.

    Args:
        flat: A multiple of 8 bytes.
        first: The position of its first word.

    Source: Black et al., "UMAC", CRYPTO 1999, section 4.2 (NH); here the keys are no secret.
    """
    halves = flat.view(torch.int32).view(-1, 2)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    size = _CHECKSUM_PIECE if _on_cpu(flat) else _ACCELERATOR_PIECE
    for start in range(0, len(halves), size):
        chunk = halves[start : start + size].to(torch.int64)
        place = torch.arange(first + start, first + start + len(chunk), device=flat.device)
        place &= _LOW_HALF
        low = (chunk[:, 0] + place * 0x9E3779B1 + 0x7FEB352D) & _LOW_HALF
        high = (chunk[:, 1] + place * 0x85EBCA77 + 0x846CA68B) & _LOW_HALF
        total += (low * high).sum()
    return total


def grad_scales(
    bins: Tensor, *, world_size: int, loss_scale: Tensor | None, limit: float | None
) -> Tensor:
    """Return three numbers, float64: the norm of the mean gradient, and two factors.

    Gradients are sums until the update. Mean, loss scale and clipping become one factor, which the
    update multiplies by: no pass over the gradients of its own, and one rounding.

    Args:
        bins: (norm.NUM_WORDS,), int64: the squares of all summed gradients.
        world_size: How many gradients are in the sums: of ranks, or of micro-batches.
        loss_scale: By which they are too large; one element, or None.
        limit: Of the norm, or None.

    Returns:
        The norm, the factor with clipping to `limit`, and the factor without.
    """
    total = norm_from_bins(bins)
    mean = torch.full_like(total, 1.0 / world_size)
    if loss_scale is not None:
        mean /= loss_scale
    length = total * mean
    clipped = mean
    if limit is not None:
        # The same formula as torch.nn.utils.clip_grad_norm_.
        clipped = mean * (limit / (length + 1e-6)).clamp(max=1.0)
    return torch.stack([length, clipped, mean])


def encode_int8_(wire: Tensor, values: Tensor, error: Tensor) -> None:
    """Write `values` plus `error` to `wire` in 8 bits, and to `error` what is lost by rounding.

    Args:
        wire: (n / CODE_BLOCK * CODE_BYTES,), uint8: of each block its scale and its codes.
        values: (n,), float32, bfloat16 or float16; n is a multiple of `CODE_BLOCK`. What is not
            finite makes its whole block so.
        error: (n,) in the dtype of `values`.
    """
    blocks = wire.view(-1, CODE_BYTES)
    size = (_LEAN_PIECE if _on_cpu(values) else _ACCELERATOR_PIECE) // CODE_BLOCK
    for start in range(0, len(blocks), size):
        block = blocks[start : start + size]
        window = slice(start * CODE_BLOCK, (start + len(block)) * CODE_BLOCK)
        exact = values[window].float() + error[window].float()
        exact = exact.view(-1, CODE_BLOCK)
        scale = exact.abs().amax(1, keepdim=True) / 127
        code = (exact / scale).round_().clamp_(-127, 127)
        # A scale of zero has only zeros, or numbers too small for it, which stay in the error. Any
        # code keeps a scale that is not finite so.
        code.masked_fill_(scale == 0, 0.0)
        code.masked_fill_(~scale.isfinite(), 1.0)
        block[:, :4] = scale.view(torch.uint8)
        block[:, 4:] = code.to(torch.int8).view(torch.uint8)
        error[window] = (exact - code * scale).view(-1)


def decode_int8(wire: Tensor) -> Tensor:
    """Return the elements (n,), float32, that `encode_int8_` has written to `wire`."""
    block = wire.view(-1, CODE_BYTES)
    scale = block[:, :4].contiguous().view(torch.float32)
    return (block[:, 4:].view(torch.int8).float() * scale).view(-1)

"""Gradients in 8 bits: what travels with ``reduce_dtype=torch.int8``.

A block of 256 elements becomes one float32 scale and 256 signed bytes, 260 bytes in all. What
rounding has cut off stays on the rank that sends and is added to its next gradient (error
feedback), so that it is late and not lost. Blocks are anchored in their parameter: how a gradient
is rounded depends on nothing but that gradient.

    x = g + error;  scale = max|x| / 127;  q = round(x / scale);  error = x - q * scale

Sources: Seide et al., "1-Bit Stochastic Gradient Descent" (Interspeech 2014), section 3;
Karimireddy et al., "Error Feedback Fixes SignSGD", arXiv:1901.09847, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from belief_dist.kernels import ordered_sum_

BLOCK = 256
BLOCK_BYTES = 4 + BLOCK
# Blocks that are worked on at once: temporary memory stays small, and in cache.
_AT_ONCE = 1 << 9


def encoded_nbytes(numel: int) -> int:
    """Return the bytes of `numel` encoded elements, a multiple of `BLOCK`."""
    return numel // BLOCK * BLOCK_BYTES


def encode_(wire: Tensor, values: Tensor, error: Tensor) -> None:
    """Write `values` plus `error` to `wire`, and to `error` what is lost by rounding.

    Args:
        wire: (encoded_nbytes(n),), uint8.
        values: (n,), float32, bfloat16 or float16; n is a multiple of `BLOCK`. What is not finite
            makes its whole block so.
        error: (n,) in the dtype of `values`.
    """
    blocks = wire.view(-1, BLOCK_BYTES)
    for start in range(0, len(blocks), _AT_ONCE):
        block = blocks[start : start + _AT_ONCE]
        window = slice(start * BLOCK, (start + len(block)) * BLOCK)
        exact = values[window].float() + error[window].float()
        exact = exact.view(-1, BLOCK)
        scale = exact.abs().amax(1, keepdim=True) / 127
        code = (exact / scale).round_().clamp_(-127, 127)
        # A scale of zero has only zeros, or numbers too small for it, which stay in the error. Any
        # code keeps a scale that is not finite so.
        code.masked_fill_(scale == 0, 0.0)
        code.masked_fill_(~scale.isfinite(), 1.0)
        block[:, :4] = scale.view(torch.uint8)
        block[:, 4:] = code.to(torch.int8).view(torch.uint8)
        error[window] = (exact - code * scale).view(-1)


def decode(wire: Tensor) -> Tensor:
    """Return the elements (n,), float32, that `encode_` has written to `wire`."""
    block = wire.view(-1, BLOCK_BYTES)
    scale = block[:, :4].contiguous().view(torch.float32)
    return (block[:, 4:].view(torch.int8).float() * scale).view(-1)


def elements_of(start: int, stop: int, dtype: torch.dtype) -> slice:
    """Return which elements of a shard are in [start, stop) of a piece that travels in `dtype`."""
    if dtype != torch.uint8:
        return slice(start, stop)
    return slice(start // BLOCK_BYTES * BLOCK, stop // BLOCK_BYTES * BLOCK)


def sum_pieces_(
    out: Tensor, pieces: Sequence[Tensor], bins: Tensor | None, *, accumulate: bool
) -> None:
    """Add pieces as they have travelled; otherwise `kernels.ordered_sum_`."""
    if pieces[0].dtype == torch.uint8:
        pieces = [decode(piece) for piece in pieces]
    ordered_sum_(out, pieces, bins, accumulate=accumulate)

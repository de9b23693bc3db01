# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""A GPU kernel for what a step multiplies gradients by: on tensors of one element, in one launch.

Only `triton_reduce_launch` imports this module, and only if Triton is usable.
"""

import triton
import triton.language as tl

from belief_dist.norm import LOW_BIN, NUM_BINS

_LOW = tl.constexpr(LOW_BIN)
_BINS = tl.constexpr(NUM_BINS)
_LANES = tl.constexpr(32)  # NUM_BINS, rounded up to a power of two


@triton.jit
def _power_of_two(exponent):
    return (exponent.to(tl.int64) + 1023 << 52).to(tl.float64, bitcast=True)


@triton.jit
def _words(bins, index):
    """Return both words of a bin; of one below all, zeros."""
    low = tl.load(bins + 2 * index, mask=index >= 0, other=0)
    high = tl.load(bins + 2 * index + 1, mask=index >= 0, other=0)
    return low, high


@triton.jit
def _norm(bins):
    """Return `norm.norm_from_bins`, operation by operation."""
    lane = tl.arange(0, _LANES)
    low = tl.load(bins + 2 * lane, mask=lane < _BINS, other=0)
    high = tl.load(bins + 2 * lane + 1, mask=lane < _BINS, other=0)
    top = tl.max(tl.where((low | high) != 0, lane, 0), axis=0)
    low2, high2 = _words(bins, top)
    low1, high1 = _words(bins, top - 1)
    low0, high0 = _words(bins, top - 2)
    digit0 = low0 & 0xFFFFFFFF
    carried = low1 + high0 + (low0 >> 32)
    digit1 = carried & 0xFFFFFFFF
    carried = low2 + high1 + (carried >> 32)
    digit2 = carried & 0xFFFFFFFF
    digit3 = high2 + (carried >> 32)
    shift = _power_of_two(tl.full((), 32, tl.int32))
    value = digit3.to(tl.float64)
    value = value * shift + digit2.to(tl.float64)
    value = value * shift + digit1.to(tl.float64)
    value = value * shift + digit0.to(tl.float64)
    return tl.sqrt(value * _power_of_two(32 * (top + _LOW)) * _power_of_two(top * 0 - 64))


@triton.jit
def grad_scales(
    scales,  # (3,), float64: receives the norm of the mean gradient, and its factors
    bins,  # (norm.NUM_WORDS,), int64
    constants,  # (3,), float64: 1 / number of ranks, the limit of the norm, 1e-6
    loss_scale_at,  # one number, or None
    CLIP: tl.constexpr,
):
    """Compute the norm, and the factors on summed gradients with and without clipping."""
    mean = tl.load(constants)
    if loss_scale_at is not None:
        mean = mean / tl.load(loss_scale_at).to(tl.float64)
    norm = _norm(bins) * mean
    clipped = mean
    if CLIP:
        one = _power_of_two(tl.full((), 0, tl.int32))
        # Rounded twice, as torch divides a number by a tensor.
        ratio = one / (norm + tl.load(constants + 2)) * tl.load(constants + 1)
        clipped = mean * tl.where(ratio > one, one, ratio)
    tl.store(scales, norm)
    tl.store(scales + 1, clipped)
    tl.store(scales + 2, mean)

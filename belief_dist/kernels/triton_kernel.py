# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The GPU update: a function for one tile of elements, and two kernels that call it.

`update_flat` takes the pointers of one tensor as arguments; `update_many` reads those of any number
of tensors from a table on the device. Both give the bits of
`state_formats.update_stored_reference_`: every floating-point operation is rounded on its own
(division and root to nearest; the launcher disables fused multiply-adds), and narrower formats are
encoded and decoded as in `triton_formats`.

Each thread handles four consecutive elements: 16 bytes of float32 in one instruction, 8 bytes of a
16-bit format, 4 bytes of an 8-bit one. Eight elements would make the accesses to narrow formats
wider, but Triton stores at most 16 contiguous bytes per thread, so float32 values would have to
change their layout through shared memory. Four elements leave enough registers for a high
occupancy, which hides the latency.

Only `triton_launch` imports this module, and only if Triton is usable.
"""

import torch
import triton
import triton.language as tl

from belief_dist.kernels.triton_formats import (
    _BLOCK,
    VERSION,
    _bits,
    _decode_m,
    _decode_s,
    _divide,
    _encode_m,
    _encode_s,
    _join_master,
    _narrow,
    _noise,
    _root,
    _split_master,
    _spread,
    _upper_half,
    _widen,
)
from belief_dist.operands import WATCHED

__all__ = ["CHUNK_TILES", "DTYPES", "THREADS", "TILE", "VERSION", "update_flat", "update_many"]

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
    torch.int8: tl.int8,
}
TILE = 1024  # elements per program
THREADS = TILE // 4
CHUNK_TILES = 8  # consecutive tiles that share an entry in the map of `update_many`

# Positions in what is watched.
_MASTER = tl.constexpr(0)
_M = tl.constexpr(1)
_S = tl.constexpr(2)
_MAX = tl.constexpr(3)
_EMA = tl.constexpr(4)
_WATCHED = tl.constexpr(WATCHED)


# - Memory; `count` elements of a tile exist


@triton.jit
def _load(pointer, count, SIZE: tl.constexpr, MASKED: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    if MASKED:
        return tl.load(pointer + lanes, mask=lanes < count, other=0)
    else:
        return tl.load(pointer + lanes)


@triton.jit
def _store(pointer, value, count, SIZE: tl.constexpr, MASKED: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    value = value.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + lanes, value, mask=lanes < count)
    else:
        tl.store(pointer + lanes, value)


# - Sums of words, for `state_formats.word_sums`


@triton.jit
def _word_sum(x, count, SIZE: tl.constexpr):
    """Return the sum of what of `x` exists, as it is stored: uint32."""
    if x.dtype.primitive_bitwidth == 64:
        both = x.to(tl.uint64, bitcast=True)
        words = both.to(tl.uint32) + (both >> 32).to(tl.uint32)
    elif x.dtype.primitive_bitwidth == 32:
        words = x.to(tl.uint32, bitcast=True)
    elif x.dtype.primitive_bitwidth == 16:
        words = x.to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        words = x.to(tl.uint8, bitcast=True).to(tl.uint32)
    return tl.sum(tl.where(tl.arange(0, SIZE) < count, words, 0), axis=0)


@triton.jit
def _add_words(sums, position: tl.constexpr, x, count, SIZE: tl.constexpr):
    if sums is not None:
        words = _word_sum(x, count, SIZE)
        tl.atomic_add(sums + position, words.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _load_state(
    pointer, exponent, count, sums, position: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    stored = _load(pointer, count, TILE, MASKED)
    _add_words(sums, position, stored, count, TILE)
    if exponent is None:
        compute: tl.constexpr = tl.float64 if stored.dtype == tl.float64 else tl.float32
        return _widen(stored, compute)
    else:
        blocks: tl.constexpr = TILE // _BLOCK
        existing = (count + _BLOCK - 1) // _BLOCK
        per_block = _load(exponent, existing, blocks, MASKED)
        _add_words(sums, position, per_block, existing, blocks)
        each = _spread(per_block.to(tl.int32), TILE)
        if position == _M:
            return _decode_m(stored.to(tl.int32), each)
        else:
            return _decode_s(stored.to(tl.int32), each)


@triton.jit
def _store_state(
    pointer, exponent, value, noise16, count, sums, position: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    if exponent is not None:
        if position == _M:
            code, per_block = _encode_m(value, noise16.to(tl.int32), count, TILE)
        else:
            code, per_block = _encode_s(value, noise16.to(tl.int32), count, TILE)
        blocks: tl.constexpr = TILE // _BLOCK
        existing = (count + _BLOCK - 1) // _BLOCK
        _store_watched(exponent, per_block, existing, sums, position, blocks, MASKED)
        _store_watched(pointer, code, count, sums, position, TILE, MASKED)
    elif pointer.dtype.element_ty == tl.bfloat16:
        rounded = _upper_half(_bits(value) + noise16)
        _store_watched(pointer, rounded, count, sums, position, TILE, MASKED)
    else:
        _store_watched(pointer, value, count, sums, position, TILE, MASKED)


@triton.jit
def _store_watched(
    pointer, value, count, sums, position: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr
):
    value = value.to(pointer.dtype.element_ty)
    _store(pointer, value, count, SIZE, MASKED)
    _add_words(sums, position, value, count, SIZE)


# - The update


@triton.jit
def _update_tile(
    operands, count, index, key, scalars, sums, COUPLED: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Decode, apply `rule.update_reference_` operation by operation, encode."""
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, param_out, remainder, ema = operands[0:8]
    m_exponent, s_exponent, max_exponent = operands[8:11]
    weight1, beta2, weight2, eps, decay, coupled_decay, step_size, denom_scale = scalars[0:8]
    direction, grad_scale, step, ema_weight = scalars[8:12]

    written = None if sums is None else sums + _WATCHED

    m = _load_state(exp_avg, m_exponent, count, sums, _M, TILE, MASKED)
    s = _load_state(exp_avg_sq, s_exponent, count, sums, _S, TILE, MASKED)
    g = _widen(_load(grad, count, TILE, MASKED), m.dtype) * grad_scale
    stored = _load(param, count, TILE, MASKED)
    if remainder is not None:
        rest = _load(remainder, count, TILE, MASKED)
        _add_words(sums, _MASTER, rest, count, TILE)
        p = _join_master(_widen(stored, tl.float32), rest)
    else:
        _add_words(sums, _MASTER, stored, count, TILE)
        p = _widen(stored, m.dtype)
    if COUPLED:  # here, or where other scalars hold
        g = tl.where(coupled_decay != 0.0, g + p * coupled_decay, g)

    m += (g - m) * weight1
    surprise = g - m
    s = s * beta2 + surprise * weight2 * surprise + eps

    second = s
    if max_exp_avg_sq is not None:  # as torch.maximum: NaN wins on either side
        before = _load_state(max_exp_avg_sq, max_exponent, count, sums, _MAX, TILE, MASKED)
        second = tl.where((before > s) | (before != before), before, s)

    # With a direction known only on the device, a division by one leaves m as it is.
    if m.dtype == tl.float64:
        denom = tl.sqrt(second) * denom_scale + eps
        change = m / tl.where(direction == 0, denom, 1.0) * step_size
    else:
        denom = _root(second) * denom_scale + eps
        change = _divide(m, tl.where(direction == 0, denom, 1.0)) * step_size
    p = p * decay - tl.where(direction == 2, 0.0, change)

    # m comes where, with its form, the fewest registers are in use at once.
    random = _noise(index + tl.arange(0, TILE), key, step)
    if m_exponent is None:
        _store_state(exp_avg, m_exponent, m, random & 0xFFFF, count, written, _M, TILE, MASKED)
    _store_state(exp_avg_sq, s_exponent, s, random >> 16, count, written, _S, TILE, MASKED)
    if max_exp_avg_sq is not None:
        _store_state(
            max_exp_avg_sq, max_exponent, second, random >> 16, count, written, _MAX, TILE, MASKED
        )
    if remainder is not None:
        upper, rest = _split_master(p, random, remainder.dtype.element_ty)
        _store(param, upper, count, TILE, MASKED)
        _store_watched(remainder, rest, count, written, _MASTER, TILE, MASKED)
    else:
        rounded = _narrow(p, param.dtype.element_ty)
        _store_watched(param, rounded, count, written, _MASTER, TILE, MASKED)
    if m_exponent is not None:
        _store_state(exp_avg, m_exponent, m, random & 0xFFFF, count, written, _M, TILE, MASKED)
    if param_out is not None:
        _store(param_out, _narrow(p, param_out.dtype.element_ty), count, TILE, MASKED)

    if ema is not None:
        average = _load_state(ema, None, count, sums, _EMA, TILE, MASKED)
        average += (p - average) * ema_weight
        _store_state(ema, None, average, random & 0xFFFF, count, written, _EMA, TILE, MASKED)


@triton.jit
def _update(
    operands, numel, key, first, start, sums, skip_at, grad_scale_at, scalars_at, scalars,
    SLOTS: tl.constexpr, COUPLED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Update the tile that begins at element `start`, int64, of one segment."""
    if sums is not None:  # programs that add to the same numbers wait for each other
        sums += (tl.program_id(0) % SLOTS) * (2 * _WATCHED)
    compute: tl.constexpr = tl.float64 if operands[2].dtype.element_ty == tl.float64 else tl.float32
    weight1, beta2, weight2, eps, decay, coupled_decay, step_size, denom_scale = scalars[0:8]
    direction, grad_scale, step, ema_weight = scalars[8:12]
    if scalars_at is not None:  # in the order of rule.StepScalars
        weight1 = tl.load(scalars_at).to(compute)
        beta2 = tl.load(scalars_at + 1).to(compute)
        weight2 = tl.load(scalars_at + 2).to(compute)
        eps = tl.load(scalars_at + 3).to(compute)
        decay = tl.load(scalars_at + 4).to(compute)
        coupled_decay = tl.load(scalars_at + 5).to(compute)
        step_size = tl.load(scalars_at + 6).to(compute)
        denom_scale = tl.load(scalars_at + 7).to(compute)
        direction = tl.load(scalars_at + 8).to(tl.int32)
        grad_scale = grad_scale * tl.load(scalars_at + 9).to(compute)
        step = tl.load(scalars_at + 10).to(tl.int64)
        if operands[7] is not None:
            ema_weight = tl.load(scalars_at + 11).to(compute)
    if grad_scale_at is not None:  # what is multiplied is -1 or 1, so that one rounding remains
        grad_scale = grad_scale * tl.load(grad_scale_at).to(compute)
    if skip_at is not None:
        numel = tl.where(tl.load(skip_at) != 0, 0, numel)

    block = start // _BLOCK
    tile = (
        operands[0] + start,
        operands[1] + start,
        operands[2] + start,
        operands[3] + start,
        operands[4] if operands[4] is None else operands[4] + start,
        operands[5] if operands[5] is None else operands[5] + start,
        operands[6] if operands[6] is None else operands[6] + start,
        operands[7] if operands[7] is None else operands[7] + start,
        operands[8] if operands[8] is None else operands[8] + block,
        operands[9] if operands[9] is None else operands[9] + block,
        operands[10] if operands[10] is None else operands[10] + block,
    )
    known = (
        weight1, beta2, weight2, eps, decay, coupled_decay, step_size, denom_scale,
        direction, grad_scale, step, ema_weight,
    )  # fmt: skip
    # Full tiles without masks, so that loads and stores are vectorized for any segment length.
    if start + TILE <= numel:
        _update_tile(tile, TILE, first + start, key, known, sums, COUPLED, TILE, False)
    elif start < numel:
        count = (numel - start).to(tl.int32)
        _update_tile(tile, count, first + start, key, known, sums, COUPLED, TILE, True)


# Integers that Triton would compile another kernel for where they are 1 or multiples of 16.
_PLAIN = ["numel", "key", "first", "direction", "step"]


@triton.jit(do_not_specialize=_PLAIN)
def update_flat(
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, param_out, remainder, param_ema,
    exp_avg_exponent, exp_avg_sq_exponent, max_exp_avg_sq_exponent,  # as in Operands
    numel, key, first,
    sums,  # as in Operands
    skip_at,  # one number: if it is not zero, nothing is changed; or None
    grad_scale_at,  # one number that multiplies `grad_scale`; or None
    scalars_at,  # (12,) or (11,) float64, see DeviceScalars; or None, which leaves the following
    weight1, beta2, weight2, eps, decay, coupled_decay, step_size, denom_scale,
    direction, grad_scale, step, ema_weight,
    SLOTS: tl.constexpr,  # of `sums`
    COUPLED: tl.constexpr,  # whether coupled_decay is not zero
    TILE: tl.constexpr,
):  # fmt: skip
    """Update one segment."""
    start = tl.program_id(0).to(tl.int64) * TILE
    operands = (
        param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, param_out, remainder, param_ema,
        exp_avg_exponent, exp_avg_sq_exponent, max_exp_avg_sq_exponent,
    )  # fmt: skip
    scalars = (
        weight1, beta2, weight2, eps, decay, coupled_decay, step_size, denom_scale,
        direction, grad_scale, step, ema_weight,
    )  # fmt: skip
    _update(
        operands, numel.to(tl.int64), key, first, start, sums, skip_at, grad_scale_at, scalars_at,
        scalars, SLOTS, COUPLED, TILE,
    )  # fmt: skip


@triton.jit
def _pointer(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(address).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["direction", "step"])
def update_many(
    # (segments, 15) int64: addresses as in Operands but grad's, numel, key, first, sums, scalars
    segments,
    grads,  # (segments,) int64: addresses of gradients, which alone change from step to step
    chunks,  # (chunks,) int64: segment << 32 | number of the chunk in its segment
    skip_at, grad_scale_at, scalars_at,  # these and the scalars as for `update_flat`
    weight1, beta2, weight2, eps, decay, coupled_decay, step_size, denom_scale,
    direction, grad_scale, step, ema_weight,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,  # dtypes
    MAX: tl.constexpr, OUT: tl.constexpr, REMAINDER: tl.constexpr,  # dtypes or None
    EMA: tl.constexpr, EXPONENT: tl.constexpr, MAX_EXPONENT: tl.constexpr,  # likewise
    SLOTS: tl.constexpr,  # of each segment's sums, or None without
    ALIGNED: tl.constexpr,  # whether all addresses are multiples of 16
    COUPLED: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
    ROW: tl.constexpr,  # of `scalars_at` if each segment has a row of its own, else None
):  # fmt: skip
    """Update any number of segments of the same dtypes, with one program per tile of each chunk."""
    program = tl.program_id(0)
    entry = tl.load(chunks + program // CHUNK_TILES)
    start = ((entry & 0xFFFFFFFF) * CHUNK_TILES + program % CHUNK_TILES) * TILE
    row = segments + (entry >> 32) * 15
    if ROW is not None:
        scalars_at += tl.load(row + 14) * ROW
    operands = (
        _pointer(row, PARAM, ALIGNED),
        _pointer(grads + (entry >> 32), GRAD, ALIGNED),
        _pointer(row + 1, STATE, ALIGNED),
        _pointer(row + 2, STATE, ALIGNED),
        MAX if MAX is None else _pointer(row + 3, MAX, ALIGNED),
        OUT if OUT is None else _pointer(row + 4, OUT, ALIGNED),
        REMAINDER if REMAINDER is None else _pointer(row + 5, REMAINDER, ALIGNED),
        EMA if EMA is None else _pointer(row + 6, EMA, ALIGNED),
        EXPONENT if EXPONENT is None else _pointer(row + 7, EXPONENT, False),
        EXPONENT if EXPONENT is None else _pointer(row + 8, EXPONENT, False),
        MAX_EXPONENT if MAX_EXPONENT is None else _pointer(row + 9, MAX_EXPONENT, False),
    )
    scalars = (
        weight1, beta2, weight2, eps, decay, coupled_decay, step_size, denom_scale,
        direction, grad_scale, step, ema_weight,
    )  # fmt: skip
    sums = SLOTS if SLOTS is None else _pointer(row + 13, tl.int32, False)
    _update(
        operands, tl.load(row + 10), tl.load(row + 11), tl.load(row + 12), start, sums, skip_at,
        grad_scale_at, scalars_at, scalars, SLOTS, COUPLED, TILE,
    )  # fmt: skip

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The GPU update: a function for one tile of elements, and two kernels that call it.

`update_flat` takes the pointers of one tensor as arguments; `update_many` reads those of any number
of tensors from a table on the device. Both give the bits of
`state_formats.update_stored_reference_`: every floating-point operation is rounded on its own
(division and root to nearest; the launcher disables fused multiply-adds), and narrower formats are
encoded and decoded with integer operations. This includes bfloat16, because some devices lack
instructions for it, and Triton's interpreter rounds ties away from zero.

Each thread handles four consecutive elements: 16 bytes of float32 in one instruction, 8 bytes of a
16-bit format, 4 bytes of an 8-bit one. Eight elements would make the accesses to narrow formats
wider, but Triton stores at most 16 contiguous bytes per thread, so float32 values would have to
change their layout through shared memory. Four elements leave enough registers for a high
occupancy, which hides the latency.

Only `triton_launch` imports this module, and only if Triton is usable.
"""

import os

import torch
import triton
import triton.language as tl

from belief_dist.operands import WATCHED

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
}
TILE = 1024  # elements per program
THREADS = TILE // 4
CHUNK_TILES = 8  # consecutive tiles that share an entry in the map of `update_many`

_BLOCK = tl.constexpr(256)  # BLOCK of the 8-bit states
_NAN = tl.constexpr(0x7FC00000)
_M_BINADES = tl.constexpr(7)
_S_BINADES = tl.constexpr(31)
_M_ROOM = tl.constexpr((1 << 16) + (0xFFFF << 3))
_S_ROOM = tl.constexpr(0xFFFF << 4)
# Positions in what is watched.
_MASTER = tl.constexpr(0)
_M = tl.constexpr(1)
_S = tl.constexpr(2)
_MAX = tl.constexpr(3)
_WATCHED = tl.constexpr(WATCHED)

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# Before 3.6, Triton lets NVIDIA's library flush subnormal numbers: its division is div.rn.ftz.
_FLUSHES = tl.constexpr(
    VERSION < (3, 6)
    and torch.version.hip is None
    and os.environ.get("TRITON_INTERPRET", "0") != "1"
)


# - Bits of float32 numbers


@triton.jit
def _bits(x):
    return tl.where(x == x, x.to(tl.uint32, bitcast=True), _NAN)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _widen(x, compute: tl.constexpr):
    if x.dtype == tl.bfloat16:
        x = _float(x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    return x.to(compute)


@triton.jit
def _upper_half(bits):
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """Round to nearest even; float64 values go through float32 first, as in torch."""
    if dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    if dtype == tl.bfloat16:
        bits = _bits(x)
        return _upper_half(bits + 0x7FFF + (bits >> 16 & 1))
    else:
        return x.to(dtype)


# - Division and root of float32 numbers, rounded to nearest


@triton.jit
def _divide(x, y):
    if _FLUSHES:
        return tl.inline_asm_elementwise(
            "div.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.div_rn(x, y)


@triton.jit
def _root(x):
    if _FLUSHES:
        return tl.inline_asm_elementwise(
            "sqrt.rn.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.sqrt_rn(x)


# - Noise


@triton.jit
def _lowbias32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _noise(index, key, step):
    """Return `state_formats.noise` of the elements with (int64) indices `index`."""
    step_key = _lowbias32(key.to(tl.uint32) ^ _lowbias32(step.to(tl.uint32)))
    high = (index >> 32).to(tl.uint32)
    return _lowbias32(index.to(tl.uint32) + high * 0x9E3779B9 + step_key)


# - 8 bits


@triton.jit
def _spread(per_block, TILE: tl.constexpr):
    blocks: tl.constexpr = TILE // _BLOCK
    return tl.reshape(tl.broadcast_to(per_block[:, None], [blocks, _BLOCK]), [TILE])


@triton.jit
def _largest_exponent(bits, room, TILE: tl.constexpr):
    blocks: tl.constexpr = TILE // _BLOCK
    return tl.max(tl.reshape(bits, [blocks, _BLOCK]), axis=1) + room >> 23


@triton.jit
def _encode_m(m, noise16, count, TILE: tl.constexpr):
    bits = _bits(m)
    magnitude = (bits & 0x7FFFFFFF).to(tl.int32)
    counted = tl.where(tl.arange(0, TILE) < count, magnitude, 0)
    exponent = tl.maximum(_largest_exponent(counted, _M_ROOM, TILE) - _M_BINADES, 1)
    each = _spread(exponent, TILE)
    moved = _bits(_float(magnitude) + _float(each << 23)).to(tl.int32)
    code = (moved + (noise16 << 3) >> 19) - (each << 4)
    return (bits >> 31 << 7).to(tl.int32) | code, exponent


@triton.jit
def _decode_m(code, each):
    magnitude = _float((code & 127) + (each << 4) << 19) - _float(each << 23)
    return _float(_bits(magnitude) | (code >> 7 << 31).to(tl.uint32))


@triton.jit
def _encode_s(s, noise16, count, TILE: tl.constexpr):
    bits = _bits(s).to(tl.int32)
    counted = tl.where(tl.arange(0, TILE) < count, bits, 0)
    exponent = tl.maximum(_largest_exponent(counted, _S_ROOM, TILE) - _S_BINADES, 0)
    code = (bits + (noise16 << 4) >> 20) - (_spread(exponent, TILE) << 3)
    return tl.maximum(code, 0), exponent


@triton.jit
def _decode_s(code, each):
    return _float(code + (each << 3) << 20)


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
        words = x.to(tl.uint32)
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
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, param_out, remainder = operands[0:7]
    m_exponent, s_exponent, max_exponent = operands[7:10]
    weight1, beta2, weight2, eps, decay, coupled_decay, step_size, denom_scale = scalars[0:8]
    direction, grad_scale, step = scalars[8:11]

    written = None if sums is None else sums + _WATCHED

    m = _load_state(exp_avg, m_exponent, count, sums, _M, TILE, MASKED)
    s = _load_state(exp_avg_sq, s_exponent, count, sums, _S, TILE, MASKED)
    g = _widen(_load(grad, count, TILE, MASKED), m.dtype) * grad_scale
    stored = _load(param, count, TILE, MASKED)
    if remainder is not None:
        upper = _widen(stored, tl.float32)
        lower_half = _load(remainder, count, TILE, MASKED)
        _add_words(sums, _MASTER, lower_half, count, TILE)
        lower = lower_half.to(tl.int32).to(tl.uint32, bitcast=True)
        joined = _float(upper.to(tl.uint32, bitcast=True) + lower)
        p = tl.where(joined == joined, joined, upper)
    else:
        _add_words(sums, _MASTER, stored, count, TILE)
        p = _widen(stored, m.dtype)
    if COUPLED:
        g += p * coupled_decay

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

    if remainder is not None:
        bits = _bits(p)
        _store(param, _upper_half(bits + 0x8000), count, TILE, MASKED)
        lower_half = bits.to(tl.uint16).to(tl.int16, bitcast=True)
        _store_watched(remainder, lower_half, count, written, _MASTER, TILE, MASKED)
    else:
        rounded = _narrow(p, param.dtype.element_ty)
        _store_watched(param, rounded, count, written, _MASTER, TILE, MASKED)
    if param_out is not None:
        _store(param_out, _narrow(p, param_out.dtype.element_ty), count, TILE, MASKED)

    random = _noise(index + tl.arange(0, TILE), key, step)
    _store_state(exp_avg, m_exponent, m, random & 0xFFFF, count, written, _M, TILE, MASKED)
    _store_state(exp_avg_sq, s_exponent, s, random >> 16, count, written, _S, TILE, MASKED)
    if max_exp_avg_sq is not None:
        _store_state(
            max_exp_avg_sq, max_exponent, second, random >> 16, count, written, _MAX, TILE, MASKED
        )


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
    direction, grad_scale, step = scalars[8:11]
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
        operands[7] if operands[7] is None else operands[7] + block,
        operands[8] if operands[8] is None else operands[8] + block,
        operands[9] if operands[9] is None else operands[9] + block,
    )
    known = (
        weight1, beta2, weight2, eps, decay, coupled_decay, step_size, denom_scale,
        direction, grad_scale, step,
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
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, param_out, remainder,
    exp_avg_exponent, exp_avg_sq_exponent, max_exp_avg_sq_exponent,  # as in Operands
    numel, key, first,
    sums,  # as in Operands
    skip_at,  # one number: if it is not zero, nothing is changed; or None
    grad_scale_at,  # one number that multiplies `grad_scale`; or None
    scalars_at,  # (11,) float64, rule.StepScalars; or None, which leaves the following
    weight1, beta2, weight2, eps, decay, coupled_decay, step_size, denom_scale,
    direction, grad_scale, step,
    SLOTS: tl.constexpr,  # of `sums`
    COUPLED: tl.constexpr,  # whether coupled_decay is not zero
    TILE: tl.constexpr,
):  # fmt: skip
    """Update one segment."""
    start = tl.program_id(0).to(tl.int64) * TILE
    operands = (
        param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, param_out, remainder,
        exp_avg_exponent, exp_avg_sq_exponent, max_exp_avg_sq_exponent,
    )  # fmt: skip
    scalars = (
        weight1, beta2, weight2, eps, decay, coupled_decay, step_size, denom_scale,
        direction, grad_scale, step,
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
    segments,  # (segments, 13) int64: addresses as in Operands but grad's, numel, key, first, sums
    grads,  # (segments,) int64: addresses of gradients, which alone change from step to step
    chunks,  # (chunks,) int64: segment << 32 | number of the chunk in its segment
    skip_at, grad_scale_at, scalars_at,  # these and the scalars as for `update_flat`
    weight1, beta2, weight2, eps, decay, coupled_decay, step_size, denom_scale,
    direction, grad_scale, step,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,  # dtypes
    MAX: tl.constexpr, OUT: tl.constexpr, REMAINDER: tl.constexpr,  # dtypes or None
    EXPONENT: tl.constexpr, MAX_EXPONENT: tl.constexpr,  # likewise
    SLOTS: tl.constexpr,  # of each segment's sums, or None without
    ALIGNED: tl.constexpr,  # whether all addresses are multiples of 16
    COUPLED: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
):  # fmt: skip
    """Update any number of segments of the same dtypes, with one program per tile of each chunk."""
    program = tl.program_id(0)
    entry = tl.load(chunks + program // CHUNK_TILES)
    start = ((entry & 0xFFFFFFFF) * CHUNK_TILES + program % CHUNK_TILES) * TILE
    row = segments + (entry >> 32) * 13
    operands = (
        _pointer(row, PARAM, ALIGNED),
        _pointer(grads + (entry >> 32), GRAD, ALIGNED),
        _pointer(row + 1, STATE, ALIGNED),
        _pointer(row + 2, STATE, ALIGNED),
        MAX if MAX is None else _pointer(row + 3, MAX, ALIGNED),
        OUT if OUT is None else _pointer(row + 4, OUT, ALIGNED),
        REMAINDER if REMAINDER is None else _pointer(row + 5, REMAINDER, ALIGNED),
        EXPONENT if EXPONENT is None else _pointer(row + 6, EXPONENT, False),
        EXPONENT if EXPONENT is None else _pointer(row + 7, EXPONENT, False),
        MAX_EXPONENT if MAX_EXPONENT is None else _pointer(row + 8, MAX_EXPONENT, False),
    )
    scalars = (
        weight1, beta2, weight2, eps, decay, coupled_decay, step_size, denom_scale,
        direction, grad_scale, step,
    )  # fmt: skip
    sums = SLOTS if SLOTS is None else _pointer(row + 12, tl.int32, False)
    _update(
        operands, tl.load(row + 9), tl.load(row + 10), tl.load(row + 11), start, sums, skip_at,
        grad_scale_at, scalars_at, scalars, SLOTS, COUPLED, TILE,
    )  # fmt: skip

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The number formats of `state_formats` on a GPU, bit for bit: functions that the kernels call.

Narrow formats are encoded and decoded with integer operations. This includes bfloat16, because some
devices lack instructions for it, and Triton's interpreter rounds ties away from zero.

Only the kernels' modules import this one, and only if Triton is usable.
"""

import os

import torch
import triton
import triton.language as tl

_BLOCK = tl.constexpr(256)  # BLOCK of the 8-bit states
_NAN = tl.constexpr(0x7FC00000)
_M_BINADES = tl.constexpr(7)
_S_BINADES = tl.constexpr(31)
_M_ROOM = tl.constexpr((1 << 16) + (0xFFFF << 3))
_S_ROOM = tl.constexpr(0xFFFF << 4)

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


# - Masters in two parts


@triton.jit
def _join_master(upper, remainder):
    """Return the master, float32, from its upper half, widened, and what is left of it."""
    lower = remainder.to(tl.int32)
    if remainder.dtype == tl.int8:
        lower = lower << 8
    joined = _float(upper.to(tl.uint32, bitcast=True) + lower.to(tl.uint32, bitcast=True))
    return tl.where(joined == joined, joined, upper)


@triton.jit
def _split_master(master, random, dtype: tl.constexpr):
    """Return the upper half of a master, rounded, and the remainder of this dtype."""
    bits = _bits(master)
    if dtype == tl.int8:  # the noise that is `state_formats.master_noise` of `random`
        bits += (random ^ (random >> 15)) * 0x846CA68B >> 24
        remainder = (bits >> 8).to(tl.uint8).to(tl.int8, bitcast=True)
    else:
        remainder = bits.to(tl.uint16).to(tl.int16, bitcast=True)
    return _upper_half(bits + 0x8000), remainder


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

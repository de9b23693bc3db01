# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Gradients in 8 bits with error feedback, on a GPU: the bits of `eager.encode_int8_`.

Only `triton_launch` imports this module, and only if Triton is usable.
"""

import triton
import triton.language as tl

from belief_dist.kernels.eager import CODE_BLOCK, CODE_BYTES
from belief_dist.kernels.triton_formats import _bits, _divide, _float, _narrow, _widen

ROWS = 8  # blocks per program: with as many warps on NVIDIA's GPUs, one warp reads each

_BLOCK = tl.constexpr(CODE_BLOCK)
_BLOCK_BYTES = tl.constexpr(CODE_BYTES)  # four of the scale, then the codes
_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves no room for a fraction


@triton.jit
def encode_int8(wire, values, error, blocks, ROWS: tl.constexpr):
    """Encode this many blocks of `values` plus `error` to `wire`; see `eager.encode_int8_`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, _BLOCK)
    present = row < blocks
    element = row[:, None] * _BLOCK + lane[None, :]
    mask = present[:, None] & (lane[None, :] < _BLOCK)
    exact = _widen(tl.load(values + element, mask=mask, other=0.0), tl.float32)
    exact += _widen(tl.load(error + element, mask=mask, other=0.0), tl.float32)

    # As integers, so that what is not a number is larger than all that are.
    largest = tl.max((_bits(exact) & 0x7FFFFFFF).to(tl.int32), axis=1)
    scale = _divide(_float(largest), tl.full([ROWS], 127.0, tl.float32))
    each = tl.broadcast_to(scale[:, None], [ROWS, _BLOCK])
    quotient = _divide(exact, each)
    code = quotient + _TO_INTEGER - _TO_INTEGER  # rounded to nearest even
    # The sign of a zero is that of the quotient, and decides that of a zero error.
    code = _float(_bits(code) | _bits(quotient) & 0x80000000)
    code = tl.where(code > 127.0, 127.0, tl.where(code < -127.0, -127.0, code))
    code = tl.where(each == 0.0, 0.0, code)
    finite = (largest < 0x7F800000)[:, None] & (lane[None, :] < _BLOCK)
    code = tl.where(finite, code, 1.0)

    byte = row * _BLOCK_BYTES
    scale_at = (wire + byte).to(tl.pointer_type(tl.uint32))
    tl.store(scale_at, _bits(scale), mask=present)
    codes = (code.to(tl.int32) & 0xFF).to(tl.uint8)
    tl.store(wire + byte[:, None] + 4 + lane[None, :], codes, mask=mask)
    lost = _narrow(exact - code * each, error.dtype.element_ty)
    tl.store(error + element, lost, mask=mask)

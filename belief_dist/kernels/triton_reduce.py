# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""GPU kernels that read gradients and parameters once: ordered sums, exact squares, checksums.

`reduce` adds what all ranks have sent, in their order, or what lies in their memory, and splits the
squares of the sums over the bins of `norm`, in one pass. A program takes every n-th tile, and keeps
three bins in registers: from the highest that a square has come to so far down, as lower ones are
never read. A square that comes higher moves them, which happens a few times at most. Integers add
in any order, so the bins of all programs meet in atomic additions.

Splitting is that of `norm`, digit by digit: adding 1.5 * 2**52 units rounds a number to a multiple
of the unit, and leaves the multiple in the lowest bits of the sum, where integers add it up.

Only `triton_reduce_launch` imports this module, and only if Triton is usable.
"""

import triton
import triton.language as tl

from belief_dist.kernels.eager import CODE_BLOCK, CODE_BYTES
from belief_dist.kernels.triton_formats import _widen
from belief_dist.norm import HIGH_BIN, LOW_BIN, NUM_BINS

_LOW = tl.constexpr(LOW_BIN)
_HIGH = tl.constexpr(HIGH_BIN)
_NONFINITE = tl.constexpr(2 * NUM_BINS)  # the word that counts them
_CODE_BLOCK = tl.constexpr(CODE_BLOCK)
_CODE_BYTES = tl.constexpr(CODE_BYTES)


# - Squares


@triton.jit
def _rounder_bits(index):
    """Return the bits of 1.5 * 2**52 units of a bin, a float64."""
    return (index.to(tl.int64) * 32 + (52 + 1023) << 52) | (1 << 51)


@triton.jit
def _magnitude(x):
    """Return |x| as an integer of the same order; NaN lies above infinity."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _highest_bin(largest, WIDE: tl.constexpr):
    """Return the bin to which the square of a number with this magnitude rounds up at most."""
    if WIDE:
        x = largest.to(tl.float64, bitcast=True)
    else:
        x = largest.to(tl.float32, bitcast=True).to(tl.float64)
    square = (x * x).to(tl.int64, bitcast=True)
    top = tl.minimum(tl.maximum((square >> 52) - 1023 >> 5, _LOW), _HIGH)
    half = (top * 32 + (31 + 1023)) << 52  # of the unit above
    return tl.where(square > half, top + 1, top).to(tl.int32)


@triton.jit
def _flush(bins, top, sum0, sum1, sum2, count):
    """Add `count` digits of each of three bins from `top` down, as their sums hold them."""
    index1 = tl.maximum(top - 1, _LOW)
    index2 = tl.maximum(top - 2, _LOW)
    digit0 = tl.sum(sum0, axis=0) - count * _rounder_bits(top)
    digit1 = tl.sum(sum1, axis=0) - count * _rounder_bits(index1)
    digit2 = tl.sum(sum2, axis=0) - count * _rounder_bits(index2)
    _add_digit(bins, top, digit0)
    _add_digit(bins, index1, digit1)
    _add_digit(bins, index2, digit2)


@triton.jit
def _add_digit(bins, index, digit):
    if digit != 0:
        word = bins + 2 * (index - _LOW)
        tl.atomic_add(word, digit & 0xFFFFFFFF, sem="relaxed")
        tl.atomic_add(word + 1, digit >> 32, sem="relaxed")


@triton.jit
def _split(
    total, bins, top, held, sum0, sum1, sum2, WIDE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Add the squares of a tile to three bins from `top` down, which moves up if it must.

    Returns:
        What the next tile goes on with: the highest bin, how many squares the sums hold, the sums.
    """
    too_large: tl.constexpr = (1023 + 144) << 52 if WIDE else 0x7F800000
    size = _magnitude(total)
    largest = tl.max(size, axis=0)
    if largest >= too_large:
        counted = size < too_large
        tl.atomic_add(bins + _NONFINITE, TILE - tl.sum(counted.to(tl.int64), axis=0), sem="relaxed")
        total = tl.where(counted, total, 0.0)
        largest = tl.max(_magnitude(total), axis=0)
    highest = _highest_bin(largest, WIDE)
    if highest > top:
        _flush(bins, top, sum0, sum1, sum2, held)
        top = highest
        held = tl.full((), 0, tl.int64)
        sum0 = tl.zeros([TILE], tl.int64)
        sum1 = tl.zeros([TILE], tl.int64)
        sum2 = tl.zeros([TILE], tl.int64)
    rounder0 = _rounder_bits(top).to(tl.float64, bitcast=True)
    rounder1 = _rounder_bits(tl.maximum(top - 1, _LOW)).to(tl.float64, bitcast=True)
    rounder2 = _rounder_bits(tl.maximum(top - 2, _LOW)).to(tl.float64, bitcast=True)
    rest = total.to(tl.float64)
    rest = rest * rest
    moved = rest + rounder0
    sum0 += moved.to(tl.int64, bitcast=True)
    rest -= moved - rounder0
    moved = rest + rounder1
    sum1 += moved.to(tl.int64, bitcast=True)
    rest -= moved - rounder1
    moved = rest + rounder2
    sum2 += moved.to(tl.int64, bitcast=True)
    return top, held + TILE, sum0, sum1, sum2


@triton.jit
def squares(
    segments,  # (segments, 2), int64: address, elements
    chunks,  # (num_chunks,), int64: segment << 32 | number of the chunk in its segment
    bins,  # (norm.NUM_WORDS,), int64
    num_chunks,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
):
    """Add the squares of any number of buffers of one dtype to the bins."""
    compute: tl.constexpr = tl.float64 if WIDE else tl.float32
    top = tl.full((), _LOW, tl.int32)
    held = tl.full((), 0, tl.int64)
    sum0 = tl.zeros([TILE], tl.int64)
    sum1 = tl.zeros([TILE], tl.int64)
    sum2 = tl.zeros([TILE], tl.int64)
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        entry = tl.load(chunks + chunk)
        row = segments + (entry >> 32) * 2
        values = tl.multiple_of(tl.load(row).to(tl.pointer_type(DTYPE)), 16)
        # Buckets are multiples of 128 bytes, and masks are equal for all elements of an access.
        numel = tl.multiple_of(tl.load(row + 1), 16)
        for tile in range(CHUNK_TILES):
            offset = ((entry & 0xFFFFFFFF) * CHUNK_TILES + tile) * TILE + tl.arange(0, TILE)
            x = _widen(tl.load(values + offset, mask=offset < numel, other=0.0), compute)
            top, held, sum0, sum1, sum2 = _split(x, bins, top, held, sum0, sum1, sum2, WIDE, TILE)
    _flush(bins, top, sum0, sum1, sum2, held)


# - Sums in rank order


@triton.jit
def _load_piece(pieces, start, numel, CODES: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr):
    """Return elements of a message from `start` on, decoded."""
    offset = start + tl.arange(0, TILE)
    if CODES:
        # A thread has four elements, and so one scale.
        quad = start + 4 * tl.arange(0, TILE // 4)
        scales = pieces.to(tl.pointer_type(tl.float32), bitcast=True)
        words = quad // _CODE_BLOCK * (_CODE_BYTES // 4)
        scale = tl.load(scales + words, mask=quad < numel, other=0.0)
        scale = tl.reshape(tl.broadcast_to(scale[:, None], [TILE // 4, 4]), [TILE])
        codes = pieces.to(tl.pointer_type(tl.int8), bitcast=True) + 4
        place = offset // _CODE_BLOCK * _CODE_BYTES + offset % _CODE_BLOCK
        code = tl.load(codes + place, mask=offset < numel, other=0)
        return code.to(tl.float32) * scale
    else:
        compute: tl.constexpr = tl.float64 if WIDE else tl.float32
        return _widen(tl.load(pieces + offset, mask=offset < numel, other=0.0), compute)


@triton.jit
def _piece(pieces, addresses, rank, distance, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return where a message begins: at a distance from the first, or at an address of its own."""
    if addresses is None:
        piece = pieces + rank * distance
    else:
        piece = tl.load(addresses + rank).to(tl.pointer_type(DTYPE))
        piece = tl.multiple_of(piece, ALIGNED)
    return piece


@triton.jit
def reduce(
    out,  # (numel,), float32 or float64: receives the sums; None leaves them out
    pieces,  # the first message; the others follow at a distance of `stride` of its elements
    addresses,  # (num_pieces,), int64: where each message begins instead, or None
    bins,  # (norm.NUM_WORDS,), int64: receives the squares; None leaves them out
    numel,
    stride,
    num_pieces,
    DTYPE: tl.constexpr,  # of messages at addresses
    ALIGNED: tl.constexpr,  # bytes of which all addresses are multiples
    PIECES: tl.constexpr,  # num_pieces where loads of all of them shall be on the way, or 0
    ACCUMULATE: tl.constexpr,  # start from what is in `out`
    CODES: tl.constexpr,  # messages are blocks of 8-bit codes with a scale
    WIDE: tl.constexpr,  # compute in float64
    TILE: tl.constexpr,
):
    """Add messages in their order, and the squares of the sums to the bins."""
    program = tl.program_id(0)
    tiles = tl.cdiv(numel, TILE)
    top = tl.full((), _LOW, tl.int32)
    zero = tl.full((), 0, tl.int64)
    distance = zero + stride
    held = zero
    sum0 = tl.zeros([TILE], tl.int64)
    sum1 = tl.zeros([TILE], tl.int64)
    sum2 = tl.zeros([TILE], tl.int64)
    for tile in range(program, tiles, tl.num_programs(0)):
        start = (zero + tile) * TILE
        offset = start + tl.arange(0, TILE)
        present = offset < numel
        piece = _piece(pieces, addresses, 0, distance, DTYPE, ALIGNED)
        if ACCUMULATE:
            total = tl.load(out + offset, mask=present, other=0.0)
            total += _load_piece(piece, start, numel, CODES, WIDE, TILE)
        else:
            total = _load_piece(piece, start, numel, CODES, WIDE, TILE)
        if PIECES:
            for rank in tl.static_range(1, PIECES):
                piece = _piece(pieces, addresses, rank, distance, DTYPE, ALIGNED)
                total += _load_piece(piece, start, numel, CODES, WIDE, TILE)
        else:
            for rank in range(1, num_pieces):
                piece = _piece(pieces, addresses, rank, distance, DTYPE, ALIGNED)
                total += _load_piece(piece, start, numel, CODES, WIDE, TILE)
        if out is not None:
            tl.store(out + offset, total, mask=present)
        if bins is not None:
            top, held, sum0, sum1, sum2 = _split(
                total, bins, top, held, sum0, sum1, sum2, WIDE, TILE
            )
    if bins is not None:
        _flush(bins, top, sum0, sum1, sum2, held)


# - Checksums


@triton.jit
def _chunk_checksum(
    words, start, count, first, MASKED: tl.constexpr, TILE: tl.constexpr, CHUNK_TILES: tl.constexpr
):
    total = tl.zeros([TILE], tl.int64)
    for tile in range(CHUNK_TILES):
        index = start + tile * TILE + tl.arange(0, TILE)
        if MASKED:
            word = tl.load(words + index, mask=index < count, other=0)
        else:
            word = tl.load(words + index)
        place = (index + first).to(tl.uint32)
        low = word.to(tl.uint32) + place * 0x9E3779B1 + 0x7FEB352D
        high = (word >> 32).to(tl.uint32) + place * 0x85EBCA77 + 0x846CA68B
        product = (low.to(tl.uint64) * high.to(tl.uint64)).to(tl.int64, bitcast=True)
        if MASKED:
            product = tl.where(index < count, product, 0)
        total += product
    return tl.sum(total, axis=0)


@triton.jit
def checksums(
    segments,  # (segments, 3), int64: address, words of 8 bytes, position of the first word
    chunks,  # (chunks,), int64: segment << 32 | number of the chunk in its segment
    sums,  # (segments,), int64
    TILE: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
):
    """Add `eager.checksum` of each segment to its sum."""
    entry = tl.load(chunks + tl.program_id(0))
    row = segments + (entry >> 32) * 3
    words = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.int64)), 16)
    count, first = tl.load(row + 1), tl.load(row + 2)
    start = (entry & 0xFFFFFFFF) * (CHUNK_TILES * TILE)
    # Full chunks without masks, so that loads are vectorized.
    if start + CHUNK_TILES * TILE <= count:
        total = _chunk_checksum(words, start, count, first, False, TILE, CHUNK_TILES)
    else:
        total = _chunk_checksum(words, start, count, first, True, TILE, CHUNK_TILES)
    # Integers wrap around: no order matters.
    tl.atomic_add(sums + (entry >> 32), total, sem="relaxed")

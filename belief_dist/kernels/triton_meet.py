# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The GPU kernel by which ranks wait for each other: numbers in memory that all have mapped.

Every rank has a *pad*: lines of one number of its own, how often it has come there, and a slot for
each rank, which that rank writes its number to. Numbers only grow, so that a slot that is as high
as the own number tells that its rank has come, too; and they are kept on the device, so that a CUDA
graph may replay the kernel.

What a rank has written before it came is seen by all that have waited for it: the number is
released to the whole system, and acquired from it. A slot has one writer, so that a store and a
load are enough: links between GPUs need not have atomic operations.

`add_words` adds up a small message of all ranks between two meetings.

Only `triton_meet_launch` imports this module, and only if Triton is usable.
"""

import triton
import triton.language as tl

_STORE = tl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.release.sys.global.u64 [$1], $2; mov.u64 $0, $2; }"
)


@triton.jit
def _now(PTX: tl.constexpr, polls):
    """Return nanoseconds, or without a clock how often it was looked."""
    if PTX:
        return tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )
    else:
        return polls


@triton.jit
def _post(places, numbers, present, PTX: tl.constexpr):
    """Release numbers to whoever reads the places."""
    if PTX:
        tl.inline_asm_elementwise(
            _STORE,
            "=l,l,l,r",
            [places.to(tl.int64), numbers, present.to(tl.int32)],
            dtype=tl.int64,
            is_pure=False,
            pack=1,
        )
    else:
        tl.atomic_xchg(places, numbers, mask=present, sem="release", scope="sys")


@triton.jit
def _look(places, present, PTX: tl.constexpr):
    """Acquire the numbers that are in places."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.acquire.sys.global.u64 $0, [$1];",
            "=l,l",
            [places.to(tl.int64)],
            dtype=tl.int64,
            is_pure=False,
            pack=1,
        )
    else:
        nothing = places.to(tl.int64) * 0
        return tl.atomic_add(places, nothing, mask=present, sem="acquire", scope="sys")


@triton.jit
def meet(
    pads,  # (world_size,), int64: addresses of the ranks' lines
    own,  # (1 + WIDTH,), int64: this rank's line
    late,  # (WIDTH,), int64, of the host: receives a 1 for each rank that did not come
    rank,
    world_size,
    limit,  # how long is waited, in units of `_now`
    PTX: tl.constexpr,  # the device is NVIDIA's
    WIDTH: tl.constexpr,  # slots of a line, a power of 2: no fewer than a warp has threads
    ASSERTS: tl.constexpr,  # a rank that did not come ends the work of the device
):
    """Tell all ranks that this one has come, and wait until all have; one program."""
    peer = tl.arange(0, WIDTH)
    is_rank = peer < world_size
    number = tl.load(own) + 1
    tl.store(own, number)
    slots = tl.load(pads + peer, mask=is_rank, other=0) + (1 + rank) * 8
    numbers = tl.zeros([WIDTH], tl.int64) + number
    _post(slots.to(tl.pointer_type(tl.int64)), numbers, is_rank, PTX)
    polls = number * 0
    start = _now(PTX, polls)
    seen = tl.zeros([WIDTH], tl.int64)
    missing = polls + 1
    while (missing > 0) & (_now(PTX, polls) - start < limit):
        seen = _look(own + 1 + peer, is_rank, PTX)
        missing = tl.sum(((seen < number) & is_rank).to(tl.int64), axis=0)
        polls += 1
    if missing > 0:
        _post(late + peer, numbers * 0 + 1, (seen < number) & is_rank, PTX)
        tl.debug_barrier()
    if ASSERTS:
        # Nothing that follows would be right.
        tl.device_assert(missing == 0, "belief_dist: a rank has not come in time")


@triton.jit
def add_words(
    out,  # (numel,), int64
    addresses,  # (num_pieces,), int64: where the ranks' words lie
    numel,
    num_pieces,
    TILE: tl.constexpr,
):
    """Add up the words of all ranks."""
    word = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.int64)
    for rank in range(num_pieces):
        piece = tl.load(addresses + rank).to(tl.pointer_type(tl.int64))
        total += tl.load(piece + word, mask=word < numel, other=0)
    tl.store(out + word, total, mask=word < numel)

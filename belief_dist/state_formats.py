"""What is stored between two steps, where that is less than float32: the definition of every bit.

The rule always computes on float32 numbers (`rule.update_reference_`). Before a step they are
*decoded* from what is stored, and after it *encoded* again. Which form a tensor has, its dtype
tells, so that nothing else need be passed around:

=================  =======================  =============================================
tensor             dtype                    meaning
=================  =======================  =============================================
exp_avg, *_sq      float32, float64         the numbers themselves
exp_avg, *_sq      bfloat16                 rounded stochastically
param_ema          as these, but no uint8   likewise, whatever form the others have
exp_avg, *_sq      uint8, with *_exponent   8 bits each, and 8 for each block of 256
param, remainder   bfloat16, int16          the upper and the lower half of a float32 master
param, remainder   bfloat16, int8           the upper 24 bits of one, rounded stochastically
=================  =======================  =============================================

**Stochastic rounding.** 0.999 s is nearer to s than to any other bfloat16 or 8-bit number: rounded
to nearest, s would never shrink. So every encoded number is rounded up with the probability that
keeps its expectation: uniform *noise* is added to the bits that are cut off. The noise is a hash of
(key of the parameter, step, element), and of nothing else: it is the same for any world size,
bucket layout, kernel and number of threads.

**8 bits.** A block is 256 consecutive elements of one parameter, the last one of a parameter being
shorter. Its largest number's exponent e (8 bits, biased, as float32 has it) fixes one exponent
that is stored for the block. If noise might round that number up to the next power of two, e is
that of the latter: otherwise what grows slowly would stop below it.

* s is non-negative and spans many decades, and only its root is used: its code has 5 bits of
  exponent, down to 2**-31 of the block's largest, and 3 of mantissa: spacing 1/16 to 1/8 of the
  number, half of that in the root. The smallest code is not zero (unless the block's largest is
  below 2**-95): what is smaller is raised to it, which makes a step shorter and never longer.
* m has a sign, 3 bits of exponent and 4 of mantissa. An offset of 2**-7 of the block's largest
  power of two is added to the absolute value first, so that spacing is relative (1/16 to 1/32) for
  large numbers and constant (2**-11 of it) around zero, as in the mu-law of telephony.

Both are cut out of the bits of float32 numbers, with integer operations (and for m one addition and
one subtraction that IEEE 754 defines), so that every kernel has the same bits by construction.

**Remainders.** bfloat16 is the upper half of float32. With M the master's bits, the parameter is
``(M + 0x8000) >> 16``, M to nearest with ties away from zero, and the remainder is the lower half
of M as a signed number: ``M = (param << 16) + remainder`` for every M but NaNs, which become one
NaN. (Ties to even would need one remainder more than 16 bits have.)

**Remainders of 8 bits.** Masters of 24 bits have 15 of mantissa, and a step often moves them by
less than half of what these tell apart: to nearest, they would stay for ever. So they are rounded
stochastically, too: with 8 bits of noise n, M becomes ``M24 = (M + n) & ~0xFF``. Parameter and
remainder follow from M24 as above, and as its lowest byte is zero, the remainder is stored without
it: ``M24 = (param << 16) + (remainder << 8)``. A master that a step does not change stays, whatever
the noise; so do zeros of either sign, infinities and the NaN. What is larger than the largest
number of 24 bits may become an infinity, as wherever noise rounds, and its parameter is one
already. Masters that do not come out of a step, such as those of a checkpoint, are rounded to
nearest, ties away from zero.

**Which noise rounds what.** Of the 32 bits of an element's noise the lower half rounds m and an
average of weights, and the upper half s and the largest s. All of them are taken then, and the next
step is computed from m, s and the master together: their errors must not be related. So the
master's 8 bits are the upper ones of one further round of the hash on all 32, whatever dtype states
have.

Sources: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861;
stochastic rounding of states: Zamirai et al., "Revisiting BFloat16 Training", arXiv:2010.06192;
hash: C. Wellons, hash-prospector, "lowbias32" (public domain).
"""

from __future__ import annotations

import torch
from torch import Tensor

from belief_dist.operands import BLOCK, WATCHED, Operands
from belief_dist.rule import StepScalars, update_reference_

_UINT32 = 0xFFFFFFFF
_NAN = 0x7FC00000
# With this as its noise, a master is rounded to nearest.
NEAREST8 = 1 << 7
# How far below a block's largest exponent the stored one lies.
_M_BINADES = 7
_S_BINADES = 31
# What is added at most to the bits of a block's largest number: noise, and to m the offset.
_M_ROOM = (1 << 16) + (0xFFFF << 3)
_S_ROOM = 0xFFFF << 4


def is_stochastic(dtype: torch.dtype) -> bool:
    """Return whether states, averages or remainders of this dtype are rounded stochastically."""
    return dtype in (torch.bfloat16, torch.uint8, torch.int8)


# - Noise


def _lowbias32(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _UINT32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _UINT32
    return x ^ (x >> 16)


def noise_key(seed: int, param: int) -> int:
    """Return the key, 32 bits, of parameter number `param`."""
    return _lowbias32(_lowbias32(seed & _UINT32) ^ (param & _UINT32))


def step_key(key: int, step: int) -> int:
    """Return the key, 32 bits, of a parameter's step."""
    return _lowbias32(key ^ _lowbias32(step & _UINT32))


def noise(key: int, step: int, first: int, numel: int, device: torch.device) -> Tensor:
    """Return (numel,), int64: 32 random bits for each element from number `first` on."""
    index = torch.arange(first, first + numel, dtype=torch.int64, device=device)
    # int64 wraps around where a product has more bits, which leaves the lowest 32 as they are.
    x = (index + (index >> 32) * 0x9E3779B9 + step_key(key, step)) & _UINT32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _UINT32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _UINT32
    return x ^ (x >> 16)


def master_noise(random: Tensor) -> Tensor:
    """Return 8 bits, (n,), int64, that round masters, from the `noise` of their elements."""
    return (((random ^ (random >> 15)) * 0x846CA68B) & _UINT32) >> 24


# - Bits of float32 numbers, as int64


def _bits(x: Tensor) -> Tensor:
    bits = x.contiguous().view(torch.int32).to(torch.int64) & _UINT32
    return torch.where(x.isnan(), _NAN, bits)


def _float(bits: Tensor) -> Tensor:
    signed = torch.where(bits > 0x7FFFFFFF, bits - (1 << 32), bits)
    return signed.to(torch.int32).view(torch.float32)


def round_to_bfloat16(x: Tensor, noise16: Tensor) -> Tensor:
    """Round float32 numbers stochastically.

    Args:
        x: (n,), float32.
        noise16: (n,), int64, in [0, 2**16).
    """
    return _float((_bits(x) + noise16) & 0xFFFF0000).to(torch.bfloat16)


# - 8 bits


def _blocks(x: Tensor) -> Tensor:
    """Return (blocks, 256), padded with zeros."""
    padding = -x.numel() % BLOCK
    return torch.nn.functional.pad(x, (0, padding)).view(-1, BLOCK)


def _largest_exponent(bits: Tensor, room: int) -> Tensor:
    """Return (blocks,): the exponent that the largest of the magnitudes `bits` may come to."""
    return (_blocks(bits).amax(1) + room) >> 23


def _spread(per_block: Tensor, numel: int) -> Tensor:
    return per_block.to(torch.int64).repeat_interleave(BLOCK)[:numel]


def encode_m(m: Tensor, noise16: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes (n,) and block exponents (ceil(n / 256),) of m, uint8 both.

    Args:
        m: (n,), float32.
        noise16: (n,), int64, in [0, 2**16).
    """
    bits = _bits(m)
    magnitude = bits & 0x7FFFFFFF
    exponent = (_largest_exponent(magnitude, _M_ROOM) - _M_BINADES).clamp(min=1)
    each = _spread(exponent, m.numel())
    moved = _bits(_float(magnitude) + _float(each << 23))
    code = ((moved + (noise16 << 3)) >> 19) - (each << 4)
    return ((bits >> 31 << 7) | code).to(torch.uint8), exponent.to(torch.uint8)


def decode_m(code: Tensor, exponent: Tensor) -> Tensor:
    """Return (n,), float32, from what `encode_m` has returned."""
    wide, each = code.to(torch.int64), _spread(exponent, code.numel())
    magnitude = _float(((wide & 127) + (each << 4)) << 19) - _float(each << 23)
    return _float(_bits(magnitude) | (wide >> 7 << 31))


def encode_s(s: Tensor, noise16: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes (n,) and block exponents (ceil(n / 256),) of s, uint8 both.

    Args:
        s: (n,), float32, not negative.
        noise16: (n,), int64, in [0, 2**16).
    """
    bits = _bits(s)
    exponent = (_largest_exponent(bits, _S_ROOM) - _S_BINADES).clamp(min=0)
    code = ((bits + (noise16 << 4)) >> 20) - (_spread(exponent, s.numel()) << 3)
    return code.clamp(min=0).to(torch.uint8), exponent.to(torch.uint8)


def decode_s(code: Tensor, exponent: Tensor) -> Tensor:
    """Return (n,), float32, from what `encode_s` has returned."""
    return _float((code.to(torch.int64) + (_spread(exponent, code.numel()) << 3)) << 20)


# - Remainders


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """Return the masters (n,), float32, whose parts are `param` (bfloat16) and `remainder`.

    Halves that no master has are the parameter alone: as a sum they could be a NaN. They occur
    where a parameter was set to zero through `.data`, and its remainder is still there.
    """
    upper = param.contiguous().view(torch.int16).to(torch.int64) << 16
    unit = 1 << 8 if remainder.dtype == torch.int8 else 1
    joined = _float((upper + remainder.to(torch.int64) * unit) & _UINT32)
    return torch.where(joined.isnan(), param.to(torch.float32), joined)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Return the halves of float32 masters (n,): bfloat16 to nearest, and int16."""
    bits = _bits(master)
    upper = ((bits + 0x8000) & 0xFFFF0000) & _UINT32
    lower = bits & 0xFFFF
    remainder = torch.where(lower > 0x7FFF, lower - (1 << 16), lower).to(torch.int16)
    return _float(upper).to(torch.bfloat16), remainder


def split_rounded_master(master: Tensor, noise8: Tensor | int) -> tuple[Tensor, Tensor]:
    """Return the parts of float32 masters (n,) that 24 bits hold: bfloat16, and int8.

    Args:
        master: (n,), float32.
        noise8: (n,), int64, in [0, 2**8); or `NEAREST8`, which rounds to nearest.
    """
    param, remainder = split_master(_float((_bits(master) + noise8) & 0xFFFFFF00))
    return param, (remainder >> 8).to(torch.int8)


# - Checksums


def word_sums(operands: Operands) -> Tensor:
    """Return a checksum of each thing that is stored: (WATCHED,), int32, in its order.

    It is the sum of the words, modulo 2**32: 32-bit words of what has 32 or 64 bits an element, and
    otherwise the elements themselves. One flipped bit changes it, parts add up to the whole in any
    order, and what is not there has 0. Of masters in two halves only the remainders count: the
    other half is the parameter.
    """
    o = operands
    master = o.param if o.remainder is None else o.remainder
    total = torch.zeros(WATCHED, dtype=torch.int64, device=o.param.device)
    for position, tensors in enumerate([(master, None), *_states(o), (o.param_ema, None)]):
        for tensor in tensors:
            if tensor is not None:
                total[position] += _words(tensor).sum()
    return wrapped(total)


def _words(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().view(-1)
    if flat.element_size() == 1:
        return flat.view(torch.uint8)
    if flat.element_size() == 2:
        return flat.view(torch.int16).to(torch.int32) & 0xFFFF
    return flat.view(torch.int32)


def wrapped(total: Tensor) -> Tensor:
    """Return int64 numbers modulo 2**32, as int32."""
    return ((total + (1 << 31)) % (1 << 32) - (1 << 31)).to(torch.int32)


# - One step


@torch.no_grad()
def update_stored_reference_(
    operands: Operands, scalars: StepScalars, *, grad_scale: Tensor | float = 1.0
) -> None:
    """Decode, apply one step, encode: the definition.

    Args:
        operands: Whose tensors are contiguous and 1-D.
        scalars: From `rule.step_scalars`.
        grad_scale: As for `rule.update_reference_`.
    """
    o = operands
    if o.sums is not None:
        o.sums[0, 0] += word_sums(o)
    _update_stored_(o, scalars, grad_scale)
    if o.sums is not None:
        o.sums[0, 1] += word_sums(o)


def _update_stored_(o: Operands, scalars: StepScalars, grad_scale: Tensor | float) -> None:
    stored = _states(o)
    form = o.exp_avg.dtype
    m, s, largest = (
        None if state is None else decode(state, exponent, signed=position == 0)
        for position, (state, exponent) in enumerate(stored)
    )
    assert m is not None and s is not None
    param = o.param if o.remainder is None else join_master(o.param, o.remainder)
    average = None if o.param_ema is None else decode(o.param_ema, None, signed=True)
    update_reference_(
        param,
        o.grad,
        m,
        s,
        scalars,
        grad_scale=grad_scale,
        max_exp_avg_sq=largest,
        param_out=o.param_out,
        param_ema=average,
    )
    rounds_master = o.remainder is not None and is_stochastic(o.remainder.dtype)
    rounds_average = o.param_ema is not None and is_stochastic(o.param_ema.dtype)
    if o.remainder is not None and not rounds_master:
        _copy_parts_(o, split_master(param))
    if not (is_stochastic(form) or rounds_average or rounds_master):
        return
    random = noise(o.key, scalars.step, o.first, m.numel(), m.device)
    if rounds_master:
        _copy_parts_(o, split_rounded_master(param, master_noise(random)))
    if rounds_average:
        assert o.param_ema is not None and average is not None
        # Nothing of the next step is computed from it, so it may share the noise of m.
        o.param_ema.copy_(round_to_bfloat16(average, random & 0xFFFF))
    if not is_stochastic(form):
        return
    for position, (state, exponent) in enumerate(stored):
        new = (m, s, largest)[position]
        if state is None or new is None:
            continue
        noise16 = random & 0xFFFF if position == 0 else random >> 16
        if form == torch.bfloat16:
            state.copy_(round_to_bfloat16(new, noise16))
            continue
        assert exponent is not None
        code, block = encode_m(new, noise16) if position == 0 else encode_s(new, noise16)
        state.copy_(code)
        exponent.copy_(block)


def _copy_parts_(o: Operands, parts: tuple[Tensor, Tensor]) -> None:
    assert o.remainder is not None
    o.param.copy_(parts[0])
    o.remainder.copy_(parts[1])


def _states(o: Operands) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return every state with its exponents."""
    return [
        (o.exp_avg, o.exp_avg_exponent),
        (o.exp_avg_sq, o.exp_avg_sq_exponent),
        (o.max_exp_avg_sq, o.max_exp_avg_sq_exponent),
    ]


def decode(state: Tensor, exponent: Tensor | None, *, signed: bool) -> Tensor:
    """Return the numbers (n,) of a state in any form: float32 or float64, `state` itself if it is.

    Args:
        state: (n,), as `Operands` has it.
        exponent: Its exponents, (ceil(n / 256),), with uint8 only.
        signed: It is m or an average of weights, and not s.
    """
    if state.dtype == torch.bfloat16:
        return state.to(torch.float32)
    if state.dtype == torch.uint8:
        assert exponent is not None
        return decode_m(state, exponent) if signed else decode_s(state, exponent)
    return state

"""What is stored in fewer bits: exact where it must be, unbiased where it is rounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from belief_dist.operands import BLOCK
from belief_dist.state_formats import (
    NEAREST8,
    decode_m,
    decode_s,
    encode_m,
    encode_s,
    join_master,
    master_noise,
    noise,
    noise_key,
    round_to_bfloat16,
    split_master,
    split_rounded_master,
)

CPU = torch.device("cpu")


def floats(bits: Tensor) -> Tensor:
    """Return the float32 numbers with these bits, int64 in [0, 2**32)."""
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


# - Noise


def test_noise_depends_on_seed_parameter_step_and_element_alone() -> None:
    key = noise_key(seed=3, param=7)
    whole = noise(key, 5, 0, 1000, CPU)
    assert torch.equal(whole[300:400], noise(key, 5, 300, 100, CPU))
    others = [noise(noise_key(4, 7), 5, 0, 1000, CPU), noise(noise_key(3, 8), 5, 0, 1000, CPU)]
    others += [noise(key, 6, 0, 1000, CPU), noise(key, 5, 1 << 32, 1000, CPU)]
    for other in others:
        assert (whole == other).sum() <= 1


def test_noise_is_uniform_in_both_halves() -> None:
    n = 1 << 20
    for half in (noise(1, 1, 0, n, CPU) & 0xFFFF, noise(1, 1, 0, n, CPU) >> 16):
        counts = torch.bincount(half >> 8, minlength=256).double()
        # Chi squared with 255 degrees of freedom: mean 255, standard deviation 23.
        assert 150 < ((counts - n / 256).square() / (n / 256)).sum() < 360


def test_noise_of_one_element_is_uniform_over_steps() -> None:
    """What an element meets in training: one number per step, not one per element."""
    steps = torch.cat([noise(noise_key(0, 2), step, 17, 1, CPU) for step in range(4096)])
    # The mean of 4,096 uniform numbers has a standard deviation of 0.0045.
    assert abs((steps.double() / 2**32).mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack([steps[1:], steps[:-1]]).double())[0, 1]) < 0.06


# - Remainders


def test_masters_are_lossless_and_parameters_their_nearest_bfloat16() -> None:
    """All upper halves with the lower halves that matter, and a sample of all others."""
    upper = torch.arange(1 << 16).view(-1, 1) << 16
    edges = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    sample = torch.randint(0, 1 << 32, (1 << 20,), generator=torch.Generator().manual_seed(0))
    master = floats(torch.cat([(upper + edges).flatten(), sample]))
    param, remainder = split_master(master)
    joined = join_master(param, remainder)
    number = ~master.isnan()
    assert torch.equal(joined[number].view(torch.int32), master[number].view(torch.int32))
    assert joined[~number].isnan().all()
    # Nearest: no further away than what rounds ties to even, which torch does.
    wide = master.double()
    finite = number & master.isfinite() & (master.abs() < 3e38)
    off = (param.double() - wide).abs()[finite]
    assert torch.equal(off, (master.to(torch.bfloat16).double() - wide).abs()[finite])


def test_a_parameter_that_was_zeroed_behind_our_back_is_zero() -> None:
    """`param.data.zero_()` leaves the remainder; as a sum of bits, both would be a NaN."""
    for dtype in (torch.int16, torch.int8):
        remainder = torch.tensor([-5, 5, torch.iinfo(dtype).min], dtype=dtype)
        joined = join_master(torch.zeros(3, dtype=torch.bfloat16), remainder)
        assert joined.isfinite().all() and joined.abs().max() < 1e-38


# - Remainders of 8 bits


def some_masters() -> Tensor:
    """All upper halves with the lower halves that matter, but for NaNs."""
    upper = torch.arange(1 << 16).view(-1, 1) << 16
    lower = [0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x7EFF, 0x7FFF, 0x8000, 0x80FF, 0xFFFF]
    master = floats((upper + torch.tensor(lower)).flatten())
    return master[~master.isnan()]


def test_24_bits_are_kept_whatever_the_noise() -> None:
    """So a master that a step does not change stays."""
    master = some_masters()
    for noise8 in (0, 1, NEAREST8, 255):
        param, remainder = split_rounded_master(master, noise8)
        joined = join_master(param, remainder)
        assert not (joined.view(torch.int32) & 0xFF).any()
        for other in (0, 255):
            again = split_rounded_master(joined, other)
            assert torch.equal(again[0].view(torch.int16), param.view(torch.int16))
            assert torch.equal(again[1], remainder)
        # The parameter is rounded from it as from one of 32 bits.
        assert torch.equal(param, split_master(joined)[0])


def test_the_expectation_of_24_bits_is_the_master() -> None:
    """Exactly: over all noise there is, of all that is not rounded to an infinity."""
    master = some_masters()[::17]  # still every lower half
    master = master[master.abs() < floats(torch.tensor(0x7F7FFF00))]
    total = torch.zeros(len(master), dtype=torch.float64)
    for noise8 in range(256):
        total += join_master(*split_rounded_master(master, noise8)).double() / 256
    assert torch.equal(total, master.double())


def test_24_bits_to_nearest() -> None:
    master = some_masters()
    master = master[master.abs() < 1e38]
    joined = join_master(*split_rounded_master(master, NEAREST8)).double()
    both = [join_master(*split_rounded_master(master, n)).double() for n in (0, 255)]
    least = torch.minimum(*((each - master.double()).abs() for each in both))
    assert torch.equal((joined - master.double()).abs(), least)


def test_special_masters_of_24_bits() -> None:
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), -float("nan")])
    largest = floats(torch.tensor([0x7F7FFFFF, 0xFF7FFFFF]))
    tiny = floats(torch.tensor([1, 0x80000001, 0xFF, 0x100]))
    for noise8 in (0, NEAREST8, 255):
        joined = join_master(*split_rounded_master(special, noise8))
        assert torch.equal(joined[:4].view(torch.int32), special[:4].view(torch.int32))
        assert joined[4:].isnan().all()
        # As all other stochastic rounding: up from the largest number is an infinity.
        joined = join_master(*split_rounded_master(largest, noise8))
        assert torch.equal(joined.isinf(), torch.full((2,), noise8 > 0))
        assert torch.equal(joined.signbit(), largest.signbit())
        joined = join_master(*split_rounded_master(tiny, noise8))
        assert torch.equal(joined.signbit(), tiny.signbit())
        assert (joined.abs() <= 2.0**-141).all()  # the smallest of 24 bits


def test_noise_of_masters_is_unrelated_to_that_of_states() -> None:
    """Uniform beside every byte of the word whose halves round m and s."""
    n = 1 << 20
    random = noise(1, 1, 0, n, CPU)
    master = master_noise(random)
    for shift in (0, 8, 16, 24):
        pairs = torch.bincount((random >> shift & 255) << 8 | master, minlength=1 << 16).double()
        # Chi squared with 65,535 degrees of freedom: its standard deviation is 362.
        assert abs(((pairs - n / 65536).square() / (n / 65536)).sum() - 65535) < 5 * 362


# - Stochastic rounding


def mean_error(exact: Tensor, rounded: Tensor, spacing: Tensor) -> float:
    """Return the mean error in units of its standard deviation, at most half a spacing each."""
    error = (rounded.double() - exact.double()) / spacing
    return float(error.sum().abs() / (0.5 * len(error) ** 0.5))


def spread(n: int, low: float, high: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 ** torch.empty(n).uniform_(low, high, generator=generator)


def test_bfloat16_is_one_of_two_neighbours_and_unbiased() -> None:
    x = spread(1 << 16, -100, 100) * torch.tensor([1.0, -1.0]).repeat(1 << 15)
    rounded = round_to_bfloat16(x, noise(1, 1, 0, len(x), CPU) & 0xFFFF).double()
    spacing = 2.0 ** (x.double().abs().log2().floor() - 7)
    assert ((rounded - x.double()).abs() < spacing).all()
    assert mean_error(x, rounded, spacing) < 4


def test_special_numbers_survive() -> None:
    x = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    most = torch.full((5,), 0xFFFF)
    rounded = round_to_bfloat16(x, most)
    assert torch.equal(rounded[:4], x[:4].to(torch.bfloat16)) and rounded[4].isnan()
    assert torch.equal(rounded.signbit()[:4], x.signbit()[:4])
    for special in x:
        m = torch.ones(300)
        m[3] = special
        back = decode_m(*encode_m(m, torch.zeros(300, dtype=torch.int64)))
        assert torch.equal(back[3], special) or (back[3].isnan() and special.isnan())
    s = torch.tensor([0.0, float("inf"), float("nan"), 1.0])
    back = decode_s(*encode_s(s, most[:4]))
    assert back[1] == float("inf") and back[2].isnan()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_8_bit_m_is_near_and_unbiased(scale: float) -> None:
    n = 256 * BLOCK
    signs = torch.tensor([1.0, -1.0, -1.0]).repeat(n)[:n]
    m = spread(n, -16, -0.5) * signs * scale
    m[::BLOCK] = scale * 0.75  # every block reaches the same power of two
    back = decode_m(*encode_m(m, noise(1, 1, 0, n, CPU) & 0xFFFF)).double()
    # Constant around zero, relative above; see the module.
    top = 2.0 ** torch.tensor(scale * 0.75).double().log2().floor()
    spacing = torch.maximum((m.double().abs() + top / 128) / 16, top / 2048)
    assert ((back - m.double()).abs() <= spacing).all()
    assert mean_error(m, back, spacing) < 4
    assert (back.signbit() == m.signbit()).all()


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e30])
def test_8_bit_s_is_near_unbiased_and_never_too_small(scale: float) -> None:
    n = 256 * BLOCK
    s = spread(n, -25, -0.5) * scale
    s[::BLOCK] = scale * 0.75
    back = decode_s(*encode_s(s, noise(1, 1, 0, n, CPU) >> 16)).double()
    spacing = s.double() / 8
    assert ((back - s.double()).abs() <= spacing).all()
    assert mean_error(s, back, spacing) < 4
    # Far below the largest: raised to the smallest code, never zero.
    s[1] = scale * 1e-14
    back = decode_s(*encode_s(s, torch.zeros(n, dtype=torch.int64)))
    assert back[1] >= s[1] and back[1] > 0
    assert back[1] <= scale * 2.0**-31


@pytest.mark.parametrize("encode, decode", [(encode_m, decode_m), (encode_s, decode_s)])
def test_the_largest_of_a_block_can_grow_beyond_its_power_of_two(
    encode: Callable[..., tuple[Tensor, Tensor]], decode: Callable[..., Tensor]
) -> None:
    """Codes that end at the block's power of two would round everything below it down."""
    x = torch.full((64 * BLOCK,), 1.995)
    half = noise(1, 1, 0, len(x), CPU) & 0xFFFF
    back = decode(*encode(x, half))
    assert len(set(back.tolist())) == 2
    assert back.max() > 1.995
    spacing = torch.full_like(x, float(back.max() - back.min()), dtype=torch.float64)
    assert mean_error(x, back, spacing) < 4


def test_what_is_decoded_is_encoded_as_it_was() -> None:
    """A number that has a code keeps its value whatever the noise."""
    m = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    zero, most = torch.zeros(1000, dtype=torch.int64), torch.full((1000,), 0xFFFF)
    decoded = decode_s(*encode_s(m.square(), zero))
    assert torch.equal(decode_s(*encode_s(decoded, most)), decoded)


def test_fresh_states_are_zero() -> None:
    zeros = torch.zeros(700)
    none = torch.zeros(3, dtype=torch.uint8)
    assert torch.equal(decode_s(torch.zeros(700, dtype=torch.uint8), none), zeros)
    m = decode_m(torch.zeros(700, dtype=torch.uint8), torch.ones(3, dtype=torch.uint8))
    assert torch.equal(m, zeros)
    assert torch.equal(decode_m(torch.zeros(700, dtype=torch.uint8), none), zeros)

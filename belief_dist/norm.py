"""A sum of squares with the same bits for any order, chunking and sharding.

Floating-point addition depends on its order, so a global norm that every rank sums over its own
shard would differ with the number of ranks. Here the sum is exact instead: each square is split
over *bins*, bin j counting multiples of ``2**(32 j)`` in an integer, and integers add in any order.

Splitting starts one bin above the largest square of a chunk and goes down four bins; that way the
multiple of any kept unit which an element contributes does not depend on its neighbours. Of the
final bins the highest three that matter are read (at least 64 bits below the leading one).

The bins are one int64 tensor of `NUM_WORDS` words: for each bin a low word in [0, 2**32) and a
high word, so that the bins of many ranks can be summed without overflow; and last the number of
elements that are not finite, which are in no bin.

Source: Demmel and Nguyen, "Parallel Reproducible Summation", IEEE Trans. Computers 64 (2015).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from belief_dist.rule import correctly_rounded_sqrt

BIN_BITS = 32
LOW_BIN = -10  # squares of the smallest float32 numbers are about 2**-298
HIGH_BIN = 8  # those of the largest are below 2**256
# One more bin takes what rounds up from the highest.
NUM_BINS = HIGH_BIN + 2 - LOW_BIN
NUM_WORDS = 2 * NUM_BINS + 1

_MASK = (1 << BIN_BITS) - 1
# Exact while fewer than 2**20 multiples below 2**32 are summed in a float64.
_CHUNK = 1 << 18


@lru_cache
def _units(device: torch.device) -> Tensor:
    """Return the unit of every bin, exactly: (NUM_BINS,), float64."""
    units = [2.0 ** (BIN_BITS * j) for j in range(LOW_BIN, LOW_BIN + NUM_BINS)]
    return torch.tensor(units, dtype=torch.float64, device=device)


def add_squares_(bins: Tensor, values: Tensor) -> None:
    """Add the squares of `values` to `bins`, in plain torch and without visiting the host.

    Args:
        bins: (NUM_WORDS,), int64. Updated in place.
        values: Any shape and floating dtype. A square of 2**288 or more (only float64 has such)
            counts as not finite, one far below 2**-320 as zero.
    """
    for chunk in values.detach().reshape(-1).split(_CHUNK):
        if chunk.numel():
            _add_chunk_(bins, chunk)
    low, high = bins[: 2 * NUM_BINS : 2], bins[1 : 2 * NUM_BINS : 2]
    high += low >> BIN_BITS
    low &= _MASK


def _add_chunk_(bins: Tensor, chunk: Tensor) -> None:
    rest = chunk.to(torch.float64, copy=True).square_()
    counted = rest < 2.0 ** (BIN_BITS * (HIGH_BIN + 1))  # False for NaN and infinity
    bins[-1] += chunk.numel() - counted.sum()
    rest.masked_fill_(~counted, 0.0)
    exponent = torch.frexp(rest.max().view(1)).exponent.to(torch.int64) - 1
    top = torch.div(exponent, BIN_BITS, rounding_mode="floor").clamp(LOW_BIN, HIGH_BIN)
    units = _units(bins.device)
    for down in range(-1, 3):
        index = (top - down).clamp(min=LOW_BIN)
        unit = units[index - LOW_BIN]
        # Adding and subtracting this rounds to a multiple of `unit`.
        rounder = unit * 1.5 * 2.0**52
        part = (rest + rounder) - rounder
        rest -= part
        count = (part.sum() / unit).to(torch.int64)
        words = torch.cat([count & _MASK, count >> BIN_BITS])
        place = 2 * (index - LOW_BIN) + torch.arange(2, device=bins.device)
        bins.index_add_(0, place, words)


def nonfinite_count(bins: Tensor) -> Tensor:
    """Return how many elements were not finite, as an int64 tensor with one element.

    Args:
        bins: (NUM_WORDS,), or more words behind them.
    """
    return bins[NUM_WORDS - 1]


def norm_from_bins(bins: Tensor) -> Tensor:
    """Return the L2 norm, float64 with one element, on the device of `bins`.

    Args:
        bins: (NUM_WORDS,), int64: from `add_squares_`, or a sum of such over ranks.
    """
    # Two empty bins below, so that three bins exist under every highest one.
    words = torch.cat([bins.new_zeros(4), bins[: 2 * NUM_BINS]]).view(-1, 2)
    places = torch.arange(len(words), device=bins.device)
    # One element each: an index without dimensions would be read by the host.
    top = torch.where((words != 0).any(1), places, 2).max().view(1)
    (low0, high0), (low1, high1), (low2, high2) = (words[top - d].unbind(1) for d in (2, 1, 0))
    # Digits to the base 2**32, made unique by carrying.
    digit0 = low0 & _MASK
    carried = low1 + high0 + (low0 >> BIN_BITS)
    digit1 = carried & _MASK
    carried = low2 + high1 + (carried >> BIN_BITS)
    digit2 = carried & _MASK
    digit3 = high2 + (carried >> BIN_BITS)
    value = torch.zeros(1, dtype=torch.float64, device=bins.device)
    for digit in (digit3, digit2, digit1, digit0):
        value = value * 2.0**BIN_BITS + digit
    # The lowest of the three bins is `top - 4` among the real ones, so its unit may lie below all.
    square = value * _units(bins.device)[top - 2] * 2.0 ** (-2 * BIN_BITS)
    return correctly_rounded_sqrt(square).view(())

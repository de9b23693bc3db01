"""Quantiles from counts in bins that are evenly spaced by their logarithm: plain arithmetic.

Counts of several windows, parameters and ranks add up, which quantiles do not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

PER_OCTAVE = 4  # a bin's upper end is 2^(1/4) = 1.19 times its lower one
OCTAVES = 48
# Below them all, and above them all, is one more.
NUM_BINS = PER_OCTAVE * OCTAVES + 2

# What is told of a distribution, and by which part of a name.
QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}

# Elements of one parameter, on all ranks together, of which no fewer are counted where there are
# more. The median of so many has a share of 0.484 to 0.516 of all below it, 19 times in 20; that of
# a group, of more, is closer. Counting all would double what a record costs.
SAMPLE = 1 << 12


class Bins(NamedTuple):
    """Bins between 2^lowest and 2^(lowest + OCTAVES)."""

    lowest: int

    def lower_end(self, number: int) -> float:
        """Return where bin `number`, from 1 to NUM_BINS - 1, begins."""
        return math.pow(2.0, self.lowest + (number - 1) / PER_OCTAVE)

    def quantile(self, counts: Sequence[float], share: float) -> float:
        """Return the value below which a share of the elements are.

        It is off by less than a bin's width, a factor of 2^(1 / PER_OCTAVE): inside a bin elements
        are taken as evenly spread by their logarithm. What is below all bins is told as 0, and what
        is above them as infinity.

        Args:
            counts: NUM_BINS of them, not all zero.
            share: From 0 to below 1.
        """
        wanted = share * sum(counts)
        before = [0.0, *itertools.accumulate(counts)]
        number = next(n for n, count in enumerate(counts) if count and before[n + 1] >= wanted)
        if number == 0:
            return 0.0
        if number == NUM_BINS - 1:
            return math.inf
        inside = (wanted - before[number]) / counts[number]
        return self.lower_end(number) * math.pow(2.0, inside / PER_OCTAVE)


# |m'| / (sqrt(s') + eps) reaches 1e6 where gradients never change; surprise stays below
# 1 / (1 - beta2).
SIGNAL, SURPRISE = Bins(-24), Bins(-32)


def stride_of(numel: int) -> int:
    """Return that every how manieth element of a parameter of `numel` elements is counted.

    Odd, so that in a matrix whose rows are a power of two long it comes to every column.
    """
    return max(1, numel // SAMPLE - 1) | 1 if numel >= 2 * SAMPLE else 1

"""Intervals, paired tests and effect sizes, by scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean with the 95 % interval of Student's t; without one for a single value."""

    mean: float
    low: float
    high: float
    seeds: int


class Comparison(NamedTuple):
    """A paired difference, ours less theirs, seed by seed.

    Attributes:
        difference: Its mean, with the 95 % interval.
        p: Of the paired t-test, two-sided; nan where there is no spread to test.
        effect: Cohen's d of the paired differences; nan likewise.
    """

    difference: Interval
    p: float
    effect: float

    @property
    def found(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.difference.seeds > 1 and not self.difference.low <= 0 <= self.difference.high


def interval(values: Sequence[float]) -> Interval:
    """Return the mean and its interval; infinite values count as they are."""
    mean = float(np.mean(values))
    if len(values) < 2 or not math.isfinite(mean):
        return Interval(mean, math.nan, math.nan, len(values))
    error = float(stats.sem(values))
    if error == 0:
        return Interval(mean, mean, mean, len(values))
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=error)
    return Interval(mean, float(low), float(high), len(values))


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Compare values of the same seeds."""
    differences = np.subtract(ours, theirs)
    whole = interval(differences.tolist())
    if len(differences) < 2 or not np.ptp(differences) > 0:
        return Comparison(whole, math.nan, math.nan)
    p = float(stats.ttest_rel(ours, theirs).pvalue)
    return Comparison(whole, p, float(differences.mean() / differences.std(ddof=1)))

"""Numbers as readers see them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from examples.evidence.estimates import Comparison, Interval


def number(value: float) -> str:
    """Return three digits of a number."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def spread(found: Interval) -> str:
    """Return a mean with half its interval."""
    if math.isnan(found.low):
        return number(found.mean)
    half = (found.high - found.low) / 2
    digits = max(0, 1 - math.floor(math.log10(half))) if half > 0 else 2
    return f"{found.mean:,.{min(digits, 4)}f} ± {half:,.{min(digits, 4)}f}"


def chance(p: float) -> str:
    """Return a p-value."""
    if math.isnan(p):
        return "-"
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def verdict(compared: Comparison | None) -> str:
    """Return whether our error is smaller, with 95 % confidence."""
    if compared is None:
        return "not run"
    if compared.difference.seeds < 2:
        return "one seed only"
    if not compared.found:
        return "no difference found"
    return "better" if compared.difference.mean < 0 else "worse"


def gap(compared: Comparison | None) -> str:
    """Return by how much our error is smaller (+) or larger (-), with its interval."""
    if compared is None:
        return "not run"
    mean, low, high, count = compared.difference
    if count < 2:
        return f"{-mean:+.3g}"
    return f"{-mean:+.3g} [{-high:+.3g}, {-low:+.3g}]"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """Return a table in Markdown; with numbers all but the first column end at the right."""
    rest = ("---:|" if numbers else "---|") * (len(columns) - 1)
    lines = ["| " + " | ".join(columns) + " |", "|---|" + rest]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])

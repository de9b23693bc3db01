"""What pictures share: colours that everybody tells apart, names at the ends of lines, a canvas.

A picture is as wide as a column of README, so that its words are read at their own size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's.
BLUE, ORANGE, PINK, GREEN, SKY, GREY = (
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#009E73",
    "#56B4E9",
    "#555555",
)
WIDTH = 8.2  # inches
DPI = 110


def canvas(height: float) -> Figure:
    """Return an empty figure, so many inches high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height))


def plain(panel: Any) -> None:
    """Take away what carries no message."""
    panel.spines[["top", "right"]].set_visible(False)


def height_of(value: float, low: float, high: float) -> float:
    """Return where a value lies between the ends of a logarithmic axis, from 0 to 1."""
    return math.log(value / low) / math.log(high / low)


def apart(heights: Sequence[float], label: float) -> list[float]:
    """Return heights for labels: each at its own, or above the one that it would cover.

    Args:
        heights: Where their lines end, from 0 to 1 of the panel's height.
        label: The height that one takes, of the panel's.
    """
    placed: dict[int, float] = {}
    least = 0.0
    for index in sorted(range(len(heights)), key=lambda each: heights[each]):
        placed[index] = max(heights[index], least)
        least = placed[index] + label
    return [placed[index] for index in range(len(heights))]

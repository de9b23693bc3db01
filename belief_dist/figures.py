"""Figures of the commands, which need matplotlib."""

from __future__ import annotations

from typing import Any


def new_figure(width: float, height: float) -> Any:
    """Return a figure of this size, in inches.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--picture needs matplotlib: pip install matplotlib.") from None
    return Figure(figsize=(width, height), layout="constrained")

"""How figures look: a colour for each optimizer, which colour-blind readers tell apart.

Colours: Okabe and Ito, https://jfly.uni-koeln.de/color/.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

from examples.evidence.estimates import Interval

_COLOURS = {  # the first one that a name begins with
    "SGD": "#000000",
    "AdamW": "#d55e00",
    "Adam": "#e69f00",
    "EAdam": "#009e73",
    "RAdam": "#cc79a7",
    "RMSProp": "#56b4e9",
}
_BELIEF = "#0072b2"


def colour(name: str) -> str:
    """Return the colour of an optimizer."""
    return next((each for start, each in _COLOURS.items() if name.startswith(start)), _BELIEF)


def line(name: str) -> str:
    """Return how an optimizer's line is drawn: AdaBelief near SGD is dashed."""
    return "--" if name == "AdaBelief, eps 1e-8" else "-"


@contextmanager
def picture(path: Path, panels: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Give the panels of a figure, each of `size` inches, and write it."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = -(-panels // columns)
    with pyplot.rc_context({"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 8}):
        figure, axes = pyplot.subplots(
            *(lines, columns),
            figsize=(size[0] * columns, size[1] * lines),
            squeeze=False,
            layout="constrained",
        )
        for panel in axes.flat:
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=8)
        for panel in axes.flat[panels:]:
            panel.remove()
        yield list(axes.flat[:panels])
        figure.savefig(path, dpi=100)
        pyplot.close(figure)


def intervals(panel: Any, rows: Sequence[tuple[str, Interval]]) -> None:
    """Draw means with their intervals, one line for each name, the first on top."""
    for line, (name, found) in enumerate(rows):
        panel.plot(found.mean, line, "o", color=colour(name), markersize=5)
        panel.plot([found.low, found.high], [line, line], color=colour(name), linewidth=1.5)
    panel.set_yticks(range(len(rows)), [name for name, _ in rows])
    for label, (name, _) in zip(panel.get_yticklabels(), rows, strict=True):
        label.set_color(colour(name))
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.3)


def name_lines(panel: Any, ends: Sequence[tuple[float, float, str]]) -> None:
    """Write names at the ends (x, y) of lines, moved apart where they would lie on another."""
    low, high = panel.get_ylim()
    gap = (high - low) / 14
    places: list[float] = []
    ends = sorted(ends, key=lambda end: end[1])
    for _, y, _ in ends:
        places.append(max(y, places[-1] + gap) if places else y)
    upward = sum(place - y for place, (_, y, _) in zip(places, ends, strict=True)) / len(ends)
    for (x, _, name), place in zip(ends, places, strict=True):
        panel.annotate(
            name,
            (x, place - upward),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=colour(name),
            annotation_clip=False,
        )

"""One training iteration as a picture: what the host of one rank does, a lane for each purpose."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.engines import BACKWARD, FORWARD
from benchmarks.pictures import BLUE, DPI, GREEN, GREY, ORANGE, PINK, canvas, plain
from benchmarks.step_trace import Range

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Lanes from above, with the ranges that are in them, and their colours: light where it waits.
LANES: dict[str, dict[str, tuple[str, float]]] = {
    "model": {FORWARD: (GREY, 0.35), BACKWARD: (GREY, 0.6)},
    "gradients": {"reduce": (ORANGE, 1.0), "reduce_wait": (ORANGE, 0.45)},
    "agree": {"consensus": (PINK, 1.0)},
    "update": {"update": (BLUE, 1.0)},
    "parameters": {"gather": (GREEN, 1.0), "gather_wait": (GREEN, 0.45)},
}


def plot_trace(file: Path, out: Path) -> None:
    """Draw the result of `trace --json FILE`.

    Args:
        file: What was written.
        out: The picture, PNG or SVG.
    """
    content = json.loads(file.read_text())["step trace"]
    found = {stage: [(r[0], r[1], r[2]) for r in ranges] for stage, ranges in content.items()}
    draw_trace(found, out)


def draw_trace(found: Mapping[str, Sequence[Range]], path: Path) -> None:
    """Draw a panel for each stage."""
    trace_figure(found).savefig(path, dpi=DPI)


def trace_figure(found: Mapping[str, Sequence[Range]]) -> Figure:
    """Return a panel for each stage, all with the same scale."""
    figure = canvas(0.7 + 1.75 * len(found))
    panels = figure.subplots(len(found), 1, squeeze=False, sharex=True)[:, 0]
    for panel, (stage, ranges) in zip(panels, found.items(), strict=True):
        _draw(panel, stage, ranges)
    panels[-1].set_xlabel("milliseconds (light: the host waits)", fontsize=9)
    figure.subplots_adjust(left=0.115, right=0.985, bottom=0.1, top=0.94, hspace=0.32)
    return figure


def _draw(panel: Any, stage: str, ranges: Sequence[Range]) -> None:
    for height, kinds in enumerate(LANES.values()):
        for name, start, stop in ranges:
            if name in kinds:
                color, alpha = kinds[name]
                panel.barh(height, stop - start, left=start, height=0.72, color=color, alpha=alpha)
    for name, start, stop in ranges:
        if name in (FORWARD, BACKWARD):
            panel.text((start + stop) / 2, 0, name, ha="center", va="center", fontsize=9)
        if name == "step":
            panel.axvspan(start, stop, color=GREY, alpha=0.09, lw=0)
            panel.text(
                (start + stop) / 2, 0, "step()", ha="center", va="center", fontsize=9, color=GREY
            )
    panel.set_title(stage, fontsize=10, loc="left")
    panel.set_yticks(range(len(LANES)), LANES, fontsize=9)
    panel.set_ylim(len(LANES) - 0.5, -0.5)
    panel.tick_params(axis="y", length=0)
    panel.tick_params(axis="x", labelsize=8, labelbottom=True)
    plain(panel)

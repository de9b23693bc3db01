"""Figures about what the page of AdaBelief shows: its functions, and where updates point."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import torch

from examples.evidence.direction import LEVELS
from examples.evidence.findings import Findings
from examples.evidence.style import colour, name_lines, picture
from examples.evidence.toys import AVERAGED, CASES, HEAVY, STEPS, Case

_MARKS = {HEAVY: "s", AVERAGED: "^", "Adam": "o", "AdaBelief": "D"}
_SHOWN = ("valley, near an edge", "Rosenbrock, right")  # in the animation
_FRAMES = 45
_STRIDE = 10  # steps between recorded points


def draw_toys(same: Findings, tuned: Findings, path: Path) -> None:
    """Draw the steps until each optimizer settles, at the videos' and at its own learning rate."""
    with picture(path, 2, 2, (4.4, 4.2)) as panels:
        for panel, found in zip(panels, (same, tuned), strict=True):
            for line, case in enumerate(CASES):
                for name, mark in _MARKS.items():
                    steps = next(iter(found.values(case.name, name, "settled").values()))
                    never = math.isnan(steps)
                    x = 1.5 * STEPS if never else steps
                    shape = {"marker": "x" if never else mark, "color": colour(name)}
                    panel.plot(x, line, linestyle="", markersize=6, alpha=0.85, **shape)
            panel.set(xscale="log", xlabel=f"steps to the minimum, log scale (x: not in {STEPS:,})")
            panel.set_xlim(15, 2 * STEPS)
            panel.set_yticks(range(len(CASES)), [case.name for case in CASES])
            panel.invert_yaxis()
            panel.grid(alpha=0.3)
        panels[1].set_yticklabels([])
        panels[0].set_title("all at learning rate 0.01, as in the videos")
        panels[1].set_title("each at its best of six learning rates")
        for name, mark in _MARKS.items():
            panels[0].plot([], [], mark, color=colour(name), label=name)
        panels[0].figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def animate(found: Findings, path: Path) -> None:
    """Show two functions and the optimizers on their way, as the videos do."""
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.animation import FuncAnimation, PillowWriter

    figure, axes = pyplot.subplots(1, 2, figsize=(6.4, 3), layout="constrained")
    dots = []
    for panel, name in zip(axes, _SHOWN, strict=True):
        case = next(each for each in CASES if each.name == name)
        ways = {rule: _way(found, case, rule) for rule in _MARKS}
        _contours(panel, case)
        for rule, way in ways.items():
            (line,) = panel.plot([], [], "-", color=colour(rule), linewidth=1)
            (dot,) = panel.plot([], [], _MARKS[rule], color=colour(rule), markersize=6, label=rule)
            dots.append((line, dot, way))
        panel.set_title(f"{name}, learning rate 0.01", fontsize=9)
        panel.set(xticks=[], yticks=[])
    axes[1].legend(fontsize=6, loc="lower right")

    def show(frame: int) -> list[Any]:
        for line, dot, way in dots:
            line.set_data(*zip(*way[: frame + 1], strict=True))
            dot.set_data(*([value] for value in way[min(frame, len(way) - 1)]))
        axes[0].set_xlabel(f"step {_STRIDE * frame}", fontsize=8)
        return []

    FuncAnimation(figure, show, frames=_FRAMES).save(path, PillowWriter(fps=9), dpi=75)
    pyplot.close(figure)


def _way(found: Findings, case: Case, rule: str) -> list[tuple[float, float]]:
    run = next(iter(found.runs(case.name, rule).values()))
    points = [point for point in found.store[run] if point["step"] % _STRIDE == 0]
    return [case.start, *((point["x"], point["y"]) for point in points)]


def _contours(panel: Any, case: Case) -> None:
    reach = 1.15 * max(abs(value) for value in (*case.start, *case.minimum))
    line = torch.linspace(-reach, reach, 120, dtype=torch.float64)
    x, y = torch.meshgrid(line, line, indexing="xy")
    heights = torch.log1p(case.function(x, y) - case.function(*torch.tensor(case.minimum).double()))
    panel.contour(x, y, heights, levels=14, colors="#bbbbbb", linewidths=0.6)
    panel.plot(*case.minimum, "*", color="#666666", markersize=11)


def draw_direction(found: Findings, path: Path) -> None:
    """Draw measured cosines as dots, and the formula's as lines."""
    with picture(path, 2, 2, (4.2, 3.0)) as panels:
        for panel, spread in zip(panels, ("equal", "unequal"), strict=True):
            ends = []
            for rule in ("Adam", "AdaBelief"):
                settings = [f"{spread}, noise {level:g}" for level in LEVELS]
                for metric, dashes in (("gradient", "-"), ("sign", ":")):
                    said = f"predicted_{metric}"
                    formula = [found.interval(s, rule, said).mean for s in settings]
                    measured = [found.interval(s, rule, metric).mean for s in settings]
                    panel.plot(LEVELS, formula, dashes, color=colour(rule), linewidth=1.2)
                    panel.plot(LEVELS, measured, "o", color=colour(rule), markersize=4)
                    ends.append((LEVELS[-1], measured[-1], f"{rule}, {metric}"))
            panel.set(xscale="log", ylim=(0.35, 1.03), title=f"{spread} noise of all elements")
            panel.set_xlabel("noise / root mean square of the gradient (log scale)")
            name_lines(panel, ends)
        panels[0].set_ylabel("cosine of the mean update with\ngradient, or its sign (dotted)")

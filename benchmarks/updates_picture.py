"""Timings of updates as a picture: what AdaBelief costs here, beside AdamW and other AdaBeliefs.

The table has every form and contender; the picture has the few that carry this one message.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.pictures import BLUE, GREY, ORANGE, PINK, apart, height_of
from benchmarks.update import ADAMW, OFFICIAL, OURS
from benchmarks.updates_report import size_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOAT32 = f"{OURS}: float32"
# Name, label, colour and marker.
SHOWN = (
    (FLOAT32, "belief_dist", BLUE, "o"),
    (ADAMW, ADAMW, GREY, "s"),
    ("pytorch_optimizer AdaBelief", "pytorch_optimizer", PINK, "^"),
    (OFFICIAL, OFFICIAL, ORANGE, "D"),
)
_LABEL = 0.075  # height that a label takes, of the panel's
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)

Points = dict[int, float]  # nanoseconds per parameter by the number of parameters


def plot_update(file: Path, out: Path) -> None:
    """Draw the result of `update --json FILE`.

    Args:
        file: What was written.
        out: The picture, PNG or SVG.
    """
    draw_updates(out, json.loads(file.read_text()))


def draw_updates(path: Path, content: dict[str, Any]) -> None:
    """Draw what `update --json` writes, for its largest number of threads."""
    updates_figure(content).savefig(path, dpi=110)


def updates_figure(content: dict[str, Any]) -> Figure:
    """Return nanoseconds per parameter over the size, each line named at its end."""
    from matplotlib.figure import Figure

    threads = max(result["threads"] for result in content["update"])
    lines = {name: _points(content, name, threads) for name, *_ in SHOWN}
    lines = {name: points for name, points in lines.items() if points}
    sizes = sorted({size for points in lines.values() for size in points})
    times = [time for points in lines.values() for time in points.values()]
    low, high = min(times) / 1.25, max(times) * 1.25

    figure = Figure(figsize=(8, 4.5))
    panel = figure.subplots()
    heights = apart(
        [height_of(list(points.values())[-1], low, high) for points in lines.values()], _LABEL
    )
    styles = {name: style for name, *style in SHOWN}
    for (name, points), height in zip(lines.items(), heights, strict=True):
        label, color, marker = styles[name]
        width = 3 if name == FLOAT32 else 1.5
        panel.plot(list(points), list(points.values()), color=color, marker=marker, linewidth=width)
        panel.annotate(
            label,
            (max(points), low * (high / low) ** height),
            xytext=(9, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=color,
            fontsize=11,
            fontweight="bold" if name == FLOAT32 else "normal",
        )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_ylim(low, high)
    panel.set_xticks(sizes, [size_of(size) for size in sizes])
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.grid(axis="y", color="#dddddd")
    panel.spines[["top", "right"]].set_visible(False)
    by = f"{threads} {'thread' if threads == 1 else 'threads'}"
    panel.set_xlabel(f"parameters, updated by {by} (log scale)")
    panel.set_ylabel("nanoseconds per parameter (log scale)")
    panel.set_title(_message(lines), loc="left", fontsize=11)
    figure.subplots_adjust(left=0.09, right=0.76, bottom=0.13, top=0.83)
    return figure


def _points(content: dict[str, Any], name: str, threads: int) -> Points:
    found = {
        result["elements"]: row["ms"] / result["elements"] * 1e6
        for result in content["update"]
        for row in result["rows"]
        if row["name"] == name and result["threads"] == threads
    }
    return dict(sorted(found.items()))


def _message(lines: dict[str, Points]) -> str:
    """Say what the lines show at the largest size that all of them have."""
    common = set.intersection(*(set(points) for points in lines.values()))
    if not common or FLOAT32 not in lines:
        return "One float32 update"
    size = max(common)
    ours = lines[FLOAT32][size]
    said = []
    if ADAMW in lines:
        said.append(f"belief_dist takes {ours / lines[ADAMW][size]:.2f} times as long as AdamW")
    if OFFICIAL in lines:
        ratio = lines[OFFICIAL][size] / ours
        said.append(f"{OFFICIAL} takes {ratio:.1f} times as long as belief_dist")
    return f"One float32 update of {size_of(size)} parameters:\n" + ",\n".join(said)

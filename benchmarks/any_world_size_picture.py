"""One job at several numbers of ranks as a picture: ours is one line, others come apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.any_world_size import MICRO_BATCHES, OURS, Run, snapshots
from benchmarks.pictures import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    apart,
    canvas,
    height_of,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One below the other, each thinner: of one line nothing would be seen but the last.
_RANKS = ((SKY, 9.0), ("#F0E442", 6.0), (ORANGE, 3.5), ("#000000", 1.2))
_PEERS = (GREY, ORANGE, GREEN)
_FLOOR = 1e-6  # where 0 is drawn, on an axis that has none
_LABEL = 0.075  # height that a label takes, of the panel's

Found = Mapping[str, Mapping[int, Run]]


def plot_any_world_size(file: Path, out: Path) -> None:
    """Draw the result of `any_world_size --json FILE`.

    Args:
        file: What was written.
        out: The picture, PNG or SVG.
    """
    content = json.loads(file.read_text())["any world size"]
    draw_any_world_size(
        {
            name: {int(ranks): Run(**run) for ranks, run in runs.items()}
            for name, runs in content.items()
        },
        out,
    )


def draw_any_world_size(found: Found, path: Path) -> None:
    """Draw the losses of our runs, beside how far the weights of all come apart."""
    any_world_size_figure(found).savefig(path, dpi=DPI)


def any_world_size_figure(found: Found) -> Figure:
    """Return the figure, whose lines are named where they end."""
    figure = canvas(4.1)
    left, right = figure.subplots(1, 2)
    _losses(left, found[OURS])
    _differences(right, found)
    figure.subplots_adjust(left=0.075, right=0.8, bottom=0.13, top=0.85, wspace=0.3)
    return figure


def _losses(panel: Any, runs: Mapping[int, Run]) -> None:
    plain(panel)
    styles = list(zip(runs.items(), _RANKS, strict=False))
    for place, ((ranks, run), (color, width)) in enumerate(styles):
        panel.plot(range(1, len(run.losses) + 1), run.losses, lw=width, color=color)
        name = f"{ranks} {'rank' if ranks == 1 else 'ranks'}"
        y = 0.93 - 0.09 * place
        sample = {"transform": panel.transAxes, "clip_on": False}
        panel.plot([0.52, 0.62], [y, y], lw=width, color=color, **sample)
        panel.text(0.66, y, name, va="center", transform=panel.transAxes, fontsize=10)
    panel.set(xlabel="step", ylabel="training loss (nats per byte)")
    panel.set_title(
        f"micro_batches={MICRO_BATCHES}: one line\nfor any number of ranks", loc="left", fontsize=11
    )


def _differences(panel: Any, found: Found) -> None:
    """Draw the larger of the differences at all numbers of ranks, for each way to train."""
    plain(panel)
    lines = {}
    for name, runs in found.items():
        several = [run.largest for ranks, run in runs.items() if ranks > 1]
        lines[name] = [max(values) for values in zip(*several, strict=True)]
    panel.set_yscale("log")
    panel.set_ylim(_FLOOR / 2, 0.1)
    low, high = panel.get_ylim()
    peers = [name for name in lines if name != OURS]
    ends = [max(lines[name][-1], _FLOOR) for name in peers]
    heights = apart([height_of(end, low, high) for end in ends], _LABEL)
    steps = snapshots(len(next(iter(found[OURS].values())).losses))
    for name, height, color in zip(peers, heights, _PEERS, strict=False):
        panel.plot(steps, lines[name], lw=1.6, color=color)
        _name(panel, name.removesuffix(" + AdamW"), height, color)
    ours = [max(value, _FLOOR) for value in lines[OURS]]
    panel.plot(steps, ours, lw=3, color=BLUE)
    panel.text(
        steps[0],
        2 * _FLOOR,
        "ShardedAdaBelief: no bit differs",
        color=BLUE,
        fontsize=10,
        fontweight="bold",
    )
    ticks = [10.0**power for power in range(-5, 0)]
    panel.set_yticks([_FLOOR, *ticks], ["0", *(f"1e{power}" for power in range(-5, 0))])
    panel.minorticks_off()
    panel.set(xlabel="step", ylabel="(log scale, and 0)")
    panel.set_title(
        "largest difference of a weight:\nmore ranks beside one", loc="left", fontsize=11
    )


def _name(panel: Any, name: str, height: float, color: str) -> None:
    place = {"transform": panel.transAxes, "va": "center"}
    panel.text(1.03, height, name, color=color, fontsize=10, **place)

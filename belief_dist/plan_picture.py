"""Draws what each way to train holds, against the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from belief_dist.figures import new_figure
from belief_dist.memory_plan import plan

# As far apart as may be for who sees few colours (Okabe and Ito); others are grey.
_COLORS = ("#000000", "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#882255")
_GREY = "#777777"
# DeepSpeed's ZeRO-1 and 2 hold as much as ours.
_NOT_DRAWN = ("DeepSpeed ZeRO-1, bfloat16", "DeepSpeed ZeRO-2, bfloat16")


def draw_plan(
    file: Path,
    shapes: Sequence[tuple[int, ...]],
    ranks: int,
    memory: float | None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write a picture of the memory of each rank, for powers of two of ranks and for `ranks`.

    Args:
        file: The PNG.
        shapes: Of the parameters.
        ranks: The largest number.
        memory: Bytes of a device, which is drawn as a limit, or None.
        more: See `memory_plan.plan`.

    Raises:
        ValueError: matplotlib is missing.
    """
    counts = sorted({2**power for power in range(ranks.bit_length())} | {ranks})
    rows = [plan(shapes, each, memory, more) for each in counts]
    figure = new_figure(9, 5)
    axes = figure.add_subplot()
    lines = [line for line in zip(*rows, strict=True) if line[0].way.name not in _NOT_DRAWN]
    ends = sorted(range(len(lines)), key=lambda number: lines[number][-1].held)
    above = 0.0
    for number in ends:
        line = lines[number]
        sizes = [row.held / 2**30 for row in line]
        ours = line[0].way.options is not None
        color = _COLORS[number % len(_COLORS)] if ours else _GREY
        axes.plot(counts, sizes, color=color, linewidth=2, linestyle="-" if ours else ":")
        above = max(sizes[-1], above * 1.17)  # names must not lie on each other
        axes.annotate(
            line[0].way.name,
            (counts[-1], above),
            xytext=(6, 0),
            textcoords="offset points",
            color=color,
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
    if memory is not None:
        axes.axhline(memory / 2**30, color="#444444", linewidth=1)
        said, place = f"{memory / 2**30:g} GiB", (counts[-1], memory / 2**30 * 1.03)
        axes.text(*place, said, color="#444444", ha="right")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(counts, [str(each) for each in counts])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("ranks (logarithmic)")
    axes.set_ylabel("GiB of each rank, without activations (logarithmic)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)

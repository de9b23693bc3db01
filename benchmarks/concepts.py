"""The three drawings of docs/concepts.md: where bytes lie, what a step does, how sums are ordered.

They show what the design is, and no measurement. Colours are Okabe and Ito's, which everybody tells
apart; every one has words beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, GREEN, PURPLE = "#0072B2", "#009E73", "#CC79A7"
INK, FAINT = "#222222", "#e8e8e8"
RANK_COLORS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")
RANKS = 4


class Kind(NamedTuple):
    """Something that ranks hold, and from which stage on each holds its share alone."""

    name: str
    color: str
    cut_from: int


KINDS = (
    Kind("parameters\n2 bytes", BLUE, 3),
    Kind("gradients\n2 bytes", "#B37700", 2),
    Kind("masters, m, s\n12 bytes", GREEN, 1),
)
# The bytes of a parameter on each rank; at stages 1 and 2 with the float32 sum of its shard.
STAGES = (
    ("DDP", "2 + 2 + 12 = 16"),
    ("stage 1", "2 + 2 + 16/W = 8"),
    ("stage 2", "2 + 16/W = 6"),
    ("stage 3", "16/W = 4"),
)


def concepts(out: Path = Path("docs")) -> None:
    """Draw the concepts of docs/concepts.md.

    Args:
        out: The folder.
    """
    print(*draw_concepts(out), sep="\n")


def draw_concepts(out: Path, suffix: str = "svg") -> list[Path]:
    """Draw all three into a folder, and return the files."""
    import matplotlib

    drawings: dict[str, Callable[[], Figure]] = {
        "bytes": bytes_figure,
        "step": step_figure,
        "sum": sum_figure,
    }
    written = []
    # The same file for the same drawing.
    with matplotlib.rc_context({"svg.hashsalt": "belief_dist", "font.size": 11}):
        for name, draw in drawings.items():
            path = out / f"concepts-{name}.{suffix}"
            metadata: dict[str, Any] = {"Date": None} if suffix == "svg" else {}
            draw().savefig(path, metadata=metadata, dpi=100)
            written.append(path)
    return written


def _blank(width: float, height: float) -> tuple[Figure, Any]:
    """Return a figure whose only panel has a unit for each tenth of an inch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set_xlim(0, width * 10)
    panel.set_ylim(0, height * 10)
    panel.axis("off")
    return figure, panel


def _box(panel: Any, x: float, y: float, width: float, height: float, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    panel.add_patch(Rectangle((x, y), width, height, **{"linewidth": 0, **style}))


def bytes_figure() -> Figure:
    """Where each byte lies: a row for each stage, in it a line for each of four ranks."""
    figure, panel = _blank(8.4, 4.8)
    lefts, widths = (9.0, 23.0, 37.0), (11.0, 11.0, 27.0)
    for kind, left in zip(KINDS, lefts, strict=True):
        panel.text(left, 43.3, kind.name, color=kind.color, fontweight="bold")
    panel.text(66.5, 43.3, "each rank,\nbytes a parameter", color=INK, fontweight="bold")
    for stage, (name, formula) in enumerate(STAGES):
        bottom = 33.5 - stage * 10.2
        panel.text(0.8, bottom + 3.4, name, color=INK, fontweight="bold")
        for kind, left, width in zip(KINDS, lefts, widths, strict=True):
            part = width / RANKS
            for rank in range(RANKS):
                y = bottom + (RANKS - 1 - rank) * 2.1
                cut = stage >= kind.cut_from
                _box(panel, left, y, width, 1.7, facecolor=FAINT if cut else kind.color)
                if cut:
                    _box(panel, left + rank * part, y, part, 1.7, facecolor=kind.color)
        panel.text(66.5, bottom + 3.4, formula, color=INK)
    panel.text(
        0.8,
        0.7,
        "Each group of four lines: ranks 0 to 3. Coloured is what a rank holds; W = 4 ranks.",
        color=INK,
        fontsize=10,
    )
    return figure


def step_figure() -> Figure:
    """What happens in a step: what one rank computes, and what travels, over time."""
    figure, panel = _blank(8.4, 3.9)
    compute, network, height = 21.5, 11.5, 4.6
    count, wide, gap = 4, 5.6, 0.25

    def task(x: float, y: float, width: float, label: str, color: str) -> None:
        _box(panel, x, y, width - gap, height, facecolor=color)
        panel.text(x + (width - gap) / 2, y + height / 2, label, ha="center", va="center")

    panel.text(0.6, compute + 1.6, "this rank\ncomputes", color=INK, va="center")
    panel.text(0.6, network + 1.9, "what\ntravels", color=INK, va="center")
    start = 10.5
    backward, light = RANK_COLORS[1], RANK_COLORS[0]
    for index, bucket in enumerate(reversed(range(count))):
        x = start + index * wide
        task(x, compute, wide, str(bucket), backward)
        task(x + wide, network, wide, str(bucket), backward)
    panel.text(start, compute + 6, "backward, last layers first", color=INK)
    panel.text(start + wide, network - 2.8, "reduce: sum over the ranks", color=INK)
    agree = start + (count + 1) * wide
    task(agree, network, 2.4, "", PURPLE)
    panel.annotate(
        "agree: one small message;\nall ranks take the step, or none",
        (agree + 1, network - 0.2),
        xytext=(agree - 9.5, 2.2),
        color=INK,
        arrowprops={"arrowstyle": "-", "color": PURPLE},
    )
    update, narrow = agree + 2.4, 4.4
    for bucket in range(count):
        task(update + bucket * narrow, compute, narrow, str(bucket), GREEN)
        task(update + (bucket + 1) * narrow, network, narrow, str(bucket), light)
    panel.text(update, compute + 6, "update, 1/W each", color=INK)
    panel.text(update + narrow + 3.6, network - 2.8, "gather the parameters", color=INK)
    forward = update + count * narrow
    for bucket in range(count):
        task(forward + bucket * wide, compute, wide, str(bucket), "#bbbbbb")
    panel.text(forward, compute + 6, "next forward", color=INK)
    end = update + count * narrow
    panel.annotate("", (start + count * wide, 32), (end, 32), arrowprops={"arrowstyle": "<->"})
    panel.text((start + count * wide + end) / 2, 33.2, "optimizer.step()", ha="center", color=INK)
    for x in (start + count * wide - gap / 2, end - gap / 2):
        panel.plot([x, x], [network - 1, 31.5], color="#999999", linewidth=0.8, linestyle=":")
    panel.text(
        0.6, 36.3, "Buckets 0 to 3, in the order of the layers; time goes to the right", color=INK
    )
    return figure


Tree = Any  # a number of a gradient, or a pair of trees
IN_ORDER: Tree = (((0, 1), 2), 3)
# Number of ranks, how a usual job adds, which rank computes which gradient.
JOBS: tuple[tuple[int, Tree, tuple[int, ...]], ...] = (
    (1, IN_ORDER, (0, 0, 0, 0)),
    (2, ((0, 2), (1, 3)), (0, 1, 0, 1)),
    (4, (((1, 2), 3), 0), (0, 1, 2, 3)),
)


def leaves(tree: Tree) -> list[int]:
    """Return the gradients of a sum, from left to right."""
    return [tree] if isinstance(tree, int) else [*leaves(tree[0]), *leaves(tree[1])]


def sum_figure() -> Figure:
    """How four gradients are added: as usual, and numbered, on 1, 2 and 4 ranks."""
    figure, panel = _blank(8.4, 5.0)
    panel.text(11, 46.5, "as usual: the order depends on ranks", color=INK, fontweight="bold")
    panel.text(49, 46.5, "micro_batches=4: always one order", color=INK, fontweight="bold")
    for row, (ranks, tree, owners) in enumerate(JOBS):
        bottom = 33.0 - row * 14.3
        panel.text(
            0.8, bottom + 4, f"{ranks} {'rank' if ranks == 1 else 'ranks'}", fontweight="bold"
        )
        for left, shown in ((11.0, tree), (49.0, IN_ORDER)):
            _draw_sum(panel, shown, left, bottom, owners)
    panel.text(
        0.8,
        0.8,
        "g0 to g3: gradients of four micro-batches. One colour: computed by one rank.",
        color=INK,
        fontsize=10,
    )
    return figure


def _draw_sum(panel: Any, tree: Tree, left: float, bottom: float, owners: tuple[int, ...]) -> None:
    """Draw the gradients from left to right, and above them which two are added when."""
    step, size, rise = 8.0, 4.2, 2.4
    places = {}
    for place, number in enumerate(leaves(tree)):
        x = left + place * step
        places[number] = x + size / 2
        _box(panel, x, bottom, size, size - 0.6, facecolor=RANK_COLORS[owners[number]])
        middle = (x + size / 2, bottom + (size - 0.6) / 2)
        panel.text(*middle, f"g{number}", ha="center", va="center")

    def join(node: Tree) -> tuple[float, float]:
        if isinstance(node, int):
            return places[node], bottom + size - 0.6
        (x1, y1), (x2, y2) = join(node[0]), join(node[1])
        top = max(y1, y2) + rise
        panel.plot([x1, x1, x2, x2], [y1, top, top, y2], color=INK, linewidth=1.3)
        middle = (x1 + x2) / 2
        panel.plot(middle, top, "o", color="white", markersize=9, markeredgecolor=INK)
        panel.text(middle, top - 0.05, "+", ha="center", va="center", fontsize=9)
        return middle, top + 0.5

    join(tree)

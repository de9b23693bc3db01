"""Pictures of a run's records, each as SVG; what the records do not tell is left out."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from belief_dist.telemetry.events import SKIPS, Event

Rows = Sequence[dict[str, Any]]

GROUP = r"/group\d+"
_MOST_GROUPS = 6  # with pictures of their own
_MOST_NAMES = 50  # of parameters beside a map
_BLUE = "#4477aa"
_WIDTH, _HEIGHT = 6.2, 3.3  # inches


class Plot(NamedTuple):
    """Lines: some of the columns of the records, over the steps."""

    title: str
    columns: str  # a pattern that their whole names have; the last part of a name is its label
    is_log: bool = False
    is_share: bool = False  # from 0 to 1
    unit: float = 1.0  # of what is shown
    from_zero: bool = False


TRAINING = (
    Plot("Loss", r".*loss"),
    Plot("Learning rate", rf"lr{GROUP}"),
    Plot("Norm of the gradient, before clipping", r"l2_norm/grad/global", True),
    Plot("Update to weight: RMS of a step over that of weights", f"update_to_weight{GROUP}", True),
)
EPS = Plot("Share of weights where eps dominates s", rf"belief/eps_share{GROUP}", is_share=True)
# By kind of quantile; means of all groups are drawn where there are no quantiles.
BELIEF = {
    "signal": Plot("Signal: mean of |m| / sqrt(s)", rf"belief/signal{GROUP}"),
    "surprise": Plot("Surprise: mean of (g - m)² / s", rf"belief/surprise{GROUP}"),
}
SECONDS = Plot("Seconds per step", r"time/seconds_per_step")
MEMORY = Plot("Memory of the process, GiB", r"memory/.*", unit=1 << 30, from_zero=True)
# Parts of a step from the bottom: what computes is blue, and what communicates red. Those without
# columns are what is left of the whole and of `step`.
REST, REST_OF_STEP = "forward, backward, data", "rest of step()"
PARTS = (
    (REST, "#dfe7ee", None),
    ("update", _BLUE, r"time/step/update"),
    (REST_OF_STEP, "#a9c4dc", None),
    ("gradients: collect, wait for sums", "#cc3311", r"time/(step|backward)/reduce(_wait)?"),
    ("agree on the step", "#ee7733", r"time/step/consensus"),
    ("parameters: give, wait for", "#f4b183", r"time/(step|forward)/gather(_wait)?"),
)
MAPS = {
    "update_to_weight": "Update to weight, by parameter",
    "belief/signal_p50": "Median signal, by parameter",
    "belief/surprise_p50": "Median surprise, by parameter",
}


def pictures(rows: Rows, events: Sequence[Event]) -> Iterator[str]:
    """Give all pictures that the records allow.

    Raises:
        ValueError: matplotlib is missing.
    """
    for plot in TRAINING:
        yield from _lines(plot, rows, events)
    groups = groups_of(rows)
    for kind, means in BELIEF.items():
        bands = [svg for group in groups for svg in _band(kind, group, rows, events)]
        yield from bands or _lines(means, rows, events)
    yield from _lines(EPS, rows, events)
    yield from _parts(rows, events) or _lines(SECONDS, rows, events)
    yield from _lines(MEMORY, rows, events)
    for column, title in MAPS.items():
        yield from _map(column, title, rows, events)


def groups_of(rows: Rows) -> list[str]:
    """Return the names of the first param groups."""
    found = {key.removeprefix("lr/") for row in rows for key in row if re.match(r"lr/group", key)}
    return sorted(found, key=lambda name: (len(name), name))[:_MOST_GROUPS]


def parameters_of(rows: Rows, column: str) -> list[str]:
    """Return the parameters of which a column tells, in their order in the model."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(f"{column}/"))
    names = (key.removeprefix(f"{column}/") for key in keys)
    return [name for name in names if not re.fullmatch(r"group\d+", name)]


# - One picture each


def _lines(plot: Plot, rows: Rows, events: Sequence[Event]) -> list[str]:
    pattern = re.compile(plot.columns)
    columns = sorted({key for row in rows for key in row if pattern.fullmatch(key)})
    lines = [(column, *_points(column, rows)) for column in columns]
    lines = [line for line in lines if line[1]]
    if not lines:
        return []

    def draw(axes: Any) -> None:
        for column, steps, values in lines:
            shown = [value / plot.unit for value in values]
            axes.plot(steps, shown, marker=_marker(rows), lw=1.1, label=column.rpartition("/")[2])
        if plot.is_log and not any(value <= 0 for _, _, values in lines for value in values):
            axes.set_yscale("log")
        if plot.is_share:
            axes.set_ylim(-0.03, 1.03)
        if plot.from_zero:
            axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        if len(lines) > 1:
            axes.legend(fontsize=8)

    return [_picture(plot.title, draw, events)]


def _band(kind: str, group: str, rows: Rows, events: Sequence[Event]) -> list[str]:
    """Draw the quantiles of one group: half of its weights are above the line."""
    low, middle, high = (
        dict(zip(*_points(f"belief/{kind}_{part}/{group}", rows), strict=True))
        for part in ("p05", "p50", "p95")
    )
    steps = [step for step in middle if step in low and step in high]
    if not steps:
        return []
    mean = dict(zip(*_points(f"belief/{kind}/{group}", rows), strict=True))
    formula = {"signal": "|m| / sqrt(s)", "surprise": "(g - m)² / s"}[kind]
    positive = [value for each in (low, middle, high) for value in each.values() if value > 0]
    # What is smaller lies on the axis, as nothing does that is zero.
    least = max(min(positive), max(positive) * 1e-9) if positive else 1.0

    def draw(axes: Any) -> None:
        lower, line, upper = (
            [max(each[step], least) for step in steps] for each in (low, middle, high)
        )
        axes.fill_between(
            steps, lower, upper, color=_BLUE, alpha=0.25, lw=0, label="5 to 95 % of weights"
        )
        axes.plot(steps, line, marker=_marker(rows), c=_BLUE, lw=1.3, label="median")
        axes.plot(list(mean), list(mean.values()), c="#222222", lw=0.9, ls="--", label="mean")
        axes.set_yscale("log")
        axes.set_ylim(bottom=least)
        axes.legend(fontsize=8)

    return [_picture(f"{kind.capitalize()} of {group}: {formula}", draw, events)]


def _parts(rows: Rows, events: Sequence[Event]) -> list[str]:
    """Draw where the time of a step goes, stacked."""
    needed = ("time/optimizer_step", "time/seconds_per_step")
    whole = [row for row in rows if all(isinstance(row.get(key), float) for key in needed)]
    if not whole:
        return []
    heights: dict[str, list[float]] = {name: [] for name, _, _ in PARTS}
    for row in whole:
        phases = {
            key: value
            for key, value in row.items()
            if re.match(r"time/(step|backward|forward)/", key) and isinstance(value, float)
        }
        found = {
            name: sum(value for key, value in phases.items() if re.fullmatch(pattern, key))
            for name, _, pattern in PARTS
            if pattern is not None
        }
        in_step = sum(value for key, value in phases.items() if key.startswith("time/step/"))
        outside = sum(phases.values()) - in_step
        found[REST_OF_STEP] = row["time/optimizer_step"] - in_step
        found[REST] = row["time/seconds_per_step"] - row["time/optimizer_step"] - outside
        for name, value in found.items():
            heights[name].append(max(value, 0.0) * 1e3)

    def draw(axes: Any) -> None:
        shown = [(name, color) for name, color, _ in PARTS if any(heights[name])]
        steps = [row["step"] for row in whole]
        values = [heights[name] for name, _ in shown]
        if len(steps) == 1:  # an area of one point has no width
            steps, values = [steps[0] - 1, steps[0]], [each * 2 for each in values]
        axes.stackplot(
            steps, values, colors=[color for _, color in shown], labels=[name for name, _ in shown]
        )
        handles, labels = axes.get_legend_handles_labels()
        axes.figure.legend(
            handles[::-1], labels[::-1], fontsize=7.5, loc="outside lower center", ncols=2
        )
        axes.set_ylabel("ms")
        axes.margins(x=0)

    title = "Time per step; red is communication that nothing hides"
    return [_picture(title, draw, events)]


def _map(column: str, title: str, rows: Rows, events: Sequence[Event]) -> list[str]:
    """Draw a value of every parameter (from the input down) over the records, by its logarithm."""
    names = parameters_of(rows, column)
    told = [row for row in rows if any(f"{column}/{name}" in row for name in names)]
    if not told:
        return []
    values = [[_log(row.get(f"{column}/{name}")) for row in told] for name in names]
    steps = [row["step"] for row in told]

    def draw(axes: Any) -> None:
        width = max(steps[-1] - steps[0], 1) / max(len(steps) - 1, 1)
        extent = (steps[0] - width / 2, steps[-1] + width / 2, len(names) - 0.5, -0.5)
        image = axes.imshow(
            values, aspect="auto", interpolation="nearest", cmap="viridis", extent=extent
        )
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02, format=lambda x, _: f"{10**x:.1g}")
        bar.ax.tick_params(labelsize=7)
        every = -(-len(names) // _MOST_NAMES)
        axes.set_yticks(range(0, len(names), every), names[::every], fontsize=6)
        axes.grid(visible=False)

    height = max(_HEIGHT, 0.9 + 0.13 * min(len(names), _MOST_NAMES))
    return [_picture(title, draw, (), height)]


# - What all have


def _picture(
    title: str, draw: Callable[[Any], None], events: Sequence[Event], height: float = _HEIGHT
) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "a report needs matplotlib, which is not installed: pip install 'belief-dist[report]'."
        ) from None
    # Text stays text, in the reader's font, and ids of one picture are not those of another.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(alpha=0.25)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step")
        draw(axes)
        for event in events:
            if event.kind == "checkpoint":
                axes.axvline(event.step, ls=":", lw=0.8, c="grey")
            elif event.kind in SKIPS:
                axes.axvline(event.step, lw=0.8, c="tab:red", alpha=0.5)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
    # Without the head of an XML file, and who made it when.
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    return text[text.index("<svg") :]


def _marker(rows: Rows) -> str | None:
    return "o" if len(rows) == 1 else None


def _log(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and value > 0
    return math.log10(value) if is_number else math.nan


def _points(column: str, rows: Rows) -> tuple[list[int], list[float]]:
    """Return the steps and values of a column, with gaps where numbers are not finite."""
    steps, values = [], []
    for row in rows:
        value = row.get(column, "")
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            steps.append(row["step"])
            values.append(math.nan if value is None else float(value))
    return (steps, values) if any(map(math.isfinite, values)) else ([], [])

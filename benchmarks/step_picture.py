"""Training steps as a picture: how long ours take beside those of peers.

The table has every engine; the picture has those that one would choose between.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.engines import BASELINE, COMPUTE, OURS
from benchmarks.pictures import BLUE, DPI, GREY, canvas, plain
from benchmarks.plot import step_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What the picture has of the engines, from above.
SHOWN = (
    f"{OURS} ZeRO-1",
    f"{OURS} ZeRO-2",
    BASELINE,
    "DDP + official AdaBelief",
    "DDP + ZeroRedundancy AdamW",
    "FSDP2 + AdamW",
    "DeepSpeed ZeRO-1 + AdamW",
    "DeepSpeed ZeRO-2 + AdamW",
    "DeepSpeed ZeRO-3 + AdamW",
)


def draw_steps(files: Sequence[Path], out: Path) -> None:
    """Draw one panel of bars for each result of the step benchmark.

    Raises:
        ValueError: A file holds no such result.
    """
    steps_figure(step_results(files)).savefig(out, dpi=DPI)


def steps_figure(results: Sequence[dict[str, Any]]) -> Figure:
    """Return a panel of bars for each result; all have the same engines, one below the other."""
    known = {row["name"] for result in results for row in result["rows"]}
    shown = [name for name in SHOWN if name in known] or sorted(known - {COMPUTE})
    figure = canvas(1.5 + 0.32 * len(shown))
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for number, (panel, result) in enumerate(zip(panels, results, strict=True)):
        _draw(panel, result, shown)
        panel.set_yticks(range(len(shown)), shown if number == 0 else [], fontsize=10)
        for label, name in zip(panel.get_yticklabels(), shown, strict=False):
            label.set_color(_color(name))
    figure.subplots_adjust(left=0.3, right=0.97, bottom=0.14, top=0.91, wspace=0.12)
    return figure


def _color(name: str) -> str:
    return BLUE if name.startswith(OURS) else GREY


def _draw(panel: Any, result: dict[str, Any], shown: Sequence[str]) -> None:
    plain(panel)
    medians = {row["name"]: row["median_ms"] for row in result["rows"]}
    ratios = {row["name"]: row["ratios"] for row in result["rows"]}
    longest = max(medians.values())
    for place, name in enumerate(shown):
        if name not in medians:
            panel.text(0.02 * longest, place, "not run", va="center", fontsize=10, color=GREY)
            continue
        panel.barh(place, medians[name], color=_color(name), height=0.7)
        ratio = ratios[name].get(BASELINE)
        times = f"{ratio:.2f}" if ratio else ""
        panel.text(medians[name] + 0.02 * longest, place, times, va="center", fontsize=10)
    if COMPUTE in medians:
        panel.axvline(medians[COMPUTE], color="black", linestyle=":")
        panel.text(
            medians[COMPUTE],
            -0.7,
            " forward and backward alone",
            fontsize=8,
            ha="left",
            va="bottom",
        )
    panel.set_xlim(0, 1.18 * longest)
    panel.set_ylim(len(shown) - 0.4, -1.2)
    panel.set_xlabel("milliseconds; at the bars: times DDP")
    settings = result["settings"]
    where = "one host" if settings["link"] == "loopback" else settings["link"]
    panel.set_title(f"{settings['ranks']} ranks, {where}", loc="left", fontsize=11)

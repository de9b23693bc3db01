"""Figures about what the paper claims for images, language, and GANs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from examples.evidence.estimates import Interval
from examples.evidence.findings import Findings
from examples.evidence.style import colour, intervals, line, name_lines, picture

_ASTRAY = 3  # times the median of a panel
# Whose way is drawn; of eight, nothing would be seen. Where each ends is below, for all.
_CURVES = ("SGD", "Adam", "AdaBelief, eps 1e-16")


def draw_images(found: Sequence[Findings], path: Path) -> None:
    """Draw some train and test curves, and below them the test accuracy at the end."""
    shown = [(each, setting) for each in found for setting in each.settings]
    with picture(path, 2 * len(shown), len(shown), (2.9, 2.9)) as panels:
        for (each, setting), curves, ends in zip(
            shown, panels[: len(shown)], panels[len(shown) :], strict=True
        ):
            _curves(curves, each, setting)
            curves.set(title=setting, xlabel="epoch")
            names = each.contenders(setting)
            intervals(ends, [(n, each.interval(setting, n, "test_accuracy")) for n in names])
            ends.set_xlabel("test accuracy at the end, %,\nwith 95 % intervals")
            if names == shown[0][0].contenders(shown[0][1]) and ends is not panels[len(shown)]:
                ends.set_yticklabels([])  # they are those of the first one
        panels[0].set_ylabel("accuracy, %: test, and training (dotted)")
        for place, name in enumerate(_CURVES):
            shown_at = {"transform": panels[0].transAxes, "fontsize": 8, "color": colour(name)}
            panels[0].text(0.03, 0.94 - 0.08 * place, name, **shown_at)


def _curves(panel: Any, found: Findings, setting: str) -> None:
    for name in _CURVES:
        for metric, dashes in (("test_accuracy", "-"), ("train_accuracy", ":")):
            curve = found.curve(setting, name, metric)
            steps = list(curve)
            panel.plot(steps, [curve[s].mean for s in steps], dashes, color=colour(name), lw=1.6)
        band = found.curve(setting, name, "test_accuracy")
        low, high = [each.low for each in band.values()], [each.high for each in band.values()]
        panel.fill_between(list(band), low, high, color=colour(name), alpha=0.08, linewidth=0)


def draw_ends(
    shown: Sequence[tuple[Findings, str, str]], xlabel: str, columns: int, path: Path
) -> None:
    """Draw the means and intervals of a metric at the end, one panel for each setting.

    Args:
        shown: Findings, their setting, the metric.
        xlabel: Below all panels.
        columns: Of panels.
        path: Of the picture.
    """
    with picture(path, len(shown), columns, (3.6, 2.1)) as panels:
        for panel, (found, setting, metric) in zip(panels, shown, strict=True):
            rows = [(n, found.interval(setting, n, metric)) for n in found.contenders(setting)]
            intervals(panel, _without_strays(panel, rows))
            panel.set_title(setting)
            panel.set_xlabel(xlabel)


def _without_strays(panel: Any, rows: list[tuple[str, Interval]]) -> list[tuple[str, Interval]]:
    """Write the means of runs that went astray, which would hide all others, and blank them."""
    typical = median(found.mean for _, found in rows if math.isfinite(found.mean))
    kept = []
    for line_number, (name, found) in enumerate(rows):
        if not found.mean <= _ASTRAY * typical:
            where = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center"}
            panel.annotate(f"{found.mean:.2g} →", (1, line_number), fontsize=8, **where)
            found = Interval(math.nan, math.nan, math.nan, found.seeds)
        kept.append((name, found))
    return kept


def draw_learning_rates(found: Findings, setting: str, path: Path) -> None:
    """Draw the score of every learning rate that was tried, with the seed for tuning."""
    with picture(path, 1, 1, (5.2, 3.0)) as (panel,):
        ends = []
        for name in found.contenders(setting):
            if found.cells[setting, name].contender.rule == "SGD":
                continue  # its learning rates are others
            known = [
                (run.lr, points[-1][found.study.score])
                for run, points in found.store.items()
                if run.tunes and (run.setting, run.contender) == (setting, name)
            ]
            panel.plot(*zip(*known, strict=True), line(name), marker="o", ms=4, color=colour(name))
            ends.append((*known[-1], name))
        panel.set(
            xscale="log",
            xlabel="learning rate (log scale)",
            ylabel="validation loss, nats per byte",
        )
        name_lines(panel, ends)

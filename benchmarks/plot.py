"""Pictures of what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import BASELINE, COMPUTE, OURS

_COLUMNS = 2


def draw_steps(files: Sequence[Path], out: Path) -> None:
    """Draw one panel of bars for each result of the step benchmark.

    Raises:
        ValueError: A file holds no such result.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = []
    for file in files:
        content = json.loads(file.read_text())
        if "step" not in content:
            raise ValueError(f"{file} holds no result of `step --json`.")
        results.append(content["step"])
    lines = -(-len(results) // _COLUMNS)
    figure, axes = pyplot.subplots(
        lines, min(_COLUMNS, len(results)), figsize=(13, 4.2 * lines), squeeze=False
    )
    for panel in axes.flat[len(results) :]:
        panel.remove()
    for panel, result in zip(axes.flat, results, strict=False):
        _draw(panel, result)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _draw(panel: Any, result: dict[str, Any]) -> None:
    medians = {row["name"]: row["median_ms"] for row in result["rows"]}
    compute = medians.pop(COMPUTE, 0.0)
    names = list(reversed(medians))
    colors = ["tab:blue" if name.startswith(OURS) else "tab:gray" for name in names]
    panel.barh(names, [medians[name] for name in names], color=colors)
    if compute:
        panel.axvline(compute, color="black", linestyle=":", label="forward and backward alone")
    if BASELINE in medians:
        panel.axvline(medians[BASELINE], color="tab:red", linewidth=1, label=BASELINE)
    settings = result["settings"]
    panel.set_title(
        f"{settings['ranks']} ranks, {settings['link']}, {settings['million parameters']} M "
        f"parameters, {settings['dtype']}",
        fontsize=10,
    )
    panel.set_xlabel("milliseconds per step, median")
    panel.tick_params(axis="y", labelsize=8)
    panel.legend(fontsize=8)

"""What the step benchmark has measured, as Markdown."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import BASELINE, OURS


def step_results(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the results of the step benchmark.

    Raises:
        ValueError: A file holds no such result.
    """
    results = []
    for file in files:
        content = json.loads(file.read_text())
        if "step" not in content:
            raise ValueError(f"{file} holds no result of `step --json`.")
        results.append(content["step"])
    return results


def markdown_steps(files: Sequence[Path]) -> str:
    """Return one table for each result of the step benchmark.

    Raises:
        ValueError: A file holds no such result.
    """
    return "\n\n".join(_markdown(result) for result in step_results(files))


def _markdown(result: dict[str, Any]) -> str:
    columns = {
        "ms": lambda row: f"{row['median_ms']:.0f}",
        "times DDP": lambda row: f"{row['ratios'].get(BASELINE) or math.nan:.2f}",
        "forward": lambda row: f"{row['phases_ms']['forward']:.0f}",
        "backward": lambda row: f"{row['phases_ms']['backward']:.0f}",
        "step": lambda row: f"{row['phases_ms'].get('step', 0):.0f}",
        "exposed": lambda row: f"{row['exposed_ms']:.0f}",
        "peak MiB": lambda row: f"{row['peak_mib']:.0f}",
        "sent MB": lambda row: f"{row['bytes_sent'] / 1e6:.0f}",
    }
    if not any(row["bytes_sent"] for row in result["rows"]):
        del columns["sent MB"]
    lines = [f"{_title(result)}; medians of {len(result['rows'][0]['ms'])} steps:", ""]
    lines.append("| | " + " | ".join(columns) + " |")
    lines.append("|---|" + "---|" * len(columns))
    for row in result["rows"]:
        cells = [row["name"], *(column(row) for column in columns.values())]
        if row["name"].startswith(OURS):
            cells[0] = f"**{cells[0]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _title(result: dict[str, Any]) -> str:
    settings = result["settings"]
    return (
        f"{settings['ranks']} ranks, {settings['link']}, {settings['million parameters']} M "
        f"parameters, {settings['dtype']}"
    )

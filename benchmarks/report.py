"""What was measured, as tables on the terminal and as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


@dataclass
class Row:
    """One contender and how long each of its repetitions took."""

    name: str
    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None  # memory of one rank, beyond that of a process without a model

    @property
    def median(self) -> float:
        """Return the median in seconds."""
        return median(self.seconds)


@dataclass
class Result:
    """The outcome of one benchmark."""

    title: str
    settings: dict[str, Any]
    rows: list[Row]
    baselines: Mapping[str, str]  # short names of rows that all are compared with, by row name
    notes: list[str] = field(default_factory=list)

    def ratio(self, row: Row, baseline: str) -> float | None:
        """Return how many times as long as `baseline` a row takes, by medians."""
        found = [other for other in self.rows if other.name == baseline]
        return row.median / found[0].median if found else None

    def as_json(self) -> dict[str, Any]:
        """Return everything that JSON can hold, all single timings included."""
        rows = [
            {
                "name": row.name,
                "median_ms": row.median * 1e3,
                "min_ms": min(row.seconds) * 1e3,
                "ratios": {name: self.ratio(row, name) for name in self.baselines},
                "peak_mib": row.peak_mib,
                "ms": [seconds * 1e3 for seconds in row.seconds],
            }
            for row in self.rows
        ]
        return {"title": self.title, "settings": self.settings, "rows": rows, "notes": self.notes}


def machine() -> dict[str, Any]:
    """Return what the timings depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": "not used",
    }


def machine_line() -> str:
    """Return the machine in one line."""
    about = machine()
    return (
        f"{about['cpu']}, {about['cores']} cores; torch {about['torch']}, "
        f"Python {about['python']}. Nothing ran on a GPU."
    )


def show(console: Console, result: Result) -> None:
    """Print a result as a table."""
    settings = ", ".join(f"{key} {value}" for key, value in result.settings.items())
    table = Table(box=SIMPLE_HEAD)
    table.add_column(no_wrap=True)
    ratios = [f"times\n{short}" for short in result.baselines.values()]
    for heading in ("median\nms", "min\nms", *ratios, "peak\nMiB", "runs"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        compared = [result.ratio(row, name) for name in result.baselines]
        table.add_row(
            row.name,
            f"{row.median * 1e3:.1f}",
            f"{min(row.seconds) * 1e3:.1f}",
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in compared),
            "-" if row.peak_mib is None else f"{row.peak_mib:.0f}",
            str(len(row.seconds)),
        )
    console.print(f"\n[bold]{result.title}[/bold]: {settings}")
    console.print(table)
    for note in result.notes:
        console.print(note, markup=False)


def save(path: Path, results: dict[str, Result]) -> None:
    """Write all results and the machine to a JSON file."""
    content = {"machine": machine(), **{name: r.as_json() for name, r in results.items()}}
    path.write_text(json.dumps(content, indent=2) + "\n")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()

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
    phases: dict[str, list[float]] = field(default_factory=dict)  # parts of `seconds`, by name
    # Memory of one rank in each turn, beyond that of a process without a model.
    peaks_mib: list[float] = field(default_factory=list)
    sent: int | None = None  # bytes that leave a rank per step

    @property
    def median(self) -> float:
        """Return the median in seconds."""
        return median(self.seconds)

    @property
    def peak_mib(self) -> float | None:
        """Return the median of `peaks_mib`."""
        return median(self.peaks_mib) if self.peaks_mib else None


@dataclass
class Result:
    """The outcome of one benchmark."""

    title: str
    settings: dict[str, Any]
    rows: list[Row]
    baselines: Mapping[str, str]  # short names of rows that all are compared with, by row name
    notes: list[str] = field(default_factory=list)
    beyond: str | None = None  # name of a row whose median the "exposed" column takes off

    def exposed(self, row: Row) -> float | None:
        """Return the seconds that a row takes longer than `beyond`, by medians."""
        found = [other for other in self.rows if other.name == self.beyond]
        return row.median - found[0].median if found else None

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
                "exposed_ms": _milli(self.exposed(row)),
                "phases_ms": {name: median(each) * 1e3 for name, each in row.phases.items()},
                "peak_mib": row.peak_mib,
                "bytes_sent": row.sent,
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


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def show(console: Console, result: Result) -> None:
    """Print a result as a table; columns that nothing was measured for are left out."""
    phases = list(dict.fromkeys(phase for row in result.rows for phase in row.phases))
    columns: dict[str, list[str]] = {"median\nms": [f"{r.median * 1e3:.1f}" for r in result.rows]}
    columns["min\nms"] = [f"{min(row.seconds) * 1e3:.1f}" for row in result.rows]
    for name, short in result.baselines.items():
        columns[f"times\n{short}"] = [_cell(result.ratio(row, name), 2) for row in result.rows]
    for phase in phases:
        each = [row.phases.get(phase) for row in result.rows]
        columns[f"{phase}\nms"] = [_cell(_milli(median(e) if e else None), 0) for e in each]
    columns["exposed\nms"] = [_cell(_milli(result.exposed(row)), 0) for row in result.rows]
    columns["peak\nMiB"] = [_cell(row.peak_mib, 0) for row in result.rows]
    columns["sent\nMB"] = [_cell(row.sent and row.sent / 1e6, 1) for row in result.rows]
    columns["runs"] = [str(len(row.seconds)) for row in result.rows]
    columns = {heading: cells for heading, cells in columns.items() if set(cells) != {"-"}}
    table = Table(box=SIMPLE_HEAD)
    table.add_column(no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row, *cells in zip(result.rows, *columns.values(), strict=True):
        table.add_row(row.name, *cells)
    settings = ", ".join(f"{key} {value}" for key, value in result.settings.items())
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

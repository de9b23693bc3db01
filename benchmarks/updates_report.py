"""Timings of updates as a table and JSON."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.report import machine
from benchmarks.update import ADAMW, Timing, Updates

_MI = 1 << 20


def size_of(elements: int) -> str:
    """Return a number of parameters for people."""
    return f"{elements / _MI:g} Mi" if elements >= _MI else f"{elements >> 10} Ki"


def _rows(timings: list[Timing]) -> list[dict[str, Any]]:
    """Return what the table shows of contenders at one size and number of threads."""
    by_name = {timing.name: timing for timing in timings}
    rows = []
    for each in timings:
        floor = by_name.get(each.floor or "")
        adamw = by_name.get(ADAMW)
        rows.append(
            {
                "name": each.name,
                "ms": each.median * 1e3,
                "min ms": min(each.seconds) * 1e3,
                "ns/element": each.median / each.elements * 1e9,
                "GB/s": each.nbytes and each.nbytes * each.elements / each.median / 1e9,
                "bytes": each.nbytes,
                "times floor": floor and each.median / floor.median,
                "times AdamW": adamw and each.median / adamw.median,
                "runs": len(each.seconds),
            }
        )
    return rows


def _grouped(updates: Updates) -> dict[tuple[int, int], list[Timing]]:
    groups: dict[tuple[int, int], list[Timing]] = {}
    for timing in updates.timings:
        groups.setdefault((timing.elements, timing.threads), []).append(timing)
    return groups


def show_updates(console: Console, updates: Updates) -> None:
    """Print a table for each size and number of threads."""
    digits = {"ms": 2, "min ms": 2, "ns/element": 3, "GB/s": 1, "times floor": 2, "times AdamW": 2}
    for (elements, threads), timings in _grouped(updates).items():
        rows = _rows(timings)
        headings = [h for h in rows[0] if any(row[h] is not None for row in rows)]
        table = Table(box=SIMPLE_HEAD)
        for heading in headings:
            table.add_column("" if heading == "name" else heading, no_wrap=True)
            table.columns[-1].justify = "left" if heading == "name" else "right"
        for row in rows:
            cells = [row[h] for h in headings]
            shown = [
                "-" if c is None else f"{c:.{digits[h]}f}" if h in digits else str(c)
                for h, c in zip(headings, cells, strict=True)
            ]
            table.add_row(*shown)
        console.print(
            f"\n[bold]One update[/bold] of {size_of(elements)} parameters, {threads} threads"
        )
        console.print(table)
    for note in updates.notes:
        console.print(note, markup=False)


def updates_content(updates: Updates) -> dict[str, Any]:
    """Return all timings and the machine, for JSON and pictures."""
    results = [
        {"elements": elements, "threads": threads, "rows": _rows(timings)}
        for (elements, threads), timings in _grouped(updates).items()
    ]
    return {"machine": machine(), "update": results, "notes": updates.notes}

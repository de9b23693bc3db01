"""What commands print to, and how they tell and keep results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import Result, machine_line, save, show

_WIDTH = 132  # of the widest table


def console() -> Console:
    """Return a console that is wide enough, after it has told the machine."""
    wide = Console()
    wide.width = max(wide.width, _WIDTH)
    wide.print(machine_line(), markup=False)
    return wide


def tell(results: dict[str, Result], json: Path | None) -> None:
    """Print results, and keep them in a file if one is given."""
    out = console()
    for result in results.values():
        show(out, result)
    if json is not None:
        save(json, results)


def table_of(title: str, rows: Sequence[dict[str, Any]], left: Sequence[str]) -> Table:
    """Return a table of rows with the same keys, of which `left` are words."""
    table = Table(title=title)
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading in left else "right")
    for row in rows:
        table.add_row(*map(_shown, row.values()))
    return table


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)

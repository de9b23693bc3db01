"""How commands show what they found: to people by rich, to programs whole and plain."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from belief_dist.checkpoint.progress import shown_by


def print_json(content: Any) -> None:
    """Print something as JSON; what JSON does not know, as text."""
    print(json.dumps(content, indent=2, default=str))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; where it goes to no terminal, with whole cells and without colours."""
    if not sys.stdout.isatty():  # a pipe has no width, and its reader wants whole names
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for row in (head, *rows):
            padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(padded).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*head)
    for column, cells in zip(table.columns, zip(*rows, strict=True), strict=False):
        # Numbers stay whole; on a narrow terminal names and sentences take more lines.
        column.no_wrap = max(map(len, cells)) <= 12
        column.overflow = "fold"
    for row in rows:
        table.add_row(*map(Text, row))  # as it is: names may have brackets, rich's markup
    Console().print(table)


@contextmanager
def progress_bars() -> Iterator[None]:
    """Show how far work on checkpoints is, on a terminal, beside what goes to a pipe."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bars:

        def begin(what: str, nbytes: int) -> Callable[[int], None]:
            # Without a size, as of a file that one call writes, the bar only moves.
            task = bars.add_task(what, total=nbytes or None)
            return lambda count: bars.advance(task, count)

        with shown_by(begin):
            yield

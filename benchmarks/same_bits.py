"""Commands that compare bits: with one process, and between numbers of ranks."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from pathlib import Path

from benchmarks.any_world_size import (
    any_world_size_table,
    run_any_world_size,
)
from benchmarks.any_world_size_picture import draw_any_world_size
from benchmarks.bits import bits_table, run_bits
from benchmarks.console import console
from benchmarks.report import machine


def bits(ranks: list[int] | None = None, steps: int = 10) -> None:
    """Compare parameters bit for bit with one process that adds gradients in rank order.

    Args:
        ranks: Processes; 2, 3 and 4 by default.
        steps: Of training.
    """
    console().print(bits_table(run_bits(ranks or [2, 3, 4], steps)))


def any_world_size(
    ranks: list[int] | None = None,
    steps: int = 200,
    json: Path | None = None,
    png: Path | None = None,
) -> None:
    """Train one job at several numbers of ranks, and tell what differs, beside peers.

    Args:
        ranks: Processes, each a divisor of 12; 1, 2, 3 and 4 by default.
        steps: Of training.
        json: Also write losses and differences here.
        png: Also draw them here.
    """
    found = run_any_world_size(ranks or [1, 2, 3, 4], steps)
    console().print(any_world_size_table(found))
    if json is not None:
        content = {"machine": machine(), "steps": steps, "any world size": found}
        json.write_text(json_module.dumps(content, default=asdict) + "\n")
    if png is not None:
        draw_any_world_size(found, png)

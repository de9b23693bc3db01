"""`python -m benchmarks COMMAND [options]`, with `--help` for each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli
from rich.console import Console

from benchmarks.overhead import run_overhead
from benchmarks.report import Result, machine_line, save, show
from benchmarks.step import run_step
from benchmarks.team import Workload
from benchmarks.update import run_update

_WIDTH = 124  # of the widest table


def _tell(results: dict[str, Result], json: Path | None) -> None:
    console = Console()
    console.width = max(console.width, _WIDTH)
    console.print(machine_line(), markup=False)
    for result in results.values():
        show(console, result)
    if json is not None:
        save(json, results)


def update(
    elements: int = 64 << 20,
    tensor: int = 1 << 20,
    repeats: int = 9,
    threads: int | None = None,
    json: Path | None = None,
) -> None:
    """Time one optimizer step in one process, next to the memory floor and other optimizers.

    Args:
        elements: Parameters.
        tensor: Parameters in each tensor.
        repeats: Of each contender.
        threads: Instead of torch's own choice.
        json: Also write all timings here.
    """
    _tell({"update": run_update(elements, tensor, repeats, threads)}, json)


def step(
    ranks: int = 2,
    link: float | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    rounds: int = 3,
    steps: int = 4,
    layers: int = 10,
    width: int = 512,
    batch: int = 1,
    context: int = 128,
    only: list[str] | None = None,
    json: Path | None = None,
) -> None:
    """Time whole training steps on several ranks, next to other ways to train data-parallel.

    Args:
        ranks: Processes.
        link: Gbit/s of a link between every two ranks, both ways (root only); 0 for network
            namespaces without a limit. Without it ranks talk over the loopback.
        dtype: Of the model.
        rounds: How often engines take turns.
        steps: Timed steps in each turn.
        layers: Of the model.
        width: Of the model, a multiple of 64.
        batch: Sequences per rank.
        context: Bytes in each sequence.
        only: Engines whose names contain one of these words.
        json: Also write all timings here.
    """
    work = Workload(ranks, steps, layers, width, batch, context, dtype)
    _tell({"step": run_step(work, rounds, only or [], link)}, json)


def overhead(count: int = 2000, rounds: int = 9, json: Path | None = None) -> None:
    """Time the Python of a step: many small parameters, no communication, no arithmetic.

    Args:
        count: Parameters.
        rounds: How often contenders take turns.
        json: Also write all timings here.
    """
    _tell({"overhead": run_overhead(count, rounds)}, json)


def readme() -> None:
    """Print the tables of README."""
    update()
    step()


if __name__ == "__main__":
    auto_cli([readme, update, step, overhead], prog="python -m benchmarks", as_positional=False)

"""`python -m benchmarks COMMAND [options]`, with `--help` for each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from benchmarks.bits import bits_table, run_bits
from benchmarks.checkpoint import run_checkpoint
from benchmarks.forecast import Cluster, best, compare, comparison_table, plan_at_scale, scale_table
from benchmarks.overhead import run_overhead
from benchmarks.plot import draw_steps
from benchmarks.report import Result, machine_line, save, show
from benchmarks.step import run_step
from benchmarks.team import Workload
from benchmarks.update import run_update

_WIDTH = 124  # of the widest table


def _console() -> Console:
    console = Console()
    console.width = max(console.width, _WIDTH)
    console.print(machine_line(), markup=False)
    return console


def _tell(results: dict[str, Result], json: Path | None) -> None:
    console = _console()
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


def checkpoint(
    millions: int = 300,
    ranks: int = 2,
    only: list[str] | None = None,
    folder: Path | None = None,
) -> None:
    """Time saving and loading of model and optimizer, next to FSDP2 with DCP, and DeepSpeed.

    Args:
        millions: Of parameters, float32 with float32 states.
        ranks: Processes.
        only: Some of the contenders: belief_dist, FSDP2, DeepSpeed.
        folder: Where to write; without it the system's temporary folder.
    """
    columns = ("blocked", "total", "bytes", "save MiB", "load", "load MiB")
    table = Table("", *columns)
    for name, row in run_checkpoint(millions, ranks, only, folder).items():
        table.add_row(name, *(f"{row[key]:.4g}" if key in row else "" for key in columns))
    _console().print(table)


def bits(ranks: list[int] | None = None, steps: int = 10) -> None:
    """Compare parameters bit for bit with one process that adds gradients in rank order.

    Args:
        ranks: Processes; 2, 3 and 4 by default.
        steps: Of training.
    """
    _console().print(bits_table(run_bits(ranks or [2, 3, 4], steps)))


def simulate(
    ranks: list[int] | None = None,
    links: list[float] | None = None,
    rounds: int = 2,
    steps: int = 4,
    layers: int = 10,
    width: int = 512,
) -> None:
    """Compare predicted with measured steps behind slow links (root only).

    Args:
        ranks: Processes; 2 and 4 by default.
        links: Gbit/s; 1 and 10 by default.
        rounds: How often engines take turns.
        steps: Timed steps in each turn.
        layers: Of the model.
        width: Of the model, a multiple of 64.
    """
    found = []
    for count in ranks or [2, 4]:
        for gbit in links or [1.0, 10.0]:
            work = Workload(count, steps, layers, width, 1, 128, "float32")
            found += compare(work, gbit, rounds)
    console = _console()
    console.print(comparison_table(found))


def scale(
    layers: int = 80,
    width: int = 10240,
    ranks: list[int] | None = None,
    rows: list[int] | None = None,
    buckets: list[int] | None = None,
    tokens: int = 8192,
    cluster: Cluster = Cluster(),  # noqa: B008  # it cannot change
) -> None:
    """Plan a model of 100 billion parameters for thousands of ranks, and predict its step.

    Args:
        layers: Of the model.
        width: Of the model, a multiple of 128.
        ranks: Devices; 1,024 and 16,384 by default.
        rows: Copies of all shards (HSDP); 1, and what leaves 1,024 ranks a row, by default.
        buckets: Sizes of a bucket in MiB.
        tokens: That each device trains on in a step.
        cluster: Speeds of devices and links.
    """
    console = _console()
    for count in ranks or [1024, 16384]:
        for number in rows or sorted({1, count // 1024}):
            plans = [
                plan_at_scale(layers, width, count, number, mib, tokens, cluster)
                for mib in buckets or [32, 512, 2048, 8192]
            ]
            console.print(scale_table(plans))
            console.print(f"Shortest with buckets of {best(plans).bucket_mib} MiB.")


def plot(files: list[Path], out: Path) -> None:
    """Draw the results of several `step --json FILE` next to each other.

    Args:
        files: What was written.
        out: The picture, PNG or SVG.
    """
    draw_steps(files, out)


def readme() -> None:
    """Print the tables of README."""
    update()
    step()


if __name__ == "__main__":
    auto_cli(
        [readme, update, step, checkpoint, overhead, bits, simulate, scale, plot],
        prog="python -m benchmarks",
        as_positional=False,
    )

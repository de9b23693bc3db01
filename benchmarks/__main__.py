"""`python -m benchmarks COMMAND [options]`, with `--help` for each."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from rich.table import Table
from tqdm import tqdm

from benchmarks.any_world_size_picture import plot_any_world_size
from benchmarks.checkpoint import run_checkpoint
from benchmarks.compatibility import (
    ALL,
    DOZEN,
    DTYPES,
    STAGES,
    Cell,
    replace_table,
    run_cells,
    table,
)
from benchmarks.compatibility import Result as CellResult
from benchmarks.concepts import concepts
from benchmarks.console import console, table_of, tell
from benchmarks.evidence import tell_sheets, write_markdown
from benchmarks.groups import groups
from benchmarks.habits import HABITS, run_habits
from benchmarks.host import run_host, run_soak
from benchmarks.mpi import run_mpi
from benchmarks.overhead import run_overhead
from benchmarks.peak import peak_line
from benchmarks.plot import markdown_steps
from benchmarks.predictions import scale, simulate
from benchmarks.reliability import faults, flips, network_faults, soak, standby
from benchmarks.report import machine
from benchmarks.resume import compare_runs, draw_resume, plot_resume, run_resume
from benchmarks.same_bits import any_world_size, bits
from benchmarks.state_forms import accuracy, smallstates
from benchmarks.step import run_by_json, run_step
from benchmarks.step_picture import draw_steps
from benchmarks.step_trace import record_steps
from benchmarks.step_trace_picture import draw_trace, plot_trace
from benchmarks.team import Workload
from benchmarks.telemetry import run_telemetry
from benchmarks.update import run_tensors, run_update
from benchmarks.updates_picture import draw_updates, plot_update
from benchmarks.updates_report import show_updates, updates_content
from benchmarks.warmstart import run_warmstart


def update(
    sizes: list[int] | None = None,
    threads: list[int] | None = None,
    rounds: int = 9,
    json: Path | None = None,
    png: Path | None = None,
) -> None:
    """Time one update in one process, next to the memory floor and other optimizers.

    Args:
        sizes: Numbers of parameters; 64 Mi by default.
        threads: Of torch; its own choice by default.
        rounds: How often each contender runs.
        json: Also write all timings here.
        png: Also draw the most telling here, at the largest number of threads.
    """
    updates = run_update(sizes or [64 << 20], threads or [torch.get_num_threads()], rounds)
    show_updates(console(), updates)
    content = updates_content(updates)
    if json is not None:
        json.write_text(json_module.dumps(content, indent=2) + "\n")
    if png is not None:
        draw_updates(png, content)


def tensors(elements: int = 64 << 20, counts: list[int] | None = None, rounds: int = 9) -> None:
    """Time optimizer steps on one tensor and on as many parameters in many tensors.

    Args:
        elements: Parameters.
        counts: Numbers of tensors; 1, 1,024 and 16,384 by default.
        rounds: How often each contender runs.
    """
    show_updates(console(), run_tensors(elements, counts or [1, 1024, 16384], rounds))


def peak(elements: int = 1 << 30) -> None:
    """Measure what one update allocates beyond parameters, gradients and states.

    Args:
        elements: Float32 parameters, 16 bytes each.
    """
    console().print(peak_line(elements), markup=False)


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
    tell({"step": run_step(work, rounds, only or [], link)}, json)


def deepspeed(
    ranks: int = 2,
    dtype: Literal["float32", "bfloat16"] = "float32",
    rounds: int = 5,
    steps: int = 6,
    layers: int = 10,
    width: int = 512,
    only: list[str] | None = None,
    json: Path | None = None,
) -> None:
    """Time steps of DeepSpeed by the same JSON with the types AdamW, AdaBelief, ShardedAdaBelief.

    Args:
        ranks: Processes.
        dtype: Of the model.
        rounds: How often all take turns.
        steps: Timed steps in each turn.
        layers: Of the model.
        width: Of the model, a multiple of 64.
        only: Setups whose names contain one of these words, like ZeRO-3 or offload.
        json: Also write all timings here.
    """
    work = Workload(ranks, steps, layers, width, 1, 128, dtype)
    tell(run_by_json(work, rounds, only or []), json)


def mpi(
    ranks: list[int] | None = None,
    megabytes: list[int] | None = None,
    link: float | None = None,
    rounds: int = 3,
    steps: int = 4,
    layers: int = 10,
    width: int = 512,
    batch: int = 1,
    context: int = 128,
    dtype: Literal["float32", "bfloat16"] = "float32",
    variables: dict[str, str] | None = None,
    markdown: Path | None = None,
) -> None:
    """Compare the backend "mpi4py" with gloo: bandwidth, overlap, training steps.

    The mpiexec beside the MPI library that mpi4py loads starts the ranks.

    Args:
        ranks: Processes; 2 and 4 by default.
        megabytes: Of the longer tensor of each collective; 1, 16 and 64 by default.
        link: As for `step`; MPICH only.
        rounds: How often backends take turns.
        steps: Timed steps in each turn.
        layers: Of the model.
        width: Of the model, a multiple of 64.
        batch: Sequences per rank.
        context: Bytes in each sequence.
        dtype: Of the model.
        variables: For all ranks, such as {"MPIR_CVAR_ASYNC_PROGRESS": "1"}.
        markdown: Also write the tables here.
    """
    works = [Workload(n, steps, layers, width, batch, context, dtype) for n in ranks or [2, 4]]
    sheets = run_mpi(works, megabytes or [1, 16, 64], rounds, link, variables or {})
    tell_sheets(sheets, {}, None)
    if markdown is not None:
        write_markdown(markdown, sheets)


def host(
    ranks: int = 2,
    mib: int = 64,
    rounds: int = 9,
    soak: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
    json: Path | None = None,
) -> None:
    """Time what ranks of one host do through shared memory, beside messages and a copy.

    Args:
        ranks: Processes; with "cuda" each has a GPU, or all share the one that there is.
        mib: Of the buffer that is summed and gathered, in MiB.
        rounds: How often all take turns.
        soak: Instead, train a small model for so many steps and tell what a rank holds meanwhile.
        device: Where the memory is that they share.
        json: Write all timings here.
    """
    if soak:
        held = run_soak(ranks, soak)
        title = f"{soak} steps on {ranks} ranks, of the first"
        console().print(table_of(title, held, left=()))
        return
    tell(run_host(ranks, mib, rounds, device), json)


def overhead(count: int = 2000, rounds: int = 9, json: Path | None = None) -> None:
    """Time the Python of a step: many small parameters, no communication, no arithmetic.

    Args:
        count: Parameters.
        rounds: How often contenders take turns.
        json: Also write all timings here.
    """
    tell({"overhead": run_overhead(count, rounds)}, json)


def telemetry(
    ranks: int = 2,
    pairs: int = 30,
    every: int = 10,
    layers: int = 4,
    per_parameter: bool = False,
    across_ranks: bool = False,
) -> None:
    """Time training with and without a StepMonitor, in turns.

    Args:
        ranks: Processes.
        pairs: Of a turn with it and one without.
        every: Steps between records, and of a turn.
        layers: Of the model, which is 128 wide.
        per_parameter: As for StepMonitor, and across_ranks, too.
    """
    work = Workload(ranks, every, layers, 128, 16, 128, "float32")
    for name, value in run_telemetry(work, pairs, per_parameter, across_ranks).items():
        print(f"{name}: {value:.4g}")


def trace(
    ranks: int = 2,
    layers: int = 4,
    width: int = 512,
    context: int = 32,
    bucket_mib: int = 8,
    iterations: int = 20,
    json: Path | None = None,
    png: Path | None = None,
) -> None:
    """Record an iteration of training with torch.profiler, at stage 1 and 2.

    Args:
        ranks: Processes; the first one is recorded.
        layers: Of the model, which is trained on one sequence a rank.
        width: Of the model.
        context: Bytes of a sequence.
        bucket_mib: Size of a bucket.
        iterations: Of which the shortest is told.
        json: Also write its phases here.
        png: Also draw them here.
    """
    work = Workload(ranks, iterations, layers, width, 1, context, "float32")
    found = record_steps(work, bucket_mib << 20)
    for stage, ranges in found.items():
        for name, start, stop in ranges:
            print(f"{stage}  {start:9.3f} ms {stop - start:9.3f} ms  {name}")
    if json is not None:
        content = {"machine": machine(), "workload": asdict(work), "step trace": found}
        json.write_text(json_module.dumps(content) + "\n")
    if png is not None:
        draw_trace(found, png)


def habits(only: list[str] | None = None, json: Path | None = None) -> None:
    """Try what training loops do to gradients and weights, under every peer, on two ranks.

    Args:
        only: Words of which a habit must have one.
        json: Also write what came out here.
    """
    chosen = [name for name in HABITS if only is None or any(word in name for word in only)]
    print(run_habits(chosen, json))


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
    columns = ("blocked", "total", "bytes", "save MiB", "load", "load, unverified", "load MiB")
    table = Table("", *columns)
    for name, row in run_checkpoint(millions, ranks, only, folder).items():
        table.add_row(name, *(f"{row[key]:.4g}" if key in row else "" for key in columns))
    console().print(table)


def resume(steps: int = 400, out: Path | None = None, json: Path | None = None) -> None:
    """Train the example at 4, 3, 1 and 4 ranks by checkpoints, and at 4 ranks without a stop.

    Args:
        steps: Of a run; each quarter has its own number of ranks.
        out: Where to draw the two curves (PNG).
        json: Where to write both curves.
    """
    runs = run_resume(steps)
    table = Table("steps", "ranks", "equal losses", "largest difference")
    for part in compare_runs(runs):
        gap = f"{part.largest_difference:.2g}"
        table.add_row(f"{part.first} to {part.last}", str(part.ranks), f"{part.equal}", gap)
    console().print(table)
    if json is not None:
        json.write_text(json_module.dumps(runs) + "\n")
    if out is not None:
        draw_resume(runs, out)


def compatibility(
    stages: list[int] | None = None,
    dtypes: list[str] | None = None,
    dozen: bool = False,
    page: Path | None = None,
) -> None:
    """Train by DeepSpeed in every combination, beside unsharded training.

    Args:
        stages: Some of ZeRO's stages 0 to 3.
        dtypes: Some of float32, bfloat16 and float16.
        dozen: Only those that the tests train.
        page: The Markdown page whose table is to be replaced.
    """
    chosen = [
        cell
        for cell in (DOZEN if dozen else ALL)
        if cell.stage in (stages or STAGES) and cell.dtype in (dtypes or DTYPES)
    ]
    results: dict[Cell, CellResult] = {}
    jobs = [list(cells) for _, cells in groupby(chosen, key=lambda cell: cell[:3])]
    for cells in tqdm(jobs, unit="job"):
        results |= run_cells(cells)
    text = table(results)
    print(text)
    if page is not None:
        replace_table(page, text)


def warmstart(before: int = 300, after: int = 100, seeds: list[int] | None = None) -> None:
    """Train with AdamW, and go on with AdaBelief from converted states, or from none.

    Args:
        before: Steps of AdamW.
        after: Steps of each way to go on.
        seeds: Of weights and data; 1, 2 and 3 without it.
    """
    found = run_warmstart(before, after, seeds or [1, 2, 3])
    spans = next(iter(found.values()))
    table = Table("loss less AdamW's", *(f"first {span} steps" for span in spans))
    for way, gaps in found.items():
        table.add_row(way, *(f"{gap:+.4f}" for gap in gaps.values()))
    console().print(table)


def plot(files: list[Path], out: Path) -> None:
    """Draw the results of several `step --json FILE` next to each other.

    Args:
        files: What was written.
        out: The picture, PNG or SVG.
    """
    draw_steps(files, out)


def markdown(files: list[Path]) -> None:
    """Print the results of several `step --json FILE` as tables in Markdown.

    Args:
        files: What was written.
    """
    print(markdown_steps(files))


def readme() -> None:
    """Print the tables of one update and of one step, as docs/performance.md has them."""
    update()
    step()


_ALONE = [readme, update, tensors, groups, peak, accuracy, smallstates, warmstart]
_ON_RANKS = [
    step,
    deepspeed,
    mpi,
    checkpoint,
    compatibility,
    resume,
    bits,
    any_world_size,
    overhead,
    telemetry,
    trace,
    host,
    faults,
    network_faults,
    flips,
    standby,
    soak,
    habits,
]
_PREDICTED = [simulate, scale]
_SHOWN = [plot, plot_update, plot_any_world_size, plot_resume, plot_trace, concepts, markdown]

if __name__ == "__main__":
    auto_cli(
        [*_ALONE, *_ON_RANKS, *_PREDICTED, *_SHOWN],
        prog="python -m benchmarks",
        as_positional=False,
    )

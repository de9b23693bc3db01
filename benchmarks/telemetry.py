"""What a StepMonitor costs: training with and without one, in turns, on the same ranks."""

from __future__ import annotations

import datetime
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from belief_dist import ShardedAdaBelief
from belief_dist.telemetry import StepMonitor
from benchmarks.engines import loss_of
from benchmarks.team import Workload

_TIMEOUT = datetime.timedelta(minutes=3)


def run_telemetry(
    work: Workload, pairs: int, per_parameter: bool, across_ranks: bool
) -> dict[str, float]:
    """Return what was measured by rank 0, by name.

    Args:
        work: What is trained, and how many steps are a turn, with one record.
        pairs: How many turns are timed with a monitor, and as many without one.
        per_parameter: See `StepMonitor`.
        across_ranks: Likewise.
    """
    os.environ["OMP_NUM_THREADS"] = str(work.threads)
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "every": work.steps,
            "per_parameter": per_parameter,
            "across_ranks": across_ranks,
        }
        mp.start_processes(
            _rank, (work, pairs, options, folder), nprocs=work.ranks, start_method="spawn"
        )
        found: dict[str, float] = torch.load(Path(folder, "found"))
    return found


def _rank(rank: int, work: Workload, pairs: int, options: dict[str, Any], folder: str) -> None:
    torch.set_num_threads(work.threads)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=work.ranks,
        timeout=_TIMEOUT,
    )
    model = work.model().to(getattr(torch, work.dtype))
    optimizer = ShardedAdaBelief(model.param_groups(), lr=1e-4, max_grad_norm=1.0)
    monitor = StepMonitor(optimizer, Path(folder, "metrics.jsonl"), **options)
    tokens, every = work.tokens(rank), options["every"]
    logging = training = 0.0  # seconds of this process's CPU, which other jobs do not lengthen

    def turn(watched: bool) -> float:
        nonlocal logging, training
        dist.barrier()
        started, spent = time.perf_counter(), time.process_time()
        for step in range(1, every + 1):
            optimizer.zero_grad()
            loss = loss_of(model, tokens)
            loss.backward()
            optimizer.step()
            if watched:
                before = time.process_time()
                monitor.log(step, loss=loss)
                logging += time.process_time() - before
        if not watched:
            training += time.process_time() - spent
        dist.barrier()
        return time.perf_counter() - started

    turn(True)
    logging = training = 0.0
    ratios, seconds = [], []
    for number in range(pairs):
        order = (True, False) if number % 2 else (False, True)
        took = {watched: turn(watched) for watched in order}
        ratios.append(took[True] / took[False])
        seconds.append(took[False] / every)
    if rank == 0:
        found = {
            "ms of a step": median(seconds) * 1e3,
            "median ratio of pairs": median(ratios),
            "CPU ms of a step": training / pairs / every * 1e3,
            "CPU ms of a record": logging / pairs * 1e3,
            "CPU of records, % of training": logging / training * 100,
        }
        torch.save(found, Path(folder, "found"))
    dist.destroy_process_group()

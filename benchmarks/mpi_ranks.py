"""One rank of `python -m benchmarks mpi`: gloo and MPI take turns; rank 0 writes what all measured.

Started by mpiexec with a JSON of `benchmarks.mpi.Task`.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from belief_dist.distributed.rank_info import read_rank_info
from benchmarks import network
from benchmarks.engines import Train, sharded
from benchmarks.mpi import BACKENDS, COLLECTIVES, OVERLAPPED, Measured, Task
from benchmarks.team import Workload

_TIMEOUT = datetime.timedelta(minutes=2)
_CALLS = 5  # in each turn
_WARM_UP = 2
_PRODUCTS = 20  # of which the time of one is taken
_MATRIX = torch.ones(256, 256)
_PRODUCT = torch.empty_like(_MATRIX)
_Start = Callable[[], dist.Work | None]
_Groups = dict[str, dist.ProcessGroup]


def starters(megabytes: int, group: dist.ProcessGroup) -> dict[str, _Start]:
    """Return what starts each collective on float32; `megabytes` are the longer tensor's."""
    ranks = dist.get_world_size(group)
    numel = megabytes * 10**6 // 4 // ranks * ranks
    whole, other = torch.ones(numel), torch.ones(numel)
    piece = torch.ones(numel // ranks)
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return {
        "all_reduce": lambda: dist.all_reduce(whole, group=group, async_op=True),
        "reduce_scatter": lambda: reduce_scatter(piece, whole, group=group, async_op=True),
        "all_gather": lambda: all_gather(whole, piece, group=group, async_op=True),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group, async_op=True),
    }


def seconds_of(work: Callable[[], object], calls: int) -> list[float]:
    """Return how long the slowest rank was busy with each of several calls."""
    own = []
    for _ in range(calls):
        dist.barrier()
        start = time.perf_counter()
        work()
        own.append(time.perf_counter() - start)
    slowest = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    found: list[float] = slowest.tolist()
    return found


def _end(work: dist.Work | None) -> None:
    assert work is not None
    work.wait()


def measure_bandwidth(groups: _Groups, sizes: Sequence[int], rounds: int) -> Measured:
    found: Measured = {}
    for size in sizes:
        calls = {name: starters(size, group) for name, group in groups.items()}
        for what in COLLECTIVES:
            for turn in range(rounds + 1):
                for name in groups:
                    each = calls[name][what]
                    seconds = seconds_of(partial(_transfer_beside, each, 0), _CALLS)
                    if turn > 0:
                        found.setdefault(f"{what} {size} {name}", []).extend(seconds)
    return found


def measure_overlap(groups: _Groups, size: int, rounds: int) -> Measured:
    """Time transfers, matrix products of about the same time, and both at once."""
    found: Measured = {}
    for what in OVERLAPPED:
        for name, group in groups.items():
            start = starters(size, group)[what]
            transfer = partial(_transfer_beside, start, 0)
            seconds_of(transfer, _WARM_UP)
            product = median(seconds_of(partial(_multiply, _PRODUCTS), _CALLS)) / _PRODUCTS
            count = max(1, round(median(seconds_of(transfer, _CALLS)) / product))
            calls = {
                "transfer": transfer,
                "products": partial(_multiply, count),
                "both": partial(_transfer_beside, start, count),
            }
            for _ in range(rounds):
                for kind, call in calls.items():
                    found.setdefault(f"{what} {name} {kind}", []).extend(seconds_of(call, _CALLS))
    return found


def _transfer_beside(start: _Start, count: int) -> None:
    work = start()
    _multiply(count)
    _end(work)


def _multiply(count: int) -> None:
    for _ in range(count):
        torch.mm(_MATRIX, _MATRIX, out=_PRODUCT)


def measure_steps(groups: _Groups, work: Workload, rounds: int) -> Measured:
    """Time training steps of one model for each backend."""
    tokens = work.tokens(dist.get_rank())
    dtype = getattr(torch, work.dtype)
    trains: dict[str, Train] = {}
    for name, group in groups.items():
        trains[name] = sharded(work.model(), dtype, process_group=group)
        seconds_of(lambda name=name: list(trains[name](tokens)), _WARM_UP)
    found: Measured = {name: [] for name in groups}
    for _ in range(rounds):
        for name, train in trains.items():
            found[name] += seconds_of(lambda train=train: list(train(tokens)), work.steps)
    return found


def main(task: Task) -> None:
    info = read_rank_info(os.environ)
    if task.namespaces:
        network.enter(task.namespaces[info.rank])
    torch.set_num_threads(task.work.threads)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{task.folder}/store", rank=info.rank,
        world_size=info.world_size, timeout=_TIMEOUT,
    )  # fmt: skip
    import belief_dist.mpi_backend  # noqa: F401  # MPI starts in the namespace

    groups = {name: dist.new_group(backend=name, timeout=_TIMEOUT) for name in BACKENDS}
    found = {
        "bandwidth": measure_bandwidth(groups, task.megabytes, task.rounds),
        "overlap": measure_overlap(groups, max(task.megabytes), task.rounds),
        "step": measure_steps(groups, task.work, task.rounds),
    }
    if info.rank == 0:
        Path(task.folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Task.from_json(sys.argv[1]))

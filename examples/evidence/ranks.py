"""Process groups for experiments: one rank in this process, or several in their own ones."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from examples.evidence.study import Points


@contextmanager
def alone() -> Iterator[None]:
    """Make this process the only rank of a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_ranks(ranks: int, function: Callable[..., Points], *arguments: Any) -> Points:
    """Call a function on every rank of a new group, and return what the first one found."""
    if ranks == 1:
        with alone():
            return function(*arguments)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank_main, (ranks, folder, function, arguments), nprocs=ranks)
        points: Points = torch.load(Path(folder) / "points.pt")
    return points


def _rank_main(
    rank: int, ranks: int, folder: str, function: Callable[..., Points], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    points = function(*arguments)
    if rank == 0:
        torch.save(points, Path(folder) / "points.pt")
    dist.barrier()
    dist.destroy_process_group()
    # Threads of gloo may abort a process that ends as usual; nothing is left to do.
    os._exit(0)

"""Runs test cases on several real gloo processes: one spawn for many cases.

A spawn costs seconds, a case milliseconds. Ranks meet through a file, never a port.
"""

from __future__ import annotations

import datetime
import functools
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Case = Callable[[], None]

# A lost rank fails the test instead of hanging it.
TIMEOUT = datetime.timedelta(seconds=60)


def _main(rank: int, world_size: int, folder: str, cases: tuple[Case, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )
    for case in cases:
        try:
            case()
        except BaseException:
            name = case.func.__name__ if isinstance(case, functools.partial) else case.__name__
            raise AssertionError(f"rank {rank}, {name}:\n{traceback.format_exc()}") from None
        dist.barrier()
    # On the clean path only: after a failure the peers still wait in a collective.
    dist.destroy_process_group()


def run_ranks(world_size: int, tmp_path: Path, *cases: Case) -> None:
    """Run every case on every rank, in order; the first failure ends all."""
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    mp.spawn(_main, (world_size, str(folder), cases), nprocs=world_size)

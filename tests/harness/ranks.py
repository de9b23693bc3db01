"""Runs test cases on several real gloo processes: one start for many cases.

A process takes seconds to import torch, a case milliseconds: each rank is a fork of a server that
has imported torch, but run nothing. Ranks meet through a file, never a port.
"""

from __future__ import annotations

import datetime
import functools
import gc
import multiprocessing
import os
import reprlib
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

# What tests import, but for this package: a change of it must not meet an old import. None of these
# may start a thread, which a fork would lose.
PRELOADED = [
    "hypothesis",
    "numpy",
    "pytest",
    "torch",
    "torch._dynamo",  # by the first optimizer of a process
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
    "torch.multiprocessing",
    "torch.nn.parallel",
    "torch.profiler",
    "torch.testing._internal.distributed.multi_threaded_pg",
]


def describe(case: Case) -> str:
    """Return the name of a case and its arguments, cut to what a line holds."""
    if not isinstance(case, functools.partial):
        return getattr(case, "__name__", repr(case))
    short = reprlib.Repr()
    short.maxdict = short.maxlist = short.maxtuple = 8
    short.maxlevel = 3
    short.maxstring = short.maxother = 100
    arguments = [short.repr(value) for value in case.args]
    arguments += [f"{name}={short.repr(value)}" for name, value in case.keywords.items()]
    return f"{describe(case.func)}({', '.join(arguments)})"


def _main(
    rank: int, world_size: int, folder: str, environment: dict[str, str], cases: tuple[Case, ...]
) -> None:
    # The server has that of the first test.
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    # Every optimizer looks for modules among all live objects: not among those of all imports.
    gc.freeze()
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
            trace = traceback.format_exc()
            raise AssertionError(f"rank {rank}, {describe(case)}:\n{trace}") from None
        dist.barrier()
    # On the clean path only: after a failure the peers still wait in a collective.
    dist.destroy_process_group()


def run_ranks(world_size: int, tmp_path: Path, *cases: Case) -> None:
    """Run every case on every rank, in order; the first failure ends all."""
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(
        _main,
        (world_size, str(folder), dict(os.environ), cases),
        nprocs=world_size,
        start_method="forkserver",
    )

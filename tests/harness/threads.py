"""Runs a test case on several ranks that are threads of this process.

torch's threaded process group has no messages between two ranks, but all collectives: these cases
take the way of backends like NCCL (one all-to-all for each bucket), which gloo's processes do not.
"""

from __future__ import annotations

import gc
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)


@contextmanager
def _threaded_world() -> Iterator[None]:
    _install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    try:
        yield
    finally:
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        _uninstall_threaded_pg()
        ProcessLocalGroup.reset()


def run_threads(world_size: int, *cases: Callable[[], None]) -> None:
    """Run every case on every rank, in order; the first failure ends all."""
    failures: list[str] = []

    def main(rank: int, store: dist.Store) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
            for case in cases:
                case()
            dist.destroy_process_group()
        except BaseException as error:
            failures.append(f"rank {rank}:\n{traceback.format_exc()}")
            ProcessLocalGroup.exception_handle(error)  # lets go of ranks that wait

    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # as tests.harness.ranks does, and why
    try:
        with _threaded_world():
            store = dist.HashStore()
            ranks = [threading.Thread(target=main, args=(r, store)) for r in range(world_size)]
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join()
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads_before)
    if failures:
        raise AssertionError(failures[0])

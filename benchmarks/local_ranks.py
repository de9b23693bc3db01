"""Starts ranks on this host that meet through a file, and returns what the first has found."""

from __future__ import annotations

import datetime
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_TIMEOUT = datetime.timedelta(minutes=3)


def threads_of(ranks: int) -> int:
    """Return the share of each rank in this machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def backend_of(ranks: int, device: str) -> str:
    """Return what connects the ranks: NCCL refuses those that share a GPU."""
    return "nccl" if device == "cuda" and torch.cuda.device_count() >= ranks else "gloo"


def on_ranks(ranks: int, work: Callable[..., Any], *arguments: Any, device: str = "cpu") -> Any:
    """Return what `work` returns on the first of `ranks` processes, which JSON can hold.

    On "cuda" each has a GPU, or all share what there is.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_main, (ranks, folder, device, work, arguments), nprocs=ranks)
        return json.loads(Path(folder, "result").read_text())


def _main(
    rank: int, ranks: int, folder: str, device: str, work: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(threads_of(ranks))
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    dist.init_process_group(
        backend_of(ranks, device),
        init_method=f"file://{folder}/s",
        rank=rank,
        world_size=ranks,
        timeout=_TIMEOUT,
    )
    result = work(*arguments)
    if rank == 0:
        Path(folder, "result").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort an orderly end

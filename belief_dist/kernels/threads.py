"""Whether an update on the CPU has the cores that it could have."""

from __future__ import annotations

import os

import torch


def idle_cores(num_ranks: int) -> int:
    """Return how many cores each rank of this machine could use while torch uses one; else 0.

    Args:
        num_ranks: Ranks on this machine, where no launcher has told.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    return share if torch.get_num_threads() == 1 and share > 1 else 0


def one_thread_sentence(share: int) -> str:
    """Return what to tell a user whose update leaves `share` cores idle."""
    return (
        f"updates on 1 thread although there are {share} cores for each rank (torchrun sets "
        f"OMP_NUM_THREADS=1 by default): start with OMP_NUM_THREADS={share}."
    )

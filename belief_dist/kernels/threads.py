"""Detect that the CPU update runs on one thread although more cores are free."""

from __future__ import annotations

import os

import torch


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def idle_cores(num_ranks: int) -> int:
    """Return how many cores each rank on this host could use if torch uses only one; else 0.

    Args:
        num_ranks: Ranks on this host, if LOCAL_WORLD_SIZE is not set.
    """
    share = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    return share if torch.get_num_threads() == 1 and share > 1 else 0


def one_thread_sentence(share: int) -> str:
    """Return the warning for an update that could use `share` cores."""
    return (
        f"updates on 1 thread although there are {share} cores for each rank (torchrun sets "
        f"OMP_NUM_THREADS=1 by default): start with OMP_NUM_THREADS={share}."
    )

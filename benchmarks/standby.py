"""What it costs to keep every step in the hosts' memory, beside steps without."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from belief_dist import ShardedAdaBelief
from belief_dist.checkpoint import Standby
from benchmarks.engines import loss_of
from benchmarks.local_ranks import on_ranks, threads_of
from benchmarks.team import Workload

_MEMORY = "/dev/shm"
RANKS = 2
_WORK = Workload(RANKS, 1, layers=10, width=512, batch=1, context=128, dtype="float32")


def run_standby(rounds: int, every: int) -> list[dict[str, Any]]:
    """Return a row for one host and one for two, each in the process group of this machine."""
    rows = []
    for hosts in (1, 2):
        with tempfile.TemporaryDirectory(dir=_MEMORY) as scratch:
            found = on_ranks(RANKS, _cost, scratch, hosts, rounds, every)
        rows.append({"hosts": hosts, "threads per rank": threads_of(RANKS), **found})
    return rows


def _cost(scratch: str, hosts: int, rounds: int, every: int) -> dict[str, Any]:
    model = _WORK.model()
    optimizer = ShardedAdaBelief(model.named_parameters(), lr=1e-4)
    tokens = _WORK.tokens(dist.get_rank())
    folder = Path(scratch, f"host{dist.get_rank() % hosts}")
    standby = Standby(folder, model=model, optimizer=optimizer)
    blocked: list[float] = []
    kept: list[float] = []
    plain: list[float] = []

    def train(saves: bool) -> float:
        begin = time.perf_counter()
        for number in range(every):
            loss_of(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            if saves and number == 0:
                blocked.append(standby.save(len(kept)))
        optimizer.wait_pending()
        return (time.perf_counter() - begin) / every

    train(saves=True)  # for warming up
    for _ in range(rounds):
        standby.wait()
        dist.barrier()
        plain.append(train(saves=False))
        dist.barrier()
        kept.append(train(saves=True))
    standby.wait()
    nbytes = sum(file.stat().st_size for file in folder.glob("*/*"))
    return {
        "MiB a host": round(nbytes / 2**20),
        "a step ms": round(1e3 * median(plain)),
        "kept ms": round(1e3 * median(kept)),
        "blocked ms": round(1e3 * median(blocked[1:])),
        "ratio": round(median(a / b for a, b in zip(kept, plain, strict=True)), 3),
    }

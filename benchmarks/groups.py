"""Steps of many param groups beside steps of one: as with a learning rate for each layer."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch.optim import Optimizer

from belief_dist import AdaBelief, ShardedAdaBelief
from benchmarks.console import console, table_of

_PARAMS = 400
_WARM_UP = 3


def _build(kind: type[Optimizer], numel: int, count: int) -> Optimizer:
    params = [torch.nn.Parameter(torch.randn(numel)) for _ in range(_PARAMS)]
    share = _PARAMS // count
    groups = [
        {"params": params[i * share : (i + 1) * share], "lr": 1e-3 * 0.99**i} for i in range(count)
    ]
    optimizer = kind(groups)
    for param in params:
        param.grad = torch.randn(numel)
    return optimizer


def _seconds(optimizers: list[Optimizer], rounds: int) -> list[float]:
    """Return the median of each one's steps, which take turns."""
    found: list[list[float]] = [[] for _ in optimizers]
    for turn in range(_WARM_UP + rounds):
        for optimizer, times in zip(optimizers, found, strict=True):
            begin = time.perf_counter()
            optimizer.step()
            if turn >= _WARM_UP:
                times.append(time.perf_counter() - begin)
    return [statistics.median(times) for times in found]


def groups(count: int = 200, rounds: int = 25, sizes: list[int] | None = None) -> None:
    """Time a step of 400 tensors in one param group and in many, on one rank of CPUs.

    Args:
        count: How many are many; a divisor of 400.
        rounds: Of which the median is told.
        sizes: Elements of a tensor; 200 and 50,000 by default.
    """
    rows: list[dict[str, Any]] = []
    kinds: list[type[Optimizer]] = [ShardedAdaBelief, AdaBelief, torch.optim.AdamW]
    for numel in sizes or [200, 50_000]:
        for kind in kinds:
            one, many = _seconds([_build(kind, numel, each) for each in (1, count)], rounds)
            rows.append(
                {
                    "optimizer": kind.__name__,
                    "elements of a tensor": numel,
                    "one group, ms": f"{1e3 * one:.1f}",
                    f"{count} groups, ms": f"{1e3 * many:.1f}",
                    "ratio": f"{many / one:.2f}",
                }
            )
    console().print(table_of(f"A step of {_PARAMS} tensors", rows, left=("optimizer",)))

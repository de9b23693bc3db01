"""Ranks of one host: sums and gathers beside a copy in memory, steps of small models, and a soak.

On GPUs, sums and gathers alone.

All contenders take turns in the same processes.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from belief_dist import ShardedAdaBelief
from belief_dist.sharding.collectives import Collectives, ReduceRequest
from belief_dist.sharding.symmetric_memory import SymmetricMemory
from benchmarks.local_ranks import backend_of, on_ranks, threads_of
from benchmarks.report import Result, Row

COPY = "a copy in memory"
DDP = "DDP + AdamW"
_STEPS = 100  # of a small model in each turn


def run_host(ranks: int, mib: int, rounds: int, device: str = "cpu") -> dict[str, Result]:
    """Time what moves gradients and parameters, and on a CPU steps of a small model."""
    settings: dict[str, Any] = {"ranks": ranks, "threads per rank": threads_of(ranks)}
    if device == "cuda":
        gpus, backend = torch.cuda.device_count(), backend_of(ranks, device)
        settings = {"ranks": ranks, "GPUs": gpus, "backend": backend}
    timed = on_ranks(ranks, _time_all, mib, rounds, device, device=device)
    transport = Result(
        title="Sum and gather alone",
        settings={**settings, "MiB": mib},
        rows=[Row(name, seconds) for name, seconds in timed["transport"].items()],
        baselines={COPY: "copy"},
        notes=["A copy reads and writes as many bytes as the buffer has, on every rank at once."],
    )
    if device == "cuda":
        return {"transport": transport}
    return {
        "transport": transport,
        "small": Result(
            title="Steps of a small model",
            settings={**settings, "parameters": timed["parameters"]},
            rows=[Row(name, seconds) for name, seconds in timed["small"].items()],
            baselines={DDP: "DDP"},
        ),
    }


def run_soak(ranks: int, steps: int) -> list[dict[str, int]]:
    """Train a small model; return what the first rank holds after each tenth of the steps."""
    held: list[dict[str, int]] = on_ranks(ranks, _soak, steps)
    return held


def _comm(device: torch.device, **options: Any) -> Collectives:
    return ShardedAdaBelief([nn.Parameter(torch.zeros(8, device=device))], **options).comm


def _time_all(mib: int, rounds: int, device: str) -> dict[str, Any]:
    turns = _transports(mib, torch.device(device))
    timed: dict[str, list[float]] = {name: [] for name in turns}
    small = _small_models() if device == "cpu" else {}
    steps: dict[str, list[float]] = {name: [] for name in small}
    for number in range(-1, rounds):  # the first one allocates and does not count
        for contenders, found, repeats in ((turns, timed, 1), (small, steps, _STEPS)):
            for name, run in contenders.items():
                dist.barrier()
                begin = time.perf_counter()
                for _ in range(repeats):
                    run()
                if device == "cuda":
                    torch.cuda.synchronize()
                dist.barrier()
                if number >= 0:
                    found[name].append((time.perf_counter() - begin) / repeats)
    return {
        "transport": timed,
        "small": steps,
        "parameters": sum(param.numel() for param in _small_model().parameters()),
    }


def _transports(mib: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    world_size = dist.get_world_size()
    numel = (mib << 18) // world_size // 64 * 64 * world_size
    source, target = (torch.ones(numel, device=device) for _ in range(2))
    shard = torch.zeros(numel // world_size, device=device)
    turns: dict[str, Callable[[], Any]] = {COPY: lambda: target.copy_(source)}
    comms = {
        "shared memory": _comm(device, shared_memory="cuda"),
        "messages": _comm(device, shared_memory=False),
        f"{dist.get_backend()}'s own": _comm(device, reduction="native"),
    }
    shares = isinstance(comms["shared memory"], SymmetricMemory)
    if device.type == "cuda" and not shares:
        raise RuntimeError("the GPUs do not read each other's memory: a line above says why.")
    for name, comm in comms.items():
        flat = comm.buffer(numel, torch.float32, device).fill_(1.0)
        turns[f"sum, {name}"] = partial(_sum, comm, flat, shard)
        turns[f"gather, {name}"] = partial(_gather, comm, flat)
    return turns


def _sum(comm: Collectives, flat: Tensor, shard: Tensor) -> None:
    comm.start_reduce(ReduceRequest(flat, shard)).wait()


def _gather(comm: Collectives, flat: Tensor) -> None:
    comm.start_gather(flat).wait()


def _small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)
    )


def _small_models() -> dict[str, Callable[[], None]]:
    inputs = torch.randn(8, 32)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def step() -> None:
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

        return step

    shared, sending = _small_model(), _small_model()
    parallel = DistributedDataParallel(_small_model())
    return {
        "ShardedAdaBelief": train(shared, ShardedAdaBelief(shared.parameters())),
        "ShardedAdaBelief, messages": train(
            sending, ShardedAdaBelief(sending.parameters(), shared_memory=False)
        ),
        DDP: train(parallel, AdamW(parallel.parameters(), fused=True)),
    }


def _soak(steps: int) -> list[dict[str, int]]:
    model = _small_model()
    optimizer = ShardedAdaBelief(model.parameters(), stage=2, bucket_bytes=1 << 12)
    held = []
    for step in range(1, steps + 1):
        model(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 10) == 0:
            gc.collect()
            held.append({"step": step, **_held()})
    return held


def _held() -> dict[str, int]:
    """Return what this process holds of the system."""
    status = Path("/proc/self/status").read_text().splitlines()
    resident = next(line for line in status if line.startswith("VmRSS:"))
    return {
        "resident KiB": int(resident.split()[1]),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "threads": len(os.listdir("/proc/self/task")),
    }

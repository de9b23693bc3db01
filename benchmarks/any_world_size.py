"""One job at several numbers of ranks: how far do its runs come apart?

All contenders train on the same numbered micro-batches, each of one sequence, in forward passes of
the same shape: rank r of W computes numbers r, r + W, ... Peers accumulate them as users are told
to, losses divided by how many a rank has. What differs between their runs is the order of the sums
and where they divide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from belief_dist import ShardedAdaBelief
from belief_dist.data import MicroBatchSampler
from benchmarks.bits import flat_weights, join, missing_package, run_ranks
from benchmarks.engines import loss_of
from examples.gpt.data import load_corpus
from examples.gpt.model import GPT

MICRO_BATCHES = 12
OPTIONS: dict[str, Any] = {"lr": 2e-3, "weight_decay": 0.01}
_CONTEXT = 64
_SNAPSHOTS = 20

# Trains one step on this rank's micro-batches, and returns their losses.
Step = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass
class Run:
    """A training.

    Attributes:
        losses: The mean loss of every step's micro-batches.
        differing: At every snapshot, part of the weights that differ from one rank's in any bit.
        largest: At every snapshot, the largest difference from one rank's.
    """

    losses: list[float]
    differing: list[float]
    largest: list[float]


def _ours(model: GPT, ranks: int) -> Step:
    optimizer = ShardedAdaBelief(model.parameters(), micro_batches=MICRO_BATCHES, **OPTIONS)

    def step(micro_batches: Sequence[Tensor]) -> list[Tensor]:
        optimizer.zero_grad()
        losses = []
        for batch in micro_batches:
            losses.append(loss_of(model, batch))
            losses[-1].backward()
        optimizer.step()
        return losses

    return step


def _ddp(model: GPT, ranks: int) -> Step:
    module = DistributedDataParallel(model)
    optimizer = AdamW(module.parameters(), fused=True, **OPTIONS)

    def step(micro_batches: Sequence[Tensor]) -> list[Tensor]:
        optimizer.zero_grad()
        losses = []
        for number, batch in enumerate(micro_batches, start=1):
            with nullcontext() if number == len(micro_batches) else module.no_sync():
                losses.append(loss_of(module, batch))
                (losses[-1] / len(micro_batches)).backward()
        optimizer.step()
        return losses

    return step


def _fsdp2(model: GPT, ranks: int) -> Step:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    module: Any = fully_shard(model, mesh=mesh)
    optimizer = AdamW(module.parameters(), fused=True, **OPTIONS)

    def step(micro_batches: Sequence[Tensor]) -> list[Tensor]:
        optimizer.zero_grad()
        losses = []
        for number, batch in enumerate(micro_batches, start=1):
            module.set_requires_gradient_sync(number == len(micro_batches))
            losses.append(loss_of(module, batch))
            (losses[-1] / len(micro_batches)).backward()
        optimizer.step()
        return losses

    return step


def _deepspeed(model: GPT, ranks: int) -> Step:
    import deepspeed

    # Otherwise it compiles, for a minute, an operation that serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES // ranks,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    optimizer = AdamW(model.parameters(), fused=True, **OPTIONS)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)

    def step(micro_batches: Sequence[Tensor]) -> list[Tensor]:
        losses = []
        for batch in micro_batches:
            losses.append(loss_of(engine, batch))
            engine.backward(losses[-1])
            engine.step()
        return losses

    return step


OURS = f"ShardedAdaBelief, micro_batches={MICRO_BATCHES}"
CONTENDERS: dict[str, Callable[[GPT, int], Step]] = {
    OURS: _ours,
    "DDP + AdamW": _ddp,
    "FSDP2 + AdamW": _fsdp2,
    "DeepSpeed ZeRO-2 + AdamW": _deepspeed,
}


def snapshots(steps: int) -> list[int]:
    """Return after which steps weights are compared; the last one is among them."""
    return sorted({round(steps * (i + 1) / _SNAPSHOTS) for i in range(_SNAPSHOTS)} - {0})


def _rank_main(rank: int, ranks: int, name: str, steps: int, store: str, link: Connection) -> None:
    join(rank, ranks, name, store)
    torch.manual_seed(0)
    model = GPT(2, 64, 2, _CONTEXT)
    step = CONTENDERS[name](model, ranks)
    windows = load_corpus().train.unfold(0, _CONTEXT + 1, _CONTEXT)
    sampler = MicroBatchSampler(len(windows), 1, MICRO_BATCHES, rank=rank, world_size=ranks)
    means, weights = [], []
    for number, taken in sampler.steps(sampler):
        mine = {k: windows[samples].long() for k, samples in taken}
        losses = torch.zeros(MICRO_BATCHES)
        for k, loss in zip(mine, step(list(mine.values())), strict=True):
            losses[k] = loss.detach()
        dist.all_reduce(losses)
        means.append(losses.mean().item())
        if number + 1 in snapshots(steps):
            weights.append(flat_weights(model))
        if number + 1 == steps:
            break
    if rank == 0:
        link.send((means, torch.stack(weights).numpy()))
    dist.barrier()
    dist.destroy_process_group()


def run_any_world_size(
    worlds: Sequence[int], steps: int, names: Sequence[str] = tuple(CONTENDERS)
) -> dict[str, dict[int, Run]]:
    """Return the runs of each contender that is installed, by its number of ranks.

    Raises:
        ValueError: A number of ranks does not divide `MICRO_BATCHES`, which the peers need.
    """
    if bad := [ranks for ranks in worlds if ranks < 1 or MICRO_BATCHES % ranks]:
        raise ValueError(f"ranks must divide {MICRO_BATCHES} micro-batches, got {bad}.")
    found: dict[str, dict[int, Run]] = {}
    for name in (name for name in names if missing_package(name) is None):
        found[name] = {}
        trained = {ranks: run_ranks(ranks, _rank_main, name, steps) for ranks in {1, *worlds}}
        alone = torch.from_numpy(trained[1][1])
        for ranks in worlds:
            losses, weights = trained[ranks]
            off = (torch.from_numpy(weights) - alone).abs()
            differing = (off > 0).double().mean(1).tolist()
            found[name][ranks] = Run(losses, differing, off.amax(1).tolist())
    return found


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number > 1)}"


def any_world_size_table(found: dict[str, dict[int, Run]]) -> Table:
    """Return what differs from one rank after the last step."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("weights that differ from one rank's", no_wrap=True)
    for ranks in next(iter(found.values())):
        table.add_column(_ranks(ranks), justify="right")
    for name, runs in found.items():
        cells = []
        for run in runs.values():
            share = f"{100 * run.differing[-1]:.1f} %, up to {run.largest[-1]:.0e}"
            cells.append(share if run.differing[-1] else "none")
        table.add_row(name, *cells)
    return table

"""Whose parameters are those of one process that adds the ranks' gradients in rank order?

All contenders follow the same rule on the same data. What differs is the order in which they add
the ranks' gradients, and where they divide by their number: rounding makes of it other parameters,
which depend on the number of ranks, on bucket sizes, and for some on the algorithm that a backend
picks.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from belief_dist.options import DEFAULTS
from belief_dist.rule import step_scalars, update_reference_
from benchmarks.engines import OPTIONS, SAME_RULE, import_package, loss_of, missing_package
from examples.gpt.model import GPT, VOCABULARY

_CONTEXT = 64


@dataclass
class Difference:
    """How far an engine's parameters are from the reference after training."""

    elements: float  # part of all that differ in any bit
    largest: float  # absolute difference


def _model() -> GPT:
    torch.manual_seed(0)
    return GPT(3, 96, 3, _CONTEXT)


def _batch(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(VOCABULARY, (2, _CONTEXT + 1), generator=generator)


def flat_weights(model: GPT) -> Tensor:
    """Return all parameters as one tensor; called by all ranks."""
    params = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
    return torch.cat([param.detach().flatten() for param in params])


def reference(ranks: int, steps: int) -> Tensor:
    """Return all parameters of one process that computes for all ranks."""
    torch.set_num_threads(1)
    model = _model()
    params = list(model.parameters())
    moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in params]
    for step in range(1, steps + 1):
        sums: list[Tensor] = []
        for rank in range(ranks):
            grads = torch.autograd.grad(loss_of(model, _batch(rank, step)), params)
            sums = [a + b for a, b in zip(sums, grads, strict=True)] if sums else list(grads)
        scalars = step_scalars({**DEFAULTS, **OPTIONS}, step)
        with torch.no_grad():
            for param, total, (mean, belief) in zip(params, sums, moments, strict=True):
                update_reference_(param, total, mean, belief, scalars, grad_scale=1 / ranks)
    return flat_weights(model)


def _rank_main(rank: int, ranks: int, name: str, steps: int, store: str, link: Connection) -> None:
    join(rank, ranks, name, store)
    model = _model()
    train = SAME_RULE[name](model, torch.float32)
    for step in range(1, steps + 1):
        list(train(_batch(rank, step)))
    flat = flat_weights(model)
    if rank == 0:
        link.send(flat.numpy())
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(ranks: int, main: Callable[..., None], *args: Any) -> Any:
    """Start `main(rank, ranks, *args, store, link)` on so many processes.

    Returns:
        What the first rank sends over its `link`.

    Raises:
        RuntimeError: It has sent nothing.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=main,
                args=(rank, ranks, *args, f"file://{folder}/store", theirs),
                daemon=True,
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        theirs.close()
        try:
            found = ours.recv()
        except EOFError as error:
            raise RuntimeError(f"a rank has failed in {args}, see above") from error
        for process in processes:
            process.join()
    return found


def join(rank: int, ranks: int, name: str, store: str) -> None:
    """Make this process a rank of one thread, for the contender `name`."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    os.environ.update({key: str(value) for key, value in places.items()})
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    import_package(name)


def run_bits(
    worlds: Sequence[int], steps: int, engines: Sequence[str] = tuple(SAME_RULE)
) -> dict[str, dict[int, Difference]]:
    """Return by engine and number of ranks how far it is from the reference."""
    expected = {ranks: reference(ranks, steps) for ranks in worlds}
    found: dict[str, dict[int, Difference]] = {}
    for name in (name for name in engines if missing_package(name) is None):
        found[name] = {}
        for ranks, flat in expected.items():
            trained = torch.from_numpy(run_ranks(ranks, _rank_main, name, steps))
            off = (trained - flat).abs()
            found[name][ranks] = Difference((off > 0).double().mean().item(), off.max().item())
    return found


def bits_table(found: dict[str, dict[int, Difference]]) -> Table:
    """Return the differences as a table."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for ranks in next(iter(found.values())):
        table.add_column(f"{ranks} ranks:\nelements off", justify="right")
        table.add_column("largest\ndifference", justify="right")
    for name, worlds in found.items():
        cells = []
        for each in worlds.values():
            differs = each.elements > 0
            cells += [f"{100 * each.elements:.1f} %", f"{each.largest:.1e}"] if differs else "00"
        table.add_row(name, *cells)
    return table

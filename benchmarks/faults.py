"""What happens to a job when one of its ranks ends: at every phase of a step, in every way.

Each case is a job of three ranks on a small model, of which rank 1 is killed, stopped, raises or
leaves. The others write down when they noticed and what they were told; a job in which one of them
has noticed nothing long after its deadline is a hang. Peers train the same model.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from belief_dist import AdaBelief, ShardedAdaBelief, kernels
from belief_dist.sharding import shared_memory
from belief_dist.sharding.collectives import Collectives
from belief_dist.sharding.point_to_point import PointToPoint

RANKS, VICTIM = 3, 1
WAYS = ("killed", "stopped", "raises", "leaves")
_TIMEOUT = 4.0  # of the process group in seconds; the optimizer's own is half
_HANGS = 15.0  # seconds after which a rank that has noticed nothing hangs
_STEPS = 200

# Where the victim ends: before a function is called, by the module or class that has it.
_OURS = {
    "forward": (nn.Linear, "forward"),
    "sum": (None, "start_reduce"),
    "agreement": (None, "sum_"),
    "update": (kernels, "update_"),
    "gather": (None, "start_gather"),
    "zero_grad": (ShardedAdaBelief, "zero_grad"),
}
_PEERS = {
    "forward": (nn.Linear, "forward"),
    "backward": (nn.functional, "mse_loss"),
    "step": (torch.optim.Optimizer, "zero_grad"),
}
# Nothing may have changed if the victim ends here.
_BEFORE_COMMIT = ("forward", "sum", "agreement")


def _sharded(model: nn.Module, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    return model, ShardedAdaBelief(model.parameters(), lr=1e-3, bucket_bytes=1 << 14, **options)


def _ddp(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapped = DistributedDataParallel(model)
    return wrapped, ZeroRedundancyOptimizer(wrapped.parameters(), AdaBelief, lr=1e-3)


def _fsdp2(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    return model, AdaBelief(model.parameters(), lr=1e-3)


ENGINES: dict[str, Callable[[nn.Module], tuple[nn.Module, torch.optim.Optimizer]]] = {
    "ShardedAdaBelief": _sharded,
    "ShardedAdaBelief, messages": partial(_sharded, shared_memory=False),
    "ShardedAdaBelief ZeRO-2": partial(_sharded, stage=2),
    "DDP + ZeroRedundancyOptimizer": _ddp,
    "FSDP2": _fsdp2,
}


@dataclass(frozen=True)
class Case:
    """One way to end."""

    engine: str
    phase: str
    way: str
    call: int  # which call of the phase's function it is


@dataclass
class Outcome:
    """What the surviving ranks told.

    Attributes:
        seconds: Until the last of them noticed; None if one never did.
        names_victim: Whether at least one error names the rank that ended.
        kept: Whether all hold the parameters and states of a whole step; None if that was not
            looked at.
    """

    seconds: float | None
    names_victim: bool
    kept: bool | None


def cases(seeds: int, only: Sequence[str] = ()) -> list[Case]:
    """Return all cases, each at `seeds` moments."""
    draw = random.Random(0)
    found = []
    for engine in ENGINES:
        if only and not any(word in engine for word in only):
            continue
        phases = _OURS if "Sharded" in engine else _PEERS
        for phase, way, _ in itertools.product(phases, WAYS, range(seeds)):
            found.append(Case(engine, phase, way, draw.randrange(2, 40)))
    return found


def run_case(case: Case) -> Outcome:
    """Run one job and end one of its ranks."""
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_main, args=(case, r, folder)) for r in range(RANKS)]
        for process in ranks:
            process.start()
        survivors = [ranks[rank] for rank in range(RANKS) if rank != VICTIM]
        deadline = time.monotonic() + 2 * _HANGS
        for process in survivors:
            process.join(max(0.0, deadline - time.monotonic()))
        hangs = any(process.is_alive() for process in survivors)
        for process in ranks:
            process.kill()
            process.join()
        told = [json.loads(path.read_text()) for path in Path(folder).glob("told*")]
    noticed = [each["after"] for each in told if each["said"]]
    return Outcome(
        seconds=None if hangs or len(noticed) < len(survivors) else max(noticed),
        names_victim=any(f"rank {VICTIM}" in each["said"] for each in told),
        kept=all(each["kept"] for each in told) if case.phase in _BEFORE_COMMIT else None,
    )


def run_faults(seeds: int, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Run all cases; return a row for each engine and way."""
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.fsdp"])
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for case in tqdm(cases(seeds, only), unit="job"):
        groups.setdefault((case.engine, case.way), []).append(run_case(case))
    return [_row(engine, way, outcomes) for (engine, way), outcomes in groups.items()]


def _row(engine: str, way: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    seconds = [each.seconds for each in outcomes if each.seconds is not None]
    looked_at = [each.kept for each in outcomes if each.kept is not None]
    return {
        "engine": engine,
        "rank 1": way,
        "jobs": len(outcomes),
        "median s": round(median(seconds), 2) if seconds else "-",
        "max s": round(max(seconds), 2) if seconds else "-",
        "hangs": len(outcomes) - len(seconds),
        "names it": sum(each.names_victim for each in outcomes),
        "state kept": f"{sum(looked_at)} of {len(looked_at)}" if "Sharded" in engine else "-",
    }


def _main(case: Case, rank: int, folder: str) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hundreds of tracebacks that are wanted
    torch.set_num_threads(1)
    timeout = timedelta(seconds=_TIMEOUT)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/s", rank=rank, world_size=RANKS, timeout=timeout
    )
    torch.manual_seed(0)
    model, optimizer = ENGINES[case.engine](nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]))
    said, kept, before = "", True, _state(optimizer)
    try:
        with _ending(case, rank, folder, optimizer):
            for step in range(_STEPS):
                before = _state(optimizer)
                loss = nn.functional.mse_loss(
                    model(torch.ones(2, 64) * (rank + step)), torch.ones(2, 64)
                )
                loss.backward()
                optimizer.step()
                if isinstance(optimizer, ShardedAdaBelief):
                    optimizer.wait_pending()
                optimizer.zero_grad()
    except (RuntimeError, SystemExit) as error:
        said = str(error) or type(error).__name__
    # Nothing is waited for: states are this rank's own.
    kept = all(map(torch.equal, before, _state(optimizer)))
    ended = Path(folder, "ended")
    after = time.time() - float(ended.read_text()) if ended.exists() else 0.0
    Path(folder, f"told{rank}").write_text(json.dumps({"said": said, "after": after, "kept": kept}))
    os._exit(0)


def _ending(case: Case, rank: int, folder: str, optimizer: torch.optim.Optimizer) -> Any:
    owner, name = (_OURS if "Sharded" in case.engine else _PEERS)[case.phase]
    if owner is None:
        comm: Collectives = optimizer.comm  # type: ignore[attr-defined]
        owner = type(comm)
        assert owner in (shared_memory.SharedMemory, PointToPoint)
    original = getattr(owner, name)
    calls = itertools.count()

    def end(*args: Any, **kwargs: Any) -> Any:
        if rank == VICTIM and next(calls) == case.call:
            Path(folder, "ended").write_text(str(time.time()))
            if case.way == "raises":
                raise RuntimeError("out of memory, say")
            if case.way == "leaves":
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL if case.way == "killed" else signal.SIGSTOP)
        return original(*args, **kwargs)

    return mock.patch.object(owner, name, end)


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return copies of what a sharded optimizer keeps on this rank: its pieces, and steps."""
    if not isinstance(optimizer, ShardedAdaBelief):
        return []
    found = []
    for index, param in enumerate(optimizer._params):
        found += [each.clone() for each in optimizer.fragment_tensors(index).values()]
        found.append(torch.tensor(optimizer.state[param]["step"]))
    return found

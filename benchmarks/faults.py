"""What happens to a job when one of its ranks ends: at every phase of a step, in every way.

Each case is a job of three ranks on a small model, of which rank 1 is killed, stopped, raises or
leaves. The others write down when they noticed and what they were told; a job in which one of them
has noticed nothing long after its deadline is a hang. Peers train the same model.

A phase is a call of a function that a step makes, or a save, a load or a copy to another host: the
victim ends before it, or right after it, at one of many such calls.
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
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from belief_dist import AdaBelief, ShardedAdaBelief, checkpoint, kernels
from belief_dist.checkpoint import run_directory, saving, standby
from belief_dist.checkpoint.checksummed_files import check_files, read_manifest
from belief_dist.sharding.collectives import Collectives
from belief_dist.sharding.grad_reducer import GradReducer
from belief_dist.sharding.read_guard import ReadGuard
from belief_dist.sharding.zero1 import Zero1Reducer
from belief_dist.sharding.zero2 import Zero2Reducer

RANKS, VICTIM = 3, 1
WAYS = ("killed", "stopped", "raises", "leaves")
_TIMEOUT = 4.0  # of the process group in seconds; the optimizer's own is half
_HANGS = 15.0  # seconds after which a rank that has noticed nothing hangs
_COMES = 300.0  # seconds within which a job must come to the end of the victim
_TRIES = 10
_STEPS = 200

# What ranks import, but once for all; none of it starts a thread, which a fork would lose.
PRELOADED = [
    "torch._dynamo",  # by the first optimizer of a process
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "benchmarks.faults",
]


class Point(NamedTuple):
    """A moment of a rank: a call of a function, by the module or class that has it."""

    owner: Any  # None: the class of the optimizer's `Collectives`
    name: str
    after: bool = False  # the call, and not before it


OURS = {
    "forward": Point(nn.Linear, "forward"),
    "hook": Point(GradReducer, "on_gradient"),
    "sum": Point(None, "start_reduce"),
    "sums waited for": Point(Zero1Reducer, "finish"),
    "agreement": Point(None, "sum_"),
    "committed": Point(None, "sum_", after=True),
    "update": Point(kernels, "update_"),
    "updated": Point(kernels, "update_", after=True),
    "gather": Point(None, "start_gather"),
    "gathers waited for": Point(ReadGuard, "wait_all"),
    "zero_grad": Point(ShardedAdaBelief, "zero_grad"),
    "save": Point(None, "exchange"),
    "save, files written": Point(saving, "write_files", after=True),
    "load": Point(None, "exchange"),
    "standby, copies": Point(standby, "transfer"),
}
PEERS = {
    "forward": Point(nn.Linear, "forward"),
    "backward": Point(nn.functional, "mse_loss"),
    "step": Point(torch.optim.Optimizer, "zero_grad"),
}
# Nothing may have changed if the victim ends here.
BEFORE_COMMIT = ("forward", "hook", "sum", "sums waited for", "agreement")
_EVERY = 3  # steps between two saves, loads or copies


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
    kept: bool | None  # or that a whole checkpoint is there, where one was saved or loaded


def cases(seeds: int, only: Sequence[str] = ()) -> list[Case]:
    """Return all cases, each at `seeds` moments."""
    draw = random.Random(0)
    found = []
    for engine in ENGINES:
        if only and not any(word in engine for word in only):
            continue
        phases = phases_of(engine)
        for phase, way, _ in itertools.product(phases, WAYS, range(seeds)):
            found.append(Case(engine, phase, way, draw.randrange(2, 40)))
    return found


def phases_of(engine: str) -> dict[str, Point]:
    """Return the phases that a step of an engine has, by name."""
    if "Sharded" not in engine:
        return PEERS
    finish = Zero2Reducer if "ZeRO-2" in engine else Zero1Reducer
    return OURS | {"sums waited for": Point(finish, "finish")}


def run_case(case: Case) -> Outcome:
    """Run one job and end one of its ranks.

    Other work can keep a rank from its turn for longer than the timeout. A job that ends so before
    its victim does has shown nothing, and is run again.

    Raises:
        RuntimeError: No job has come to the end of its victim.
    """
    for _ in range(_TRIES):
        outcome = _try_case(case)
        if outcome is not None:
            return outcome
    raise RuntimeError(f"none of {_TRIES} jobs has come to {case}: this machine has other work.")


def _try_case(case: Case) -> Outcome | None:
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_main, args=(case, r, folder)) for r in range(RANKS)]
        for process in ranks:
            process.start()
        survivors = [ranks[rank] for rank in range(RANKS) if rank != VICTIM]
        # A machine with much other work may need long until a job has come so far.
        ended = Path(folder, "ended")
        deadline = time.monotonic() + _COMES
        while not ended.exists() and any(process.is_alive() for process in ranks):
            if time.monotonic() > deadline:
                end(ranks)
                raise RuntimeError(f"hangs: in {_COMES} s, rank {VICTIM} has not come to {case}.")
            time.sleep(0.01)
        if not ended.exists():
            return None
        hangs = still_run(survivors, _HANGS)
        end(ranks)
        told = [json.loads(path.read_text()) for path in Path(folder).glob("told*")]
        kept = None
        if case.phase in BEFORE_COMMIT and "Sharded" in case.engine:
            kept = all(each["kept"] for each in told)
        elif case.phase.startswith("standby"):
            kept = _others_hold_a_step(Path(folder))
        elif case.phase.startswith(("save", "load")):
            kept = _is_whole(Path(folder, "run"))
    noticed = [each["after"] for each in told if each["said"]]
    return Outcome(
        seconds=None if hangs or len(noticed) < len(survivors) else max(noticed),
        names_victim=any(f"rank {VICTIM}" in each["said"] for each in told),
        kept=kept,
    )


def still_run(processes: Sequence[BaseProcess], seconds: float) -> bool:
    """Wait for processes, and return whether one of them still runs after so many seconds."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    return any(process.is_alive() for process in processes)


def end(processes: Sequence[BaseProcess]) -> None:
    """End processes, and wait until they are gone."""
    for process in processes:
        process.kill()
        process.join()


def _is_whole(run: Path) -> bool:
    try:
        checkpoint.verify(run)
    except (OSError, ValueError):
        return False
    return True


def _others_hold_a_step(folder: Path) -> bool:
    """Return whether the hosts that are left have every file of a step, as it was written."""
    hosts = [folder / f"host{rank}" for rank in range(RANKS) if rank != VICTIM]
    for path in run_directory.complete(hosts[0]):
        _, checksums = read_manifest(path)
        places = [host / path.name for host in hosts]
        holders = {name: [p for p in places if (p / name).exists()] for name in checksums}
        with suppress(ValueError):
            for name, holding in holders.items():
                for place in holding:
                    check_files(place, checksums, [name])
            if all(holders.values()):
                return True
    return False


def run_faults(
    seeds: int, only: Sequence[str] = (), keep: Callable[[list[dict[str, Any]]], None] | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run all cases; return a row for each engine and way, and one for each case.

    Args:
        seeds: As for `cases`.
        only: Likewise.
        keep: Is given, after each case, those that have run.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    groups: dict[tuple[str, str], list[Outcome]] = {}
    single = []
    for case in tqdm(cases(seeds, only), unit="job"):
        outcome = run_case(case)
        groups.setdefault((case.engine, case.way), []).append(outcome)
        single.append(asdict(case) | asdict(outcome))
        if keep is not None:
            keep(single)
    return [_row(engine, way, outcomes) for (engine, way), outcomes in groups.items()], single


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
        "state kept": f"{sum(looked_at)} of {len(looked_at)}" if looked_at else "-",
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
    said, kept, before = "", True, state_of(optimizer)
    aside = _aside(case, Path(folder), rank, model, optimizer)
    try:
        with _ending(case, rank, folder, optimizer):
            for step in range(_STEPS):
                if step % _EVERY == 0:
                    aside(step)
                before = state_of(optimizer)
                take_step(model, optimizer, rank + step)
    except (RuntimeError, SystemExit) as error:
        said = str(error) or type(error).__name__
    # Nothing is waited for: states are this rank's own.
    kept = all(map(torch.equal, before, state_of(optimizer)))
    ended = Path(folder, "ended")
    after = time.time() - float(ended.read_text()) if ended.exists() else 0.0
    Path(folder, f"told{rank}").write_text(json.dumps({"said": said, "after": after, "kept": kept}))
    os._exit(0)


def _aside(
    case: Case, folder: Path, rank: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[int], object]:
    """Return what a job does beside its steps: save, load, or copy to another host."""
    both: dict[str, Any] = {"model": model, "optimizer": optimizer}
    if case.phase.startswith("standby"):
        # Folders of their own make the ranks those of three hosts.
        host = folder / f"host{rank}"
        return standby.Standby(host, **both, timeout=timedelta(seconds=_TIMEOUT / 2)).save
    if case.phase.startswith(("save", "load")):
        checkpoint.save(folder / "run", 0, **both)  # to go back to
    if case.phase.startswith("save"):
        return lambda step: checkpoint.save(folder / "run", step + 1, **both, keep=2)
    if case.phase == "load":
        return lambda step: checkpoint.load(folder / "run", **both)
    return lambda step: None


def at_call(
    point: Point, optimizer: torch.optim.Optimizer, call: int, action: Callable[[], object]
) -> Any:
    """Return a context in which call number `call` of a point's function comes with `action`."""
    owner, name, after = point
    if owner is None:
        comm: Collectives = optimizer.comm  # type: ignore[attr-defined]
        owner = type(comm)
    original = getattr(owner, name)
    calls = itertools.count()

    def calling(*args: Any, **kwargs: Any) -> Any:
        is_chosen = next(calls) == call
        if is_chosen and not after:
            action()
        found = original(*args, **kwargs)
        if is_chosen and after:
            action()
        return found

    return mock.patch.object(owner, name, calling)


def _ending(case: Case, rank: int, folder: str, optimizer: torch.optim.Optimizer) -> Any:
    if rank != VICTIM:
        return nullcontext()

    def end() -> None:
        Path(folder, "ended").write_text(str(time.time()))
        if case.way == "raises":
            raise RuntimeError("out of memory, say")
        if case.way == "leaves":
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL if case.way == "killed" else signal.SIGSTOP)

    return at_call(phases_of(case.engine)[case.phase], optimizer, case.call, end)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """Take a step on data of this number, which is done when it returns."""
    ones = torch.ones(2, 64)
    nn.functional.mse_loss(model(ones * number), ones).backward()
    optimizer.step()
    if isinstance(optimizer, ShardedAdaBelief):
        optimizer.wait_pending()
    optimizer.zero_grad()


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return copies of what a sharded optimizer keeps on this rank: its pieces, and steps."""
    if not isinstance(optimizer, ShardedAdaBelief):
        return []
    found = []
    for index, param in enumerate(optimizer._params):
        found += [each.clone() for each in optimizer.fragment_tensors(index).values()]
        found.append(torch.tensor(optimizer.state[param]["step"]))
    return found

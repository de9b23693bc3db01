"""What happens to a job when its network fails: a cable, packets, or a rank that is slow.

Each case is a job on a small model, whose hosts are the network namespaces of `benchmarks.network`.
Host 1 fails, in one of these ways:

- its cable is pulled at a chosen call of a phase, for 5 seconds: training goes on;
- or for ever: every rank must end with an error, by itself, within its timeout;
- packets to all hosts get lost at random: training goes on;
- a rank of it sleeps in some steps: training goes on.

A job that goes on must end with the bits of one that nothing has disturbed. Peers train the same
model. Needs root.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from belief_dist.sharding.collectives import CommunicationError
from belief_dist.sharding.read_guard import TornParameters
from benchmarks import network
from benchmarks.faults import (
    BEFORE_COMMIT,
    ENGINES,
    PRELOADED,
    at_call,
    end,
    phases_of,
    state_of,
    still_run,
    take_step,
)

UNDISTURBED, DOWN, CUT, LOSS, SLOW = "nothing", "down 5 s", "down for ever", "5 % lost", "slow rank"
FAULTS = (DOWN, CUT, LOSS, SLOW)
_PHASES = ("forward", "hook", "sum", "agreement", "update", "gather")
_PEERS = ("forward", "backward", "step")
# The host of each rank. Of two ranks on a host, one sends for both.
HOSTS: dict[str, tuple[int, ...]] = {
    "ShardedAdaBelief": (0, 1, 2),
    "ShardedAdaBelief ZeRO-2": (0, 1, 2),
    "ShardedAdaBelief, 2 hosts x 2": (0, 0, 1, 1),
    "DDP + ZeroRedundancyOptimizer": (0, 1, 2),
}
_STEPS = 30
_SECONDS_DOWN, _SHARE_LOST, _SECONDS_LATE = 5.0, 0.05, 0.5
# Of the process group, in seconds; the optimizer's own is half. TCP tries again after pauses that
# double: it has noticed a cable that was away for 5 s after 6.
_PATIENT, _SHORT = 60.0, 6.0
_HANGS = 40.0  # seconds after its fault or beginning within which a job must end


@dataclass(frozen=True)
class Case:
    """One fault."""

    engine: str
    fault: str
    phase: str = "forward"
    call: int = 20  # of the phase's function, at which it happens


@dataclass
class Outcome:
    """What became of a job.

    Attributes:
        seconds: Until the last rank had an error; None if it went on, or hangs.
        total: That the training took.
        hangs: Whether some rank had to be killed.
        errors: What each rank was told; empty for one that has trained to its end.
        is_named: How many errors are of the optimizer's own kind, and tell rank and phase.
        kept: Whether all ranks hold the states of the step before; None if that was not looked at.
        bits: Of parameters and states of all ranks at the end.
        lost: Packets that were lost.
    """

    seconds: float | None
    total: float
    hangs: bool
    errors: list[str]
    is_named: int
    kept: bool | None
    bits: str
    lost: int


def cases(only: Sequence[str] = ()) -> list[Case]:
    """Return all cases; the first of an engine is undisturbed."""
    found = []
    for engine in HOSTS:
        if only and not any(word in engine for word in only):
            continue
        found += [Case(engine, fault) for fault in (UNDISTURBED, LOSS, SLOW)]
        for number, phase in enumerate(_PHASES if "Sharded" in engine else _PEERS):
            found += [Case(engine, fault, phase, 11 + number) for fault in (DOWN, CUT)]
    return found


def run_case(case: Case) -> Outcome:
    """Run one job, and let its network fail."""
    context = multiprocessing.get_context("forkserver")
    multiprocessing.set_forkserver_preload([*PRELOADED, "benchmarks.network_faults"])
    hosts = HOSTS[case.engine]
    with (
        tempfile.TemporaryDirectory() as folder,
        network.Network(max(hosts) + 1, None) as net,
    ):
        if case.fault == LOSS:
            net.lose(_SHARE_LOST)
        begin = time.time()
        ranks = [
            context.Process(target=_main, args=(case, rank, net, folder))
            for rank in range(len(hosts))
        ]
        for process in ranks:
            process.start()
        hangs = still_run(ranks, _HANGS)
        end(ranks)
        lost = net.lost() if case.fault == LOSS else 0
        told = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("told*"))]
        failed = Path(folder, "failed")
        since = float(failed.read_text()) if failed.exists() else begin
    errors = [each["said"] for each in told]
    ended = [each["at"] - since for each in told if each["said"]]
    looks = case.fault == CUT and case.phase in BEFORE_COMMIT and "Sharded" in case.engine
    return Outcome(
        seconds=max(ended) if ended and not hangs else None,
        total=max((each["seconds"] for each in told), default=0.0),
        hangs=hangs or len(told) < len(ranks),
        errors=errors,
        is_named=sum(map(_names_rank_and_phase, errors)),
        kept=all(each["kept"] for each in told) if looks else None,
        bits=" ".join(each["bits"] for each in told),
        lost=lost,
    )


def _names_rank_and_phase(said: str) -> bool:
    phase = (
        r"(summing the gradients|gathering the parameters) of bucket \d+|agreeing about the step"
    )
    kinds = f"{CommunicationError.__name__}|{TornParameters.__name__}"
    return bool(re.match(rf"({kinds}): rank \d of \d, ({phase}): ", said))


def run_network_faults(
    only: Sequence[str] = (),
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run all cases; return a row for each engine and fault, and one for each case."""
    bits: dict[str, str] = {}
    groups: dict[tuple[str, str], list[Outcome]] = {}
    single = []
    for case in tqdm(cases(only), unit="job"):
        outcome = run_case(case)
        bits.setdefault(case.engine, outcome.bits)
        groups.setdefault((case.engine, case.fault), []).append(outcome)
        single.append(asdict(case) | asdict(outcome))
    rows = [_row(*key, outcomes, bits[key[0]]) for key, outcomes in groups.items()]
    return rows, single


def _row(engine: str, fault: str, outcomes: Sequence[Outcome], bits: str) -> dict[str, Any]:
    seconds = [each.seconds for each in outcomes if each.seconds is not None]
    looked_at = [each.kept for each in outcomes if each.kept is not None]
    told = [error for each in outcomes for error in each.errors if error]
    return {
        "engine": engine,
        "fault": fault,
        "jobs": len(outcomes),
        "hangs": sum(each.hangs for each in outcomes),
        "same bits": sum(each.bits == bits for each in outcomes),
        "training s": round(median(each.total for each in outcomes), 1),
        "error s, max": round(max(seconds), 2) if seconds else "-",
        "names rank, phase": f"{sum(each.is_named for each in outcomes)} of {len(told)}",
        "state kept": f"{sum(looked_at)} of {len(looked_at)}" if looked_at else "-",
        "packets lost": sum(each.lost for each in outcomes) or "-",
    }


def _main(case: Case, rank: int, net: network.Network, folder: str) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # tracebacks that are wanted
    torch.set_num_threads(1)
    hosts = HOSTS[case.engine]
    network.enter(net.namespace(hosts[rank]))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=len(hosts),
        timeout=timedelta(seconds=_SHORT if case.fault == CUT else _PATIENT),
    )
    torch.manual_seed(0)
    model, optimizer = ENGINES[case.engine.partition(", 2 hosts")[0]](
        nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    )

    def fail() -> None:
        Path(folder, "failed").write_text(str(time.time()))
        net.plug(1, "down")
        if case.fault == DOWN:
            threading.Timer(_SECONDS_DOWN, net.plug, (1, "up")).start()

    fails = rank == hosts.index(1) and case.fault in (DOWN, CUT)
    point = phases_of(case.engine)[case.phase]
    said, before, begin = "", state_of(optimizer), time.time()
    try:
        with at_call(point, optimizer, case.call, fail) if fails else nullcontext():
            for step in range(_STEPS):
                before = state_of(optimizer)
                if case.fault == SLOW and rank == hosts.index(1) and step % 7 == 3:
                    time.sleep(_SECONDS_LATE)
                take_step(model, optimizer, rank + step)
            dist.barrier()
    except RuntimeError as error:
        said = f"{type(error).__name__}: {error}"
    at, kept = time.time(), all(map(torch.equal, before, state_of(optimizer)))
    # After an error, parameters may be torn, and must not be read.
    held = [] if said else [*state_of(optimizer), *(p.detach() for p in model.parameters())]
    digest = hashlib.sha256(b"".join(each.numpy().tobytes() for each in held)).hexdigest()
    told = {"said": said, "at": at, "seconds": at - begin, "kept": kept, "bits": digest}
    Path(folder, f"told{rank}").write_text(json.dumps(told))

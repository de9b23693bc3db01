"""Before training, the ranks check that all run the same code with the same settings."""

from __future__ import annotations

import hashlib
import json
import socket
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from belief_dist.distributed.errors import LaunchError
from belief_dist.version import __version__

_MAX_SKEW = 5.0  # seconds
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class RankReport:
    """What each rank reports to rank 0.

    Attributes:
        host: Its host name.
        facts: Values that must be equal on all ranks, by description.
        problem: Why this rank cannot take part; empty if it can.
    """

    host: str
    facts: Mapping[str, str]
    problem: str = ""


def own_facts(world_size: int, backend: str) -> dict[str, str]:
    """Return the values that must be equal on all ranks, by description."""
    return {
        "world size": str(world_size),
        "backend": backend,
        "version of torch": torch.__version__,
        "version of belief_dist": __version__,
        "source code of belief_dist": source_hash(_PACKAGE),
    }


def source_hash(folder: Path) -> str:
    """Return a short hash of the names and contents of all source files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".py", ".cpp"}:
            digest.update(f"{path.relative_to(folder)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def difference(first: RankReport, report: RankReport, rank: int) -> str:
    """Describe the first difference between rank 0's report and another; empty if there is none."""
    if report.problem:
        return f"rank {rank} on {report.host} reports: {report.problem}"
    for what, here in first.facts.items():
        there = report.facts.get(what)
        if there != here:
            return (
                f"the {what} differs: {here} on rank 0 ({first.host}), {there} on rank {rank} "
                f"({report.host}). Start every rank with the same environment and the same code."
            )
    return ""


def compare_ranks(
    store: Store,
    rank: int,
    world_size: int,
    facts: Mapping[str, str],
    problem: str,
    *,
    timeout: timedelta,
    warn: bool,
) -> list[str]:
    """Wait until all ranks have reported, and compare the reports; called by all ranks.

    Args:
        store: Used for nothing else.
        rank: Of this process.
        world_size: Number of processes.
        facts: See `own_facts`.
        problem: Why this rank cannot take part; empty if it can.
        timeout: How long to wait for a rank before its absence is an error.
        warn: Whether this rank warns if its clock differs from rank 0's.

    Returns:
        The host of every rank on rank 0, an empty list on the others.

    Raises:
        LaunchError: On every rank, if any rank has a problem, differs from rank 0 or is missing.
    """
    # The counter is 2 for the second process that claims this rank.
    if store.add(f"arrived/{rank}", 1) > 1:
        raise LaunchError(
            f"another process is rank {rank} of this job already: give every process its own rank, "
            f"and every job its own MASTER_PORT."
        )
    report = RankReport(socket.gethostname(), facts, problem)
    store.set(f"report/{rank}", json.dumps([report.host, report.facts, report.problem]))
    hosts: list[str] = []
    if rank == 0:
        sentence = difference(report, report, 0)
        if not sentence:
            sentence, hosts = _first_difference(store, report, world_size, timeout)
        store.set("verdict", json.dumps([sentence, time.time()]))
    # Twice the timeout: rank 0 itself may wait that long for the last rank before it answers.
    sentence, clock = json.loads(_get(store, "verdict", timeout * 2, "rank 0 has not answered"))
    skew = time.time() - clock
    if sentence:
        if rank == 0:
            # The store's server lives in this process: exit only when the others have read.
            _wait_for_readers(store, world_size)
        else:
            store.add("read", 1)
        raise LaunchError(sentence)
    if warn and abs(skew) > _MAX_SKEW:
        warnings.warn(
            f"the clock of {report.host} (rank {rank}) is {abs(skew):.0f} s "
            f"{'ahead of' if skew > 0 else 'behind'} that of rank 0: logs and file times will "
            f"mislead; synchronize the hosts.",
            stacklevel=3,
        )
    return hosts


def _first_difference(
    store: Store, first: RankReport, world_size: int, timeout: timedelta
) -> tuple[str, list[str]]:
    deadline = time.monotonic() + timeout.total_seconds()  # one for all ranks together
    hosts = [first.host]
    for rank in range(1, world_size):
        left = timedelta(seconds=max(0.01, deadline - time.monotonic()))
        try:
            store.wait([f"report/{rank}"], left)
        except dist.DistStoreError:
            missing = [r for r in range(1, world_size) if not store.check([f"report/{r}"])]
            return (
                f"{_ranks(missing)} of {world_size} did not join within "
                f"{timeout.total_seconds():g} s.",
                hosts,
            )
        host, facts, problem = json.loads(store.get(f"report/{rank}"))
        sentence = difference(first, RankReport(host, facts, problem), rank)
        if sentence:
            return sentence, hosts
        hosts.append(host)
    return "", hosts


def _ranks(missing: list[int]) -> str:
    shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return f"rank{'s' if len(missing) > 1 else ''} {shown}"


def _get(store: Store, key: str, timeout: timedelta, failure: str) -> str:
    try:
        store.wait([key], timeout)
        value: bytes = store.get(key)
        return value.decode()
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise LaunchError(f"{failure}: {str(error).splitlines()[0]}") from None


def _wait_for_readers(store: Store, world_size: int) -> None:
    deadline = time.monotonic() + 2
    present = sum(store.check([f"report/{rank}"]) for rank in range(1, world_size))
    while store.add("read", 0) < present and time.monotonic() < deadline:
        time.sleep(0.02)


def count_local_rank(store: Store, rank: int) -> int:
    """Return the number of lower ranks on this host; called by all ranks.

    Raises:
        LaunchError: A lower rank does not join in time.
    """
    here = socket.gethostname()
    store.set(f"host/{rank}", here)
    hosts = []
    for lower in range(rank):
        try:
            hosts.append(store.get(f"host/{lower}").decode())
        except (dist.DistStoreError, dist.DistNetworkError):
            raise LaunchError(f"rank {lower} did not join in time.") from None
    return hosts.count(here)

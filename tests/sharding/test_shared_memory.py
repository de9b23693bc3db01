"""Ranks that read each other's memory: the same bits as by messages, and every way it can end."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from belief_dist import ShardedAdaBelief
from belief_dist.host_memory import team
from belief_dist.sharding.across_hosts import AcrossHosts
from belief_dist.sharding.collectives import CommunicationError, ReduceRequest
from belief_dist.sharding.host_lines import MESSAGE_BYTES, RING
from belief_dist.sharding.point_to_point import PointToPoint
from belief_dist.sharding.shared_memory import SharedMemory
from tests.harness.hosts import on_hosts
from tests.harness.models import HYPER, SHAPES, make_grad, make_params
from tests.harness.ranks import PRELOADED, run_ranks
from tests.harness.reference import backward
from tests.harness.sharded_cases import equals_reference

TIMEOUT = timedelta(seconds=60)


def connect(**options: Any) -> Any:
    return ShardedAdaBelief(make_params(), timeout=TIMEOUT, **options, **HYPER).comm


# - Who shares, and the bits


def ranks_of_a_host_share() -> None:
    assert isinstance(connect(), SharedMemory)
    assert isinstance(connect(shared_memory=False), PointToPoint)
    assert not isinstance(connect(reduction="native"), SharedMemory)
    mesh = init_device_mesh("cpu", (2, 2))
    assert isinstance(connect(process_group=mesh)._row, SharedMemory)
    # One that does not want to has all do without, and they disagree about the option.
    with pytest.raises(ValueError, match="shared_memory"):
        connect(shared_memory=dist.get_rank() != 2)


FEATURES: tuple[dict[str, Any], ...] = (
    {"unused": True, "max_grad_norm": 0.5},
    {"stage": 2, "micro_batches": 2, "reduce_dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "master": "remainder", "state_dtype": torch.uint8},
    {"stage": 2, "micro_batches": 2, "dtype": torch.bfloat16, "offload": "cpu"},
)


def mixtures(hosts: str) -> list[Callable[[], None]]:
    return [
        partial(on_hosts, hosts, partial(equals_reference, size, overlap, **more), AcrossHosts)
        for size, overlap, more in zip(
            itertools.cycle((1500, 1, 10**9)), (True, False, True, True), FEATURES, strict=False
        )
    ]


@pytest.mark.parametrize("hosts", ["aab", "aabb", "abab", "aabbb"])
def test_bits_do_not_depend_on_where_ranks_are(hosts: str, tmp_path: Path) -> None:
    more = [ranks_of_a_host_share] if len(hosts) == 4 else []
    run_ranks(
        len(hosts),
        tmp_path,
        *mixtures(hosts),
        *more,
        partial(crosses_once, hosts),
        partial(on_hosts, hosts, parameters_that_move_are_copied, AcrossHosts),
    )


def crosses_once(hosts: str) -> None:
    """Of a sum, the addends of other hosts than the owner's; of a gather, a piece for each host."""
    rank, count = dist.get_rank(), len(hosts)
    with pytest.MonkeyPatch.context() as patch:
        real, isend = team.own_place(), dist.isend
        patch.setattr(team, "own_place", lambda: real._replace(host=hosts[rank]))
        optimizer = ShardedAdaBelief(make_params(), bucket_bytes=1500, **HYPER)
        sent = 0

        def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal sent
            sent += tensor.nbytes
            return isend(tensor, *args, **kwargs)

        patch.setattr(dist, "isend", counting)
        backward(optimizer._params, [make_grad(s, 1, rank, i, 0) for i, s in enumerate(SHAPES)])
        optimizer.step()
        optimizer.wait_pending()
    piece = 4 * sum(bucket.shard_numel for bucket in optimizer.layout.buckets)
    away = count - hosts.count(hosts[rank])
    assert sent == piece * (away + len(set(hosts)) - 1)


# - Sums in any number, and scripts that stand elsewhere


def more_sums_than_places() -> None:
    """Ranks that are ahead wait for those that still read; nothing is overwritten."""
    comm = connect()
    size = 32 * comm.world_size
    flats = [comm.buffer(size, torch.float32, torch.device("cpu")) for _ in range(3)]
    shards = [torch.zeros(32) for _ in range(RING + 7)]
    handles = []
    for number, shard in enumerate(shards):
        flat = flats[number % 3]
        if number >= 3:
            handles[number - 3].wait()
        flat.fill_((comm.rank + 1) * (number + 1))
        handles.append(comm.start_reduce(ReduceRequest(flat, shard)))
    for handle in handles:
        handle.wait()
    expected = sum(range(1, comm.world_size + 1))
    for number, shard in enumerate(shards):
        assert (shard == expected * (number + 1)).all(), number
    for number in range(RING + 7):
        flat = flats[0]
        flat.view(comm.world_size, -1)[comm.rank] = comm.rank + number
        comm.start_gather(flat).wait()
        ends = flat.view(comm.world_size, -1)[:, -1].tolist()
        assert ends == [rank + number for rank in range(comm.world_size)]
        comm.sum_(torch.ones(1, dtype=torch.int64))  # before anybody writes again


def long_messages_travel_too() -> None:
    comm = connect()
    for words in (1, 1000, MESSAGE_BYTES // 8, MESSAGE_BYTES // 8 + 1):
        for turn in range(3):
            message = torch.full((words,), comm.rank + turn, dtype=torch.int64)
            comm.sum_(message)
            assert (message == sum(range(turn, turn + comm.world_size))).all()


def memory_from_elsewhere_is_copied() -> None:
    comm = connect()
    shard, flat = torch.zeros(32), torch.full((32 * comm.world_size,), comm.rank + 1.0)
    comm.start_reduce(ReduceRequest(flat, shard)).wait()
    assert (shard == sum(range(1, comm.world_size + 1))).all()


def parameters_that_move_are_copied() -> None:
    """torch.multiprocessing moves what it sends into memory of its own, and all views with it."""
    for stage in (1, 2):
        params, still = make_params(), make_params()
        options = {"bucket_bytes": 1500, "stage": stage, **HYPER}
        optimizer, other = ShardedAdaBelief(params, **options), ShardedAdaBelief(still, **options)
        for step in range(4):
            if step == 2:
                for param in params[:4]:
                    param.untyped_storage()._share_fd_cpu_()
                    assert optimizer.comm._arena.offset_of(param.data) is None
            for each, made in ((params, optimizer), (still, other)):
                backward(
                    each, [make_grad(s, step, dist.get_rank(), i) for i, s in enumerate(SHAPES)]
                )
                made.step()
                made.zero_grad()
        optimizer.wait_pending()
        other.wait_pending()
        assert all(map(torch.equal, params, still)), stage


def a_collective_of_the_script_holds_nobody_up(stage: Literal[1, 2]) -> None:
    """One rank is late in backward and has two buffers only; the others stand in a barrier.

    Their sums free its buffers. If they were taken by the scripts alone, all would wait for ever.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)])
    optimizer = ShardedAdaBelief(
        model.parameters(), stage=stage, bucket_bytes=1 << 14, timeout=TIMEOUT
    )
    for _ in range(2):
        began = time.monotonic()
        inputs = torch.ones(2, 64)
        for number, layer in enumerate(model):
            inputs = layer(inputs)
            if number == 1:  # reached late in backward, by one rank later than by the others
                inputs.register_hook(_rest_if_first if dist.get_rank() == 0 else _meet)
        inputs.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert time.monotonic() - began < 20


def _rest_if_first(grad: torch.Tensor) -> None:
    time.sleep(0.3)
    dist.barrier()


def _meet(grad: torch.Tensor) -> None:
    dist.barrier()


@pytest.mark.parametrize("world_size", [3, 4])
def test_sums_messages_and_scripts_that_stand_elsewhere(world_size: int, tmp_path: Path) -> None:
    run_ranks(
        world_size,
        tmp_path,
        more_sums_than_places,
        long_messages_travel_too,
        memory_from_elsewhere_is_copied,
        parameters_that_move_are_copied,
        partial(a_collective_of_the_script_holds_nobody_up, 1),
        partial(a_collective_of_the_script_holds_nobody_up, 2),
        a_rank_may_drop_its_optimizer_first,
        nothing_is_left,
    )


def a_rank_may_drop_its_optimizer_first() -> None:
    """Slower ranks still wait for what it has done in its last step."""
    for _ in range(3):
        params = make_params()
        optimizer = ShardedAdaBelief(params, bucket_bytes=1500, timeout=TIMEOUT, **HYPER)
        backward(params, [make_grad(s, 1, dist.get_rank(), i) for i, s in enumerate(SHAPES)])
        optimizer.step()
        if dist.get_rank():
            time.sleep(0.2)  # the first rank has gone by then
        optimizer.wait_pending()
        began = time.monotonic()
        del optimizer, params
        gc.collect()
        assert time.monotonic() - began < 20


def nothing_is_left() -> None:
    """Optimizers that were dropped leave no memory and no thread behind."""

    def held() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count("memfd:belief_dist")
        return maps, threading.active_count()

    for _ in range(3):
        connect()
    deadline = time.monotonic() + 10
    while held() != (0, 1) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert held() == (0, 1)


# - Ends

PHASES = {
    "before its gradients are there": (SharedMemory, "start_reduce"),
    "while it sums": (SharedMemory, "_take"),
    "before it agrees": (SharedMemory, "sum_"),
    "before its parameters may be written": (SharedMemory, "open_gathers"),
    "before it has written its parameters": (SharedMemory, "start_gather"),
}
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "raises": None}


def ends_at(phase: str, how: str, rank: int, world_size: int, folder: Path) -> None:
    """Train until rank 1 ends; write down what the others notice, and when."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    params = make_params()
    # Who is killed must be noticed long before the deadline, who is stopped is noticed by it.
    timeout = timedelta(seconds=2 if how == "stopped" else 40)
    optimizer = ShardedAdaBelief(params, bucket_bytes=1500, timeout=timeout, **HYPER)
    owner, name = PHASES[phase]
    original = getattr(owner, name)
    calls = itertools.count()

    def end(*args: Any) -> Any:
        if rank == 1 and next(calls) == 3:
            (folder / "ended").write_text(str(time.time()))
            if (number := SIGNALS[how]) is not None:
                os.kill(os.getpid(), number)
            raise RuntimeError("out of memory, say")
        return original(*args)

    setattr(owner, name, end)
    try:
        for step in range(50):
            backward(params, [make_grad(s, step, rank, i, 0) for i, s in enumerate(SHAPES)])
            optimizer.step()
            optimizer.zero_grad()
        said = "nothing"
    except (CommunicationError, RuntimeError) as error:
        said = str(error)
    told = {"said": said, "after": time.time() - float((folder / "ended").read_text())}
    (folder / f"rank{rank}.json").write_text(json.dumps(told))
    os._exit(0)


@pytest.mark.parametrize(
    "phase, how",
    [
        *((phase, "killed") for phase in PHASES),
        ("before it agrees", "stopped"),
        ("before it has written its parameters", "stopped"),
        ("before it agrees", "raises"),
    ],
)
def test_a_rank_that_ends(phase: str, how: str, tmp_path: Path) -> None:
    """Every survivor says who it was, and in what."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = multiprocessing.get_context("forkserver")
    ranks = [
        context.Process(target=ends_at, args=(phase, how, rank, 3, tmp_path)) for rank in range(3)
    ]
    for process in ranks:
        process.start()
    for rank in (0, 2):
        ranks[rank].join(60)
        assert ranks[rank].exitcode == 0
    ranks[1].kill()
    ranks[1].join(60)
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 2)]
    for rank, each in zip((0, 2), told, strict=True):
        assert each["said"].startswith(f"rank {rank} of 3, "), each
        assert "bucket" in each["said"] or "agreeing about the step" in each["said"]
        assert each["after"] < 20.0, each
    assert any("rank 1 (process" in each["said"] for each in told), told
    names = [entry for entry in os.listdir("/dev/shm") if "belief" in entry]
    assert not names

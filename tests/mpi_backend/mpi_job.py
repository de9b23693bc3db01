"""What every rank of an MPI job checks; started by test_mpi.py under mpiexec."""

from __future__ import annotations

import copy
import datetime
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import belief_dist.mpi_backend
from belief_dist import AdaBelief, ShardedAdaBelief
from belief_dist.distributed.rank_info import read_rank_info
from tests.harness import checkpoints
from tests.harness.models import HYPER
from tests.harness.sharded_cases import combinations, main_comparison
from tests.harness.torch_state import continues

PLACE = read_rank_info(os.environ)
RANK, SIZE = PLACE.rank, PLACE.world_size


def values(of: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(of)
    return torch.randint(1, 4, (count,), generator=generator).to(dtype)


def reductions() -> None:
    """Small integers: exact in every dtype, so that the order of summation is no matter."""
    folds = {
        dist.ReduceOp.SUM: torch.add,
        dist.ReduceOp.PRODUCT: torch.mul,
        dist.ReduceOp.MIN: torch.minimum,
        dist.ReduceOp.MAX: torch.maximum,
    }
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64):
        whole = [values(of, 10 * SIZE, dtype) for of in range(SIZE)]
        for op, fold in folds.items():
            expected = whole[0]
            for other in whole[1:]:
                expected = fold(expected, other)
            mine = whole[RANK].clone()
            dist.all_reduce(mine, op)
            assert torch.equal(mine, expected), (dtype, op)
            mine = whole[RANK].clone()
            dist.reduce(mine, SIZE - 1, op)
            assert torch.equal(mine, expected if RANK == SIZE - 1 else whole[RANK])
            piece = slice(10 * RANK, 10 * (RANK + 1))
            mine = whole[RANK].clone()
            reduce_scatter(mine[piece], mine, op)
            assert torch.equal(mine[piece], expected[piece])
            out = torch.empty(10, dtype=dtype)
            dist.reduce_scatter(out, list(whole[RANK].split(10)), op)
            assert torch.equal(out, expected[piece])
    average = torch.full((3,), float(RANK))
    dist.all_reduce(average, dist.ReduceOp.AVG)
    assert torch.equal(average, torch.full((3,), sum(range(SIZE)) / SIZE))
    strided = torch.full((4, 3), float(RANK)).t()
    dist.all_reduce(strided)
    assert torch.equal(strided, torch.full((3, 4), float(sum(range(SIZE)))))
    some = torch.tensor([RANK == 0, False])
    dist.all_reduce(some)
    assert some.tolist() == [True, False]
    with pytest.raises(ValueError, match="needs integers"):
        dist.all_reduce(torch.zeros(2), dist.ReduceOp.BOR)
    with pytest.raises(ValueError, match=r"cannot reduce torch\.float8_e4m3fn"):
        dist.all_reduce(torch.zeros(2).to(torch.float8_e4m3fn))


def moves() -> None:
    everyone = [torch.arange(5.0) + 10 * of for of in range(SIZE)]
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    flat = torch.empty(5 * SIZE)
    gather(flat, everyone[RANK])
    assert torch.equal(flat, torch.cat(everyone))
    out = [torch.empty(of + 1) for of in range(SIZE)]
    dist.all_to_all(out, [torch.full((RANK + 1,), float(RANK)) for _ in range(SIZE)])
    assert [t.tolist() for t in out] == [[float(of)] * (of + 1) for of in range(SIZE)]
    received = torch.empty(SIZE, 2)
    dist.all_to_all_single(received, torch.full((SIZE, 2), float(RANK)))
    assert torch.equal(received, torch.arange(float(SIZE))[:, None].expand(SIZE, 2))
    splits = list(range(SIZE))  # the rank r gets r rows from everybody
    uneven = torch.empty(RANK * SIZE)
    dist.all_to_all_single(uneven, torch.full((sum(splits),), float(RANK)), [RANK] * SIZE, splits)
    assert torch.equal(uneven, torch.arange(float(SIZE)).repeat_interleave(RANK))
    pieces = [torch.empty(5) for _ in range(SIZE)]
    dist.all_gather(pieces, everyone[RANK])
    assert all(map(torch.equal, pieces, everyone))
    root = SIZE - 1
    dist.gather(everyone[RANK], pieces if RANK == root else None, dst=root)
    mine = torch.empty(5)
    dist.scatter(mine, everyone if RANK == root else None, src=root)
    assert torch.equal(mine, everyone[RANK])
    mine = everyone[RANK].clone()
    dist.broadcast(mine, root)
    assert torch.equal(mine, everyone[root])
    objects = [None] * SIZE
    dist.all_gather_object(objects, {"rank": RANK})
    assert objects == [{"rank": of} for of in range(SIZE)]
    with pytest.raises(ValueError, match="up to the 4 rows"):
        dist.all_to_all_single(torch.empty(4), torch.empty(4), [1] * SIZE + [9], [1] * SIZE + [9])


def messages_between_two() -> None:
    after, before = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    received = torch.empty(2, 3)
    sent = torch.full((2, 3), float(RANK))
    ops = [dist.P2POp(dist.irecv, received, before), dist.P2POp(dist.isend, sent, after)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert received.unique().tolist() == [before]
    if RANK == 0:
        first, second = torch.empty(1), torch.empty(1)
        dist.recv(second, 1, tag=8)
        dist.recv(first, 1, tag=7)
        assert (first.item(), second.item()) == (7.0, 8.0)
        sources = {dist.recv(torch.empty(1), tag=9) for _ in range(SIZE - 1)}
        assert sources == set(range(1, SIZE))
    else:
        if RANK == 1:
            handles = [dist.isend(torch.tensor([float(t)]), 0, tag=t) for t in (7, 8)]
            for handle in handles:
                handle.wait()
        dist.send(torch.zeros(1), 0, tag=9)


def handles() -> None:
    tensor = torch.ones(1 << 20)
    work = dist.all_reduce(tensor, async_op=True)
    future = work.get_future()
    assert torch.equal(future.wait()[0], torch.full_like(tensor, SIZE))
    assert work.is_completed() and work.is_success() and work.exception() is None
    with dist._coalescing_manager(async_ops=True) as manager:
        pair = [torch.ones(3), torch.ones(4)]
        for each in pair:
            dist.all_reduce(each)
    manager.wait()
    assert all((each == SIZE).all() for each in pair)


def in_parts() -> None:
    """Messages that are too long for MPI's counts, with a small limit."""
    from belief_dist.mpi_backend import group, messages
    from belief_dist.mpi_backend import reductions as sums

    messages.MAX_COUNT = group.MAX_COUNT = sums.MAX_COUNT = 7
    try:
        moves()
        reductions()
    finally:
        messages.MAX_COUNT = group.MAX_COUNT = sums.MAX_COUNT = 1 << 30


def sub_groups() -> None:
    """A group of some ranks, listed backwards."""
    members = list(reversed(range(1, SIZE)))
    group = dist.new_group(members, backend="mpi4py", use_local_synchronization=True)
    if RANK in members:
        tensor = torch.full((3,), float(RANK))
        dist.all_reduce(tensor, group=group)
        assert tensor.tolist() == [float(sum(members))] * 3
        dist.destroy_process_group(group)


def native() -> None:
    """MPI's own sum: of integers, whose order does not matter."""
    param = torch.nn.Parameter(torch.zeros(1000))
    optimizer = ShardedAdaBelief([param], reduction="native", lr=1.0, eps=1e-2)
    param.grad = torch.full((1000,), float(RANK))
    optimizer.step()
    mean = sum(range(SIZE)) / SIZE
    # The norm is the only thing here that tells a sum from a mean.
    assert optimizer.grad_norm.item() == pytest.approx(mean * 1000**0.5, rel=1e-6)


def ddp() -> None:
    torch.manual_seed(RANK)
    model = DistributedDataParallel(torch.nn.Linear(4, 3))
    model(torch.full((2, 4), float(RANK))).sum().backward()
    expected = torch.full((3, 4), 2.0 * sum(range(SIZE)) / SIZE)
    torch.testing.assert_close(model.module.weight.grad, expected)


def zero_redundancy() -> None:
    torch.manual_seed(0)
    alone = nn.Linear(7, 3)
    sharded = DistributedDataParallel(copy.deepcopy(alone))
    params = sharded.parameters()
    equals_alone(
        sharded, ZeroRedundancyOptimizer(params, optimizer_class=AdaBelief, **HYPER), alone
    )


def fsdp2() -> None:
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    sharded: nn.Module = fully_shard(copy.deepcopy(alone))
    equals_alone(sharded, AdaBelief(sharded.parameters(), **HYPER), alone)


def equals_alone(sharded: nn.Module, optimizer: torch.optim.Optimizer, alone: nn.Module) -> None:
    """Train a sharded model, and its copy by the mean of all ranks' losses."""
    whole = AdaBelief(alone.parameters(), **HYPER)
    for step in range(3):
        batches = [torch.full((2, 7), float(of + step)) for of in range(SIZE)]
        sharded(batches[RANK]).sum().backward()
        torch.stack([alone(batch).sum() for batch in batches]).mean().backward()
        for each in (optimizer, whole):
            each.step()
            each.zero_grad()
    for ours, theirs in zip(sharded.parameters(), alone.parameters(), strict=True):
        full = ours.full_tensor() if isinstance(ours, DTensor) else ours
        torch.testing.assert_close(full, theirs)


def own_checkpoint(group: dist.ProcessGroup | None, run: Path) -> None:
    checkpoints.save(run, torch.float32, {"process_group": group})
    checkpoints.load(run, torch.float32, {"process_group": group, "bucket_bytes": 700})


def torch_checkpoint(group: dist.ProcessGroup, run: Path) -> None:
    """DCP, whose messages between ranks travel over the group."""
    saved = {f"of rank {RANK}": torch.full((3,), float(RANK)), "of all": torch.arange(7.0)}
    dcp.save(saved, checkpoint_id=run, process_group=group)
    found = {key: torch.zeros_like(value) for key, value in saved.items()}
    dcp.load(found, checkpoint_id=run, process_group=group)
    assert all(torch.equal(found[key], value) for key, value in saved.items())


def every_check(backend: str, folder: Path, every: int) -> None:
    """Run all checks over a backend, and of the exactness tests every so many-th combination."""
    join(backend, folder, 60)
    group = None if backend == "mpi4py" else dist.new_group(backend="mpi4py")
    cases: list[Callable[[], None]] = [
        partial(case, process_group=group)
        for case in [*main_comparison(), *combinations()][::every]
    ]
    cases += [
        partial(own_checkpoint, group, folder / "own"),
        partial(torch_checkpoint, group, folder / "dcp"),
    ]
    if backend == "mpi4py":
        cases += [reductions, moves, messages_between_two, handles, in_parts, sub_groups]
        cases += [native, ddp, zero_redundancy, fsdp2]
        cases += [partial(continues, "FSDP2", full, folder / "fsdp2") for full in (True, False)]
    for case in cases:
        case()
        dist.barrier()
    dist.destroy_process_group()
    print(f"rank {RANK} has passed {len(cases)} cases", flush=True)


def join(backend: str, folder: Path, seconds: float) -> None:
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=RANK, world_size=SIZE,
        timeout=datetime.timedelta(seconds=seconds),
    )  # fmt: skip


def start_mpi() -> None:
    """Wait for all processes, which a busy machine may bring later than a group would wait."""
    belief_dist.mpi_backend._start_mpi(datetime.timedelta(seconds=60))


def lose_a_rank(name: str, folder: Path) -> None:
    start_mpi()
    join("mpi4py", folder, 3)
    dist.barrier()
    if RANK == SIZE - 1:
        os.kill(os.getpid(), getattr(signal, name))
    begin = time.monotonic()
    with pytest.raises(dist.DistBackendError, match=r"all_reduce (was not complete|failed in MPI)"):
        dist.all_reduce(torch.ones(100_000))
    assert time.monotonic() - begin < 6
    with pytest.raises(dist.DistBackendError, match="cannot be used any more"):
        dist.barrier()
    print(f"rank {RANK} has seen it", flush=True)
    # The first rank to exit ends the job, so the others must have had their say.
    (folder / f"seen.{RANK}").touch()
    deadline = time.monotonic() + 10
    while not all((folder / f"seen.{of}").exists() for of in range(SIZE - 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)  # for mpiexec to pass the lines on


def start_without_a_rank(folder: Path) -> None:
    """The last rank is not in the group, and so does not start MPI."""
    join("gloo", folder, 3)
    members = list(range(SIZE - 1))
    if RANK in members:
        dist.new_group(
            members, datetime.timedelta(seconds=3), "mpi4py", use_local_synchronization=True
        )
    time.sleep(15)


def make_a_group_without_a_rank(folder: Path) -> None:
    """The last rank stops when all have met, and before MPI makes the group."""
    start_mpi()
    from belief_dist.mpi_backend import group

    if RANK == SIZE - 1:
        group._communicator = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
    join("mpi4py", folder, 3)


def huge(folder: Path) -> None:
    """Messages of more than 2 GiB, in one part and in several; takes up to 9 GB on 2 ranks."""
    join("mpi4py", folder, 300)
    floats = torch.full((540_000_000,), float(RANK + 1))  # 2.16 GB
    dist.broadcast(floats, SIZE - 1)
    assert (floats[0], floats[-1], floats.min(), floats.max()) == (SIZE,) * 4
    dist.all_reduce(floats)
    assert (floats[0], floats[-1], floats.min(), floats.max()) == (SIZE**2,) * 4
    del floats
    octets = torch.full((2_200_000_000,), 1 - RANK, dtype=torch.uint8)
    if RANK == 0:
        dist.send(octets, 1)
    elif RANK == 1:
        dist.recv(octets, 0)
    if RANK < 2:
        assert (octets[0], octets[-1], octets.min(), octets.max()) == (1,) * 4
    print(f"rank {RANK} has passed", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # as tests.harness.ranks does, and why
    assert belief_dist.mpi_backend.BACKEND == "mpi4py"
    what, folder, *more = sys.argv[1:]
    others = {
        case.__name__: case for case in (start_without_a_rank, make_a_group_without_a_rank, huge)
    }
    if what in others:
        others[what](Path(folder))
    elif what.startswith("SIG"):
        lose_a_rank(what, Path(folder))
    else:
        every_check(what, Path(folder), int(more[0]))

"""GPUs that read each other's memory, as processes whose kernels are interpreted.

test_symmetric_memory.py runs this in a process; see `tests.harness.host_gpus`.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from belief_dist import ShardedAdaBelief
from belief_dist.sharding import symmetric_memory
from belief_dist.sharding.collectives import CommunicationError, ReduceRequest
from belief_dist.sharding.symmetric_memory import Mapped, SymmetricMemory
from tests.harness.device_path import Watch
from tests.harness.host_gpus import HostMemory, on_gpus
from tests.harness.models import HYPER, SHAPES, make_grad, make_params
from tests.harness.ranks import run_ranks
from tests.harness.reference import backward
from tests.harness.replay import recording
from tests.harness.sharded_cases import equals_reference

# numpy, which the interpreter computes with, warns of what special numbers do.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BF16, U8 = torch.bfloat16, torch.uint8


def build(params: list[nn.Parameter] | None = None, **options: Any) -> ShardedAdaBelief:
    options = {"bucket_bytes": 1500, "shared_memory": "cuda", **options}
    return ShardedAdaBelief(params or make_params(), **options, **HYPER)


def train(optimizer: ShardedAdaBelief, step: int) -> None:
    grads = [make_grad(s, step, dist.get_rank(), i, 0) for i, s in enumerate(SHAPES)]
    backward(optimizer._params, grads)
    optimizer.step()
    optimizer.zero_grad()


# - The bits

FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"unused": True, "max_grad_norm": 0.5, "overlap": False},
    {"dtype": BF16, "master": "remainder", "state_dtype": U8},
    {"stage": 2, "micro_batches": 2, "dtype": BF16, "bucket_bytes": 1},
    {"stage": 2, "reduce_dtype": BF16, "bucket_bytes": 10**9},
    {"offload": "cpu", "dtype": BF16},
)


def reads_peers(**form: Any) -> None:
    """Train as the reference does, and never send a gradient or parameter."""
    options = {"bucket_bytes": 1500, "overlap": True, "steps": 2, **form}
    refuse = AssertionError("something was sent")
    with (
        patch.object(dist, "all_to_all_single", side_effect=refuse),
        patch.object(dist, "isend", side_effect=refuse),
        patch.object(symmetric_memory.AllToAll, "sum_", side_effect=refuse),
        patch.object(symmetric_memory.AllToAll, "start_gather", side_effect=refuse),
    ):
        equals_reference(shared_memory="cuda", **options)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_bits_are_those_of_the_reference(ranks: int, tmp_path: Path) -> None:
    # All forms at 3 ranks; others count differently, which the order and the slots depend on.
    few = FORMS[1] if ranks % 2 else {**FORMS[3], "bucket_bytes": 1500}
    forms = FORMS if ranks == 3 else (few,)
    cases: list[Callable[[], None]] = [partial(reads_peers, **form) for form in forms]
    if ranks == 3:
        cases += [codes_travel, what_is_dropped_is_given_back, launches_and_waits]
        cases += [a_captured_iteration_replays]
        cases += [those_that_cannot_do_without, one_that_does_not_want]
        cases += [an_error_of_one_rank_leaves_it_among_the_others]
        cases += [partial(a_late_rank_is_named, tmp_path)]
    if ranks == 4:
        cases += [rows_of_a_mesh, numbered_micro_batches]
    run_ranks(ranks, tmp_path, *(partial(on_gpus, case) for case in cases))


def same_as_messages(**options: Any) -> None:
    """Train as without shared memory."""
    ours, theirs = build(**options), build(**options, shared_memory=False)
    for step in range(2):
        for optimizer in (ours, theirs):
            train(optimizer, step)
    for mine, other in zip(ours._params, theirs._params, strict=True):
        assert torch.equal(mine, other)
    assert float(ours.grad_norm) == float(theirs.grad_norm)


def codes_travel() -> None:
    same_as_messages(reduce_dtype=torch.int8, max_grad_norm=0.5)
    same_as_messages(reduce_dtype=torch.int8, stage=2)


def rows_of_a_mesh() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    row = build(process_group=mesh).comm._row  # type: ignore[attr-defined]
    assert isinstance(row, SymmetricMemory)
    same_as_messages(process_group=mesh)
    same_as_messages(process_group=mesh, shard_over="mesh", stage=2)
    same_as_messages(process_group=mesh, micro_batches=4)


def numbered_micro_batches() -> None:
    same_as_messages(micro_batches=4)


# - What is asked of the device


def launches_and_waits() -> None:
    """A sum is one launch between two meetings, and so are a gather's copies; no host waits."""
    optimizer = build()
    buckets = len(optimizer.layout.buckets)
    assert buckets > 1
    grads = [make_grad(s, 0, dist.get_rank(), i, 0) for i, s in enumerate(SHAPES)]
    watch = Watch()
    with watch:
        for step in range(4):
            watch.next_step()
            watch.refuses = step > 1  # tables are there by then
            backward(optimizer._params, grads)
            optimizer.step()
            optimizer.zero_grad()
            assert watch.launched["meet"] == 4 * buckets + 2
            assert watch.launched["reduce"] == buckets


def a_captured_iteration_replays() -> None:
    """A graph of all ranks, which no collective of a backend is part of, has the bits of steps."""
    exact = {"betas": (0.5, 0.75), "lr": 0.0625}  # whose powers anybody may raise
    options = {"bucket_bytes": 1500, "shared_memory": "cuda", "max_grad_norm": 0.5}
    captured, plain = (
        ShardedAdaBelief(make_params(), **options, **{**HYPER, **exact}) for _ in range(2)
    )
    places = [torch.zeros_like(param) for param in captured._params]

    def iterate(optimizer: ShardedAdaBelief) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(optimizer._params, [place * 1 for place in places])
        optimizer.step()
        optimizer.wait_pending()  # a graph must not end before what it has begun

    def fill(step: int) -> None:
        for index, place in enumerate(places):
            place.copy_(make_grad(place.shape, step, dist.get_rank(), index, 0))

    for step in range(5):
        fill(step)
        iterate(plain)
    fill(0)
    iterate(captured)
    fill(1)
    with recording() as graph:
        iterate(captured)
    for step in (2, 3, 4):
        fill(step)
        graph.replay()
    captured.wait_pending()  # the host learns what has run
    for ours, theirs in zip(captured._params, plain._params, strict=True):
        assert torch.equal(ours, theirs)
        for name, state in plain.state[theirs].items():
            mine = torch.as_tensor(captured.state[ours][name])
            assert torch.equal(mine, torch.as_tensor(state)), (name, mine, state)
    assert torch.equal(captured.grad_norm, plain.grad_norm)


def what_is_dropped_is_given_back() -> None:
    params = make_params()
    optimizer = build(params[:-1])
    comm = optimizer.comm
    assert isinstance(comm, SymmetricMemory)
    assert len(comm._buffers) == 2 * len(optimizer.layout.buckets)
    optimizer.add_param_group({"params": params[-1:]})
    assert optimizer.comm is comm
    assert len(comm._buffers) == 2 * len(optimizer.layout.buckets)
    train(optimizer, 0)


# - Who does without, and what goes wrong


class NoMemory(HostMemory):
    """Rank 1 has none."""

    def empty(self, nbytes: int, device: torch.device) -> Tensor:
        if dist.get_rank() == 1:
            raise RuntimeError("no such memory")
        return super().empty(nbytes, device)


class WrongMemory(HostMemory):
    """Rank 2 sees its own buffers in the place of its neighbour's."""

    def share(self, own: Tensor) -> Mapped:
        found = super().share(own)
        is_first = own.numel() == 3 * 4 * symmetric_memory._CHECKED
        if dist.get_rank() == 2 and is_first:
            found.all[1] = found.own
        return found


def those_that_cannot_do_without() -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("belief_dist").addHandler(handler)
    for broken in (NoMemory, WrongMemory):
        with patch.object(symmetric_memory, "TorchMemory", broken):
            assert not isinstance(build().comm, SymmetricMemory)
    said = [each.getMessage() for each in records if "GPUs" in each.getMessage()]
    logging.getLogger("belief_dist").removeHandler(handler)
    why = [
        "rank 1: RuntimeError: no such memory",
        "rank 2: RuntimeError: a first sum or gather has other bits",
    ]
    assert said == (
        [f"GPUs send messages, and read no memory of each other: {each}" for each in why]
        if dist.get_rank() == 0
        else []
    )


def one_that_does_not_want() -> None:
    with pytest.raises(ValueError, match="shared_memory"):
        build(shared_memory="cuda" if dist.get_rank() else True)


def an_error_of_one_rank_leaves_it_among_the_others() -> None:
    """It has met as often as the others: what it sums next is what they sum next."""
    comm = build().comm
    flat = comm.buffer(3 * 64, torch.float32, torch.device("cpu"))
    shard = torch.zeros(64)
    for number in range(3):
        flat.fill_(10**number * (comm.rank + 1))
        request = ReduceRequest(flat, shard)
        if number == 1 and comm.rank == 1:
            with (
                patch.object(ReduceRequest, "add_", side_effect=MemoryError),
                pytest.raises(MemoryError),
            ):
                comm.start_reduce(request)
        else:
            comm.start_reduce(request).wait()
            assert (shard == 10**number * 6).all()


def a_late_rank_is_named(folder: Path) -> None:
    """Rank 1 begins to train when the others have given it up, which then have left, too."""
    optimizer = build(timeout=timedelta(seconds=3))
    while dist.get_rank() == 1 and len(list(folder.glob("*.gave-up"))) < 2:
        time.sleep(0.01)
    with pytest.raises(CommunicationError) as caught:
        train(optimizer, 0)
    (folder / f"{dist.get_rank()}.gave-up").touch()
    late = "rank 1" if dist.get_rank() != 1 else "ranks 0, 2"
    rank = f"rank {dist.get_rank()} of 3, summing the gradients of bucket"
    said = str(caught.value)
    assert re.match(rf"{rank} \d: .*has not come in time.* Late: {late}\.$", said), said

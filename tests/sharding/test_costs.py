"""What a sharded step costs: copies, memory, traffic and messages, as docs/memory.md has them."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from belief_dist import ShardedAdaBelief, kernels
from belief_dist.kernels import eager
from belief_dist.kernels.build import Unavailable
from belief_dist.norm import NUM_WORDS
from belief_dist.options import DEFAULTS
from belief_dist.telemetry import StepMonitor
from tests.harness.models import HYPER, SHAPES, make_grad, make_params
from tests.harness.ranks import run_ranks
from tests.harness.reference import Reference, backward, compare

# - Zero copy


def storage_is_stable() -> None:
    """Parameters and gradients stay views; later steps allocate nothing that grows with them."""
    params = [torch.nn.Parameter(torch.randn(400, 250)) for _ in range(4)]
    optimizer = ShardedAdaBelief(params, bucket_bytes=600_000, **HYPER)
    homes = [p.data_ptr() for p in params]
    grads = None
    for step in range(4):
        sum((p * p).sum() for p in params).backward()
        optimizer.step()
        now = [p.grad.data_ptr() for p in params]
        assert [p.data_ptr() for p in params] == homes, step
        assert grads in (None, now), step
        grads = now
        for bucket in optimizer._engine.buckets:
            flat = bucket
            for storage, members in (
                (flat.flat_param, flat.params),
                (flat.flat_grad, [p.grad for p in flat.params]),
            ):
                start = storage.data_ptr()
                for member in members:
                    assert start <= member.data_ptr() < start + storage.nbytes
        optimizer.zero_grad()

    # Backward itself must allocate gradients; the step may not. 400 kB would be one parameter.
    sum((p * p).sum() for p in params).backward()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        optimizer.step()
        optimizer._engine.read_guard.wait_all()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert allocated < 20_000, f"{allocated} bytes allocated by a step after warm-up"


@pytest.mark.parametrize("world_size", [1, 3])
def test_step_copies_and_allocates_nothing(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, tmp_path, storage_is_stable)


def check_storages(optimizer: ShardedAdaBelief) -> None:
    """What the optimizer says that it holds is what is allocated."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for bucket in optimizer._engine.buckets
        for tensor in (*vars(bucket).values(), *bucket.states.values())
        if isinstance(tensor, torch.Tensor)
    }
    assert sum(storages.values()) == sum(optimizer.bytes_per_rank().values())


def smaller_memory_is_as_documented() -> None:
    """The bytes of docs/memory.md per parameter of the smaller states and masters."""
    world_size, count = dist.get_world_size(), 3 * 128 * 1000
    for master, state_dtype, per_param in (
        ("remainder", torch.float32, 2 + 8),
        ("fp32", torch.bfloat16, 4 + 4),
        ("fp32", torch.uint8, 4 + 2 + 2 / 256),
        ("remainder", torch.uint8, 2 + 2 + 2 / 256),
        ("remainder8", torch.uint8, 1 + 2 + 2 / 256),
    ):
        params = [nn.Parameter(torch.zeros(128, 1000, dtype=torch.bfloat16)) for _ in range(3)]
        optimizer = ShardedAdaBelief(
            params, bucket_bytes=300_000, master=master, state_dtype=state_dtype
        )
        held = optimizer.bytes_per_rank()
        states = held["masters"] + held["exp_avg"] + held["exp_avg_sq"]
        # A bucket is padded until every rank's piece is a multiple of 256 elements.
        padding = len(optimizer.layout.buckets) * 256 * per_param
        assert 0 <= states - per_param * count / world_size <= padding, (master, state_dtype)
        check_storages(optimizer)


def memory_is_as_documented() -> None:
    """The bytes of docs/memory.md, counted on the storages that the optimizer really holds."""
    world_size, count = dist.get_world_size(), 3 * 128 * 1000
    per_param = {
        torch.float32: {
            "parameters": 4,
            "gradients": 4 + (4 / world_size if world_size > 1 else 0),
            "masters": 0,
            "states": 8 / world_size,
        },
        torch.bfloat16: {
            "parameters": 2,
            "gradients": 2 + (4 / world_size if world_size > 1 else 0),
            "masters": 4 / world_size,
            "states": 8 / world_size,
        },
    }
    for dtype, expected in per_param.items():
        params = [torch.nn.Parameter(torch.zeros(128, 1000, dtype=dtype)) for _ in range(3)]
        optimizer = ShardedAdaBelief(params, bucket_bytes=600_000)
        held = optimizer.bytes_per_rank()
        held["states"] = held.pop("exp_avg") + held.pop("exp_avg_sq")
        buckets = len(optimizer.layout.buckets)
        for kind, bytes_per_param in expected.items():
            # A bucket is padded until every rank's piece is a multiple of 128 bytes.
            padding = buckets * world_size * 128 * 2
            assert 0 <= held[kind] - bytes_per_param * count <= padding, (dtype, kind)
        check_storages(optimizer)

        host = ShardedAdaBelief(params, bucket_bytes=600_000, offload="cpu")
        held = host.bytes_per_rank()
        padding = buckets * world_size * 128 * 2
        # Masters, and what goes back to 16-bit parameters; gradients of two buckets' shards.
        masters = (4 if dtype == torch.float32 else 6) / world_size * count
        assert 0 <= held["masters"] - masters <= padding
        shard = max(bucket.shard_numel for bucket in host.layout.buckets)
        # A single rank's need not be widened to be summed.
        width = dtype.itemsize if world_size == 1 else 4
        assert held["gradients on the host"] == 2 * width * shard


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_memory_is_as_documented(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, tmp_path, memory_is_as_documented, smaller_memory_is_as_documented)


def traffic_is_as_documented() -> None:
    """What docs/memory.md says travels, counted where it leaves; one message for all buckets."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sent, messages = 0, 0
    isend, all_reduce = dist.isend, dist.all_reduce

    def counting_isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        sent += tensor.nbytes
        return isend(tensor, *args, **kwargs)

    def counting_all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal messages
        messages += 1
        # Two words each for step and replica, four for what is wrong on a rank, one for every
        # parameter, and first for every bucket.
        words = NUM_WORDS + 8 + len(SHAPES)
        assert tensor.numel() == words + (0 if messages > 1 else len(optimizer.layout.buckets))
        return all_reduce(tensor, *args, **kwargs)

    for dtype, wire, stage, micro_batches, numbered in (
        (torch.float32, None, 1, 1, None),
        (torch.float32, None, 1, 3, None),  # no_sync
        (torch.float32, torch.bfloat16, 1, 1, None),
        (torch.bfloat16, None, 1, 1, None),
        (torch.float32, None, 2, 1, None),
        (torch.float32, torch.bfloat16, 2, 3, None),
        # A round for each pass of the first rank; the last one has none in the second.
        (torch.bfloat16, None, 1, 2 - (rank == world_size - 1), 2 * world_size - 1),
    ):
        params = make_params(dtype)
        optimizer = ShardedAdaBelief(
            params,
            bucket_bytes=1500,
            stage=stage,
            reduce_dtype=wire,
            shared_memory=False,
            micro_batches=numbered,
            **HYPER,
        )
        monitor = StepMonitor(optimizer, [], every=1)
        messages = 0
        for step in (1, 2):
            sent = 0
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, "isend", counting_isend)
                patch.setattr(dist, "all_reduce", counting_all_reduce)
                for micro in range(micro_batches):
                    grads = [
                        make_grad(s, 1, rank, i, micro).to(dtype) for i, s in enumerate(SHAPES)
                    ]
                    with optimizer.no_sync() if micro + 1 < micro_batches else nullcontext():
                        backward(params, grads)
                optimizer.step()
                record = monitor.log(step) or {}
            optimizer.zero_grad()
            elements = sum(bucket.numel for bucket in optimizer.layout.buckets)
            reductions = 2 if numbered else micro_batches if stage == 2 else 1
            per_element = reductions * (wire or dtype).itemsize + dtype.itemsize
            assert sent == elements * per_element * (world_size - 1) // world_size, (stage, wire)
            assert messages == step
            if rank == 0:
                told = {kind: record[f"bytes_sent/{kind}"] for kind in ("gradients", "parameters")}
                assert sum(told.values()) == sent, told
        # Who counts reductions begins anew, perhaps beyond where the last one was.
        late = torch.nn.Parameter(torch.ones(8, dtype=dtype))
        optimizer.add_param_group({"params": [late]})
        for _ in range(3):
            for micro in range(micro_batches):
                with optimizer.no_sync() if micro + 1 < micro_batches else nullcontext():
                    backward([late], [torch.ones_like(late)])
            optimizer.step()
            optimizer.zero_grad()
        assert "bytes_sent/gradients" not in (monitor.log(3) or {})


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def counted(calls: list[str], name: str, call: Any, *args: Any, **kwargs: Any) -> Any:
    calls.append(name)
    return call(*args, **kwargs)


def one_message_and_no_wait() -> None:
    """B reductions, 1 message, B gathers, and the host reads no value, for any number of params."""
    for stage, count in itertools.product((1, 2), (3, 40)):
        params = [nn.Parameter(torch.randn(100)) for _ in range(count)]
        optimizer = ShardedAdaBelief(
            params, bucket_bytes=1000, stage=stage, max_grad_norm=1.0, **HYPER
        )
        optimizer._engine.consensus.defers = True  # as on a CUDA device
        buckets = len(optimizer.layout.buckets)
        assert buckets == -(-count // 2)
        links, calls = optimizer.comm, list[str]()
        with pytest.MonkeyPatch.context() as patch:
            for name in ("start_reduce", "sum_", "start_gather", "broadcast_", "exchange"):
                original = getattr(links, name)

                patch.setattr(links, name, partial(counted, calls, name, original))
            patch.setattr(kernels, "_cpp", lambda: Unavailable("not on a GPU"))
            patch.setattr(eager, "_on_cpu", lambda tensor: False)
            for step in range(3):
                calls.clear()
                with Reads() as reads:
                    torch.stack([param.square().sum() for param in params]).sum().backward()
                    optimizer.step()
                optimizer.zero_grad()
                expected = ["start_reduce"] * buckets + ["sum_"] + ["start_gather"] * buckets
                assert calls == expected, (stage, count, step)
                # The first step learns the order of buckets; each later one reads nothing but the
                # verdict of the step before.
                assert step == 0 or reads.count == 1, (stage, count, reads.count)


def test_one_message_and_no_wait(tmp_path: Path) -> None:
    run_ranks(3, tmp_path, one_message_and_no_wait)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_traffic_is_as_documented(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, tmp_path, traffic_is_as_documented)


def many_groups_are_one_update(stage: Literal[1, 2], **options: Any) -> None:
    """Groups that differ in scalars alone: as many bits as groups, and one call of the kernel."""
    params = make_params()
    own = [{"lr": 0.05 * 0.9**i, "betas": (0.8, 0.9 + i / 100)} for i in range(len(params))]
    groups = [{"params": [param], **more} for param, more in zip(params, own, strict=True)]
    # One that is not clipped takes another factor, and so another call.
    groups[3]["clip"] = False
    each = [{**DEFAULTS, **HYPER, **more} for more in own]
    each[3]["clip"] = False
    reference = Reference(make_params(), each, **options)
    optimizer = ShardedAdaBelief(
        groups,
        stage=stage,
        max_grad_norm=0.5,
        state_dtype=options.get("state_dtype", torch.float32),
        **HYPER,
    )
    calls: list[str] = []
    update = kernels.update_
    kernels.update_ = partial(counted, calls, "update", update)
    try:
        for step in range(4):
            world = range(dist.get_world_size())
            grads: list[list[torch.Tensor | None]] = [
                [make_grad(shape, step, rank, i) for i, shape in enumerate(SHAPES)]
                for rank in world
            ]
            if step == 2:  # one falls behind: other scalars of the same groups
                for of_rank in grads:
                    of_rank[0] = None
            optimizer.param_groups[7]["lr"] = each[7]["lr"] = 0.01 * step
            backward(params, grads[dist.get_rank()])
            optimizer.step()
            reference.step(grads, 0.5, dist.get_world_size())
            compare(optimizer, reference, f"{stage}, {options}, step {step}")
            optimizer.zero_grad()
            # The unclipped one has a bucket of its own, which is updated apart in its turn.
            assert len(calls) <= 2, (step, calls)  # a rank may have nothing of it
            calls.clear()
    finally:
        kernels.update_ = update


def test_many_groups_are_one_update(tmp_path: Path) -> None:
    more: list[dict[str, Any]] = [{}, {"state_dtype": torch.bfloat16}, {"state_dtype": torch.uint8}]
    cases = [partial(many_groups_are_one_update, s, **each) for s in (1, 2) for each in more]
    run_ranks(3, tmp_path, *cases)

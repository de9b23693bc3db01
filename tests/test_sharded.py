"""ShardedAdaBelief on real gloo processes: equal, bit for bit, to one process.

The reference sums the ranks' gradients in rank order and applies the rule to whole parameters.
Two ranks would prove nothing about order (a + b commutes): every case runs on 1 to 5.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from belief_dist import ShardedAdaBelief, kernels
from belief_dist.kernels import eager
from belief_dist.kernels.build import Unavailable
from belief_dist.norm import NUM_WORDS
from belief_dist.options import DEFAULTS
from models import HYPER, SHAPES, make_grad, make_params, rank_order_sum
from ranks import run_ranks
from reference import Reference, backward, compare
from threads import run_threads


def equals_reference(
    bucket_bytes: int,
    overlap: bool,
    *,
    dtype: torch.dtype = torch.float32,
    max_grad_norm: float | None = None,
    micro_batches: int = 1,
    steps: int = 4,
    options: dict[str, Any] | None = None,
    unused: bool = False,
    stage: Literal[1, 2] = 1,
    reduce_dtype: torch.dtype | None = None,
    offload: Literal["cpu"] | None = None,
    master: Literal["fp32", "remainder"] = "fp32",
    state_dtype: torch.dtype = torch.float32,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Train a few steps on all ranks and compare everything after each."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    hyper = {**HYPER, **(options or {})}
    params = make_params(dtype, seed=rank)  # the constructor must spread rank 0's
    first, second = params[:4], params[4:]
    groups = [{"params": first}, {"params": second, "lr": 0.02, "weight_decay": 0.0}]
    own = [{**DEFAULTS, **hyper}] * len(first)
    own += [{**DEFAULTS, **hyper, "lr": 0.02, "weight_decay": 0.0}] * len(second)
    small = {"state_dtype": state_dtype, "seed": 3}
    reference = Reference(
        make_params(dtype, seed=0), own, remainders=master == "remainder", **small
    )
    optimizer = ShardedAdaBelief(
        groups,
        bucket_bytes=bucket_bytes,
        overlap=overlap,
        max_grad_norm=max_grad_norm,
        stage=stage,
        reduce_dtype=reduce_dtype,
        offload=offload,
        master=master,
        process_group=process_group,
        **small,
        **hyper,
    )
    wire = reduce_dtype or dtype

    def gradient(step: int, of: int, index: int, micro: int) -> torch.Tensor | None:
        # Parameter 2 is used by the last rank only, parameter 4 by nobody in odd steps.
        if unused and ((index == 2 and of != world_size - 1) or (index == 4 and step % 2)):
            return None
        return make_grad(SHAPES[index], step, of, index, micro).to(dtype)

    for step in range(1, steps + 1):
        # What is added, in this order: at stage 1 one sum of micro-batches for each rank, at stage
        # 2 every micro-batch of every rank.
        everyone: list[list[torch.Tensor | None]] = []
        if stage == 1:
            for of in range(world_size):
                summed: list[torch.Tensor | None] = []
                for index in range(len(params)):
                    parts = [gradient(step, of, index, micro) for micro in range(micro_batches)]
                    kept = [part for part in parts if part is not None]
                    summed.append(sum(kept[1:], start=kept[0].clone()) if kept else None)
                everyone.append(summed)
        else:
            for micro, of in itertools.product(range(micro_batches), range(world_size)):
                everyone.append([gradient(step, of, i, micro) for i in range(len(params))])
        everyone = [[None if g is None else g.to(wire) for g in addend] for addend in everyone]
        for micro in range(micro_batches):
            mine = [gradient(step, rank, index, micro) for index in range(len(params))]
            if stage == 1 and micro + 1 < micro_batches:
                with optimizer.no_sync():
                    backward(params, mine)
            else:
                backward(params, mine)
        optimizer.step()
        reference.step(everyone, max_grad_norm, world_size)
        context = f"W={world_size}, bucket {bucket_bytes}, overlap {overlap}, step {step}"
        assert optimizer.grad_norm.item() == reference.norm.item(), context
        exact = math.sqrt(
            math.fsum(
                math.fsum((rank_order_sum(present).double() ** 2).flatten().tolist())
                for i in range(len(params))
                if (present := [g[i] for g in everyone if g[i] is not None])
            )
        )
        # float64 against exact arithmetic; a forgotten division by W would be far off.
        assert math.isclose(reference.norm.item() * world_size, exact, rel_tol=1e-12), context
        compare(optimizer, reference, context)
        optimizer.zero_grad()


def main_comparison() -> list[partial[None]]:
    """Return the cases of all features, one by one."""
    cases = [
        partial(equals_reference, bucket_bytes, overlap)
        for bucket_bytes in (1, 1500, 10**9)
        for overlap in (True, False)
    ]
    cases += [
        partial(equals_reference, 1500, overlap, **more)
        for overlap in (True, False)
        for more in (
            {"dtype": torch.bfloat16},
            {"dtype": torch.float64},
            {"max_grad_norm": 1.0},
            {"max_grad_norm": 1.0, "dtype": torch.bfloat16},
            {"micro_batches": 3},
            {"unused": True},
            {"unused": True, "micro_batches": 2, "max_grad_norm": 0.5},
            {"options": {"amsgrad": True}},
            {"options": {"rectify": True}, "steps": 8},
            {"options": {"weight_decouple": False}},
            {"options": {"maximize": True}},
            {"reduce_dtype": torch.bfloat16},
            {"reduce_dtype": torch.float32, "dtype": torch.bfloat16, "micro_batches": 2},
        )
    ]
    cases += [
        partial(equals_reference, 1500, True, stage=2, **more)
        for more in (
            {"dtype": torch.bfloat16, "micro_batches": 3},
            {"dtype": torch.float64},
            {"unused": True, "micro_batches": 2, "max_grad_norm": 0.5},
            {"reduce_dtype": torch.bfloat16, "micro_batches": 2},
        )
    ]
    cases += [
        partial(equals_reference, bucket_bytes, True, offload="cpu", **more)
        for bucket_bytes in (1, 1500)
        for more in (
            {"unused": True, "options": {"amsgrad": True}},
            {"dtype": torch.bfloat16, "unused": True, "max_grad_norm": 1.0},
            {"dtype": torch.float64, "stage": 2},
            {"dtype": torch.bfloat16, "stage": 2, "micro_batches": 2},
        )
    ]
    cases += [
        partial(equals_reference, *schedule, stage=2, micro_batches=3, max_grad_norm=1.0)
        for schedule in ((1, True), (1500, True), (1500, False), (10**9, True))
    ]
    return cases


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_equals_one_process_bit_for_bit(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, tmp_path, *main_comparison())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_smaller_states_depend_on_no_sharding(world_size: int, tmp_path: Path) -> None:
    """Noise belongs to parameter, step and element; blocks of 8-bit states to their parameter."""
    choices = itertools.product(
        (1, 1500, 10**9),
        (
            {"state_dtype": torch.bfloat16},
            {"state_dtype": torch.uint8},
            {"state_dtype": torch.uint8, "unused": True, "options": {"amsgrad": True}},
            {"state_dtype": torch.uint8, "reduce_dtype": torch.bfloat16, "stage": 2},
            {"dtype": torch.bfloat16, "master": "remainder", "max_grad_norm": 1.0},
            {"dtype": torch.bfloat16, "state_dtype": torch.uint8, "micro_batches": 2},
            {"dtype": torch.bfloat16, "master": "remainder", "state_dtype": torch.bfloat16},
            {"dtype": torch.bfloat16, "master": "remainder", "state_dtype": torch.uint8},
            {
                "dtype": torch.bfloat16,
                "master": "remainder",
                "state_dtype": torch.uint8,
                "offload": "cpu",
                "unused": True,
            },
        ),
    )
    run_ranks(
        world_size,
        tmp_path,
        *(partial(equals_reference, bytes_, True, **more) for bytes_, more in choices),
    )


def combinations() -> list[partial[None]]:
    """Return a case for each choice of schedule, stage, wire dtype, clipping and accumulation."""
    choices = itertools.product(
        (1, 1500, 10**9), (True, False), (1, 2), (None, torch.bfloat16), (None, 1.0), (1, 3)
    )
    return [
        partial(
            equals_reference,
            bucket_bytes,
            overlap,
            stage=stage,
            reduce_dtype=wire,
            max_grad_norm=clip,
            micro_batches=micro_batches,
            steps=2,
        )
        for bucket_bytes, overlap, stage, wire, clip, micro_batches in choices
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_all_combinations(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, tmp_path, *combinations())


@pytest.mark.parametrize("world_size, every", [(2, 5), (3, 5), (4, 7), (5, 7), (8, 31)])
def test_other_backends(world_size: int, every: int) -> None:
    """The way of backends without messages between two ranks; a sample: threads take turns."""
    run_threads(world_size, *combinations()[::every])


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
    """README's bytes per parameter of the smaller states and masters."""
    world_size, count = dist.get_world_size(), 3 * 128 * 1000
    for master, state_dtype, per_param in (
        ("remainder", torch.float32, 2 + 8),
        ("fp32", torch.bfloat16, 4 + 4),
        ("fp32", torch.uint8, 4 + 2 + 2 / 256),
        ("remainder", torch.uint8, 2 + 2 + 2 / 256),
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
    """README's bytes per parameter, counted on the storages that the optimizer really holds."""
    world_size, count = dist.get_world_size(), 3 * 128 * 1000
    per_param = {
        torch.float32: {"parameters": 4, "gradients": 4, "masters": 0, "states": 8 / world_size},
        torch.bfloat16: {
            "parameters": 2,
            "gradients": 2 + 4 / world_size,
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
        assert held["gradients on the host"] == 2 * 4 * shard


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_memory_is_as_documented(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, tmp_path, memory_is_as_documented, smaller_memory_is_as_documented)


def traffic_is_as_documented() -> None:
    """README's bytes, counted where they leave; and one small message, however many buckets."""
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
        # Two words each for step and replica, one for every parameter, and first for every bucket.
        words = NUM_WORDS + 4 + len(SHAPES)
        assert tensor.numel() == words + (0 if messages > 1 else len(optimizer.layout.buckets))
        return all_reduce(tensor, *args, **kwargs)

    for dtype, wire, stage, micro_batches in (
        (torch.float32, None, 1, 1),
        (torch.float32, None, 1, 3),  # no_sync
        (torch.float32, torch.bfloat16, 1, 1),
        (torch.bfloat16, None, 1, 1),
        (torch.float32, None, 2, 1),
        (torch.float32, torch.bfloat16, 2, 3),
    ):
        params = make_params(dtype)
        optimizer = ShardedAdaBelief(
            params, bucket_bytes=1500, stage=stage, reduce_dtype=wire, **HYPER
        )
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
            optimizer.zero_grad()
            elements = sum(bucket.numel for bucket in optimizer.layout.buckets)
            reductions = micro_batches if stage == 2 else 1
            per_element = reductions * (wire or dtype).itemsize + dtype.itemsize
            assert sent == elements * per_element * (world_size - 1) // world_size, (stage, wire)
            assert messages == step


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


# - ZeRO-2


def gradients_are_sharded() -> None:
    """README's bytes at stage 2, during backward too: two recycled buckets, no full gradient."""
    world_size, count = dist.get_world_size(), 12 * 128 * 1000
    for dtype, wire in (
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float32, torch.bfloat16),
    ):
        params = [torch.nn.Parameter(torch.ones(128, 1000, dtype=dtype)) for _ in range(12)]
        optimizer = ShardedAdaBelief(params, bucket_bytes=600_000, stage=2, reduce_dtype=wire)
        for _ in range(2):
            for _ in range(2):
                # One after the other, as layers are: the last parameter's gradient comes first.
                value = torch.ones((), dtype=dtype)
                for param in params:
                    value = value * param.mean()
                value.backward()
                assert all(param.grad is None for param in params)
            optimizer.step()
        buckets = optimizer.layout.buckets
        assert len(buckets) >= 6
        largest = max(bucket.numel * bucket.itemsize for bucket in buckets)
        held = optimizer.bytes_per_rank()["gradients"]
        padding = len(buckets) * world_size * 128 * 2
        assert 0 <= held - 4 * count / world_size - 2 * largest <= padding, (dtype, wire)


def odd_users_of_stage_2() -> None:
    """Gradients by hand, no gradient at all, no_sync, zero_grad: each as torch's users expect."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    params, other = make_params(), make_params()
    sharded = ShardedAdaBelief(params, bucket_bytes=1500, stage=2, **HYPER)
    full = ShardedAdaBelief(other, bucket_bytes=1500, **HYPER)
    grads = [make_grad(s, 1, rank, i) for i, s in enumerate(SHAPES)]

    backward(params, [g * 100 for g in grads])
    sharded.zero_grad()  # forgets what is reduced already
    with sharded.no_sync():
        backward(params, grads)
    backward(other, grads)
    sharded.step()
    full.step()
    # By hand, on some ranks only, and on one rank not at all.
    for run, members in ((sharded, params), (full, other)):
        run.zero_grad()
        if rank != world_size - 1 or world_size == 1:
            members[0].grad = grads[0].clone()
        run.step()
        run.zero_grad()
        run.step()  # nobody has a gradient
    for index, (a, b) in enumerate(zip(params, other, strict=True)):
        assert torch.equal(a, b), index
        assert sharded.state[a]["step"] == full.state[b]["step"] == (2 if index == 0 else 1)


def nested_backward() -> None:
    """Re-entrant checkpoints give a shared layer one gradient for each of its uses."""
    rank = dist.get_rank()
    for stage in (1, 2):
        results = []
        for reentrant in (True, None):
            torch.manual_seed(11)
            layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(4))
            optimizer = ShardedAdaBelief(layers.parameters(), bucket_bytes=1, stage=stage, **HYPER)
            for step in range(3):
                torch.manual_seed(100 * step + rank)
                x = torch.randn(5, 6, requires_grad=True)
                for turn in range(3):
                    for layer in layers[1:]:
                        block = torch.nn.Sequential(layer, torch.nn.Tanh())
                        x = (
                            block(x)
                            if reentrant is None
                            else checkpoint(block, x, use_reentrant=True)
                        )
                    if turn == 0:
                        x = layers[0](x)
                x.square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            results.append([p.detach().clone() for p in layers.parameters()])
        for a, b in zip(*results, strict=True):
            # Three gradients of a shared layer are added in another order.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 3])
def test_stage_2(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, tmp_path, gradients_are_sharded, odd_users_of_stage_2, nested_backward)


# - Saving and loading of the own shard


def resumes_exactly() -> None:
    """A run that is saved, rebuilt and loaded goes on with the bits of one that never stopped."""
    rank = dist.get_rank()
    small: dict[str, Any] = {"master": "remainder", "state_dtype": "uint8"}
    for dtype, options in (
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, small),
        (torch.bfloat16, {**small, "offload": "cpu"}),
    ):
        straight = make_params(dtype)
        optimizer = ShardedAdaBelief(straight, bucket_bytes=1500, seed=5, **options, **HYPER)
        for step in (1, 2):
            backward(
                straight, [make_grad(s, step, rank, i).to(dtype) for i, s in enumerate(SHAPES)]
            )
            optimizer.step()
            optimizer.zero_grad()
        saved = copy.deepcopy(optimizer.state_dict())
        weights = [p.detach().clone() for p in straight]

        resumed = make_params(dtype, seed=7)
        other = {**HYPER, "lr": 1.0}
        second = ShardedAdaBelief(resumed, bucket_bytes=1500, **options, **other)
        with torch.no_grad():
            for param, weight in zip(resumed, weights, strict=True):
                param.copy_(weight)
        second.load_state_dict(saved)
        assert second.param_groups[0]["lr"] == HYPER["lr"]
        for step in (3, 4):
            for run, params in ((optimizer, straight), (second, resumed)):
                grads = [make_grad(s, step, rank, i).to(dtype) for i, s in enumerate(SHAPES)]
                backward(params, grads)
                run.step()
                run.zero_grad()
        for a, b in zip(straight, resumed, strict=True):
            assert torch.equal(a, b)
            for key, value in optimizer.state[a].items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, second.state[b][key]), key
                else:
                    assert value == second.state[b][key] == 4, key


def loaded_weights_reach_the_masters() -> None:
    """Weights that are set after construction are not overwritten by stale masters."""
    for dtype, offload in (
        (torch.bfloat16, None),
        (torch.bfloat16, "cpu"),
        (torch.float32, "cpu"),
    ):
        params = make_params(dtype)
        optimizer = ShardedAdaBelief(
            params, bucket_bytes=1500, offload=offload, **{**HYPER, "lr": 0.0}
        )
        new = make_params(dtype, seed=3)
        with torch.no_grad():
            for param, value in zip(params, new, strict=True):
                param.copy_(value)
        backward(params, [torch.ones(s, dtype=dtype) for s in SHAPES])
        optimizer.step()
        for param, value in zip(params, new, strict=True):
            assert torch.equal(param, value), (dtype, offload)


def skips_together() -> None:
    """A NaN on one rank skips the step on all, without a trace but the count."""
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=1500, **HYPER)
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    good = [make_grad(s, 1, rank, i) for i, s in enumerate(SHAPES)]
    backward(params, good)
    optimizer.step()
    optimizer.zero_grad()
    before = [p.detach().clone() for p in params]
    states = copy.deepcopy(optimizer.state_dict()["state"])
    bad = [g.clone() for g in good]
    if rank == last:
        bad[0][3, 1] = float("nan")
    backward(params, bad)
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.skipped_steps == 1
    for i, (param, value) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(param, value)
        for key, state in optimizer.state[param].items():
            if isinstance(state, torch.Tensor):
                assert torch.equal(state, states[i][key])
            else:
                assert state == 1
    backward(params, good)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2
    assert not torch.equal(params[0], before[0])


def grad_scaler_works() -> None:
    """torch.amp.GradScaler: scaling by powers of two changes no bit; ranks agree on every skip."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    for dtype, stage in itertools.product((torch.float16, torch.float32), (1, 2)):
        plain, scaled = make_params(dtype), make_params(dtype)
        runs = [
            ShardedAdaBelief(params, bucket_bytes=1500, stage=stage, max_grad_norm=1.0, **HYPER)
            for params in (plain, scaled)
        ]
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
        scales = []
        for step in range(5):
            # Sixteenths up to 4: exact in float16, scaled or not.
            generator = torch.Generator().manual_seed(10 * step + rank)
            grads = [torch.randint(-64, 65, s, generator=generator).to(dtype) / 16 for s in SHAPES]
            bad = step == 2
            if bad and rank == last:
                grads[0][3, 1] = float("inf")
            for run in runs:
                run.zero_grad()
            if not bad:
                backward(plain, grads)
                runs[0].step()
            terms = [(p * g).sum() for p, g in zip(scaled, grads, strict=True)]
            scaler.scale(torch.stack(terms).float().sum()).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of torch, about its own future
                scaler.step(runs[1])
            scaler.update()
            scales.append(scaler.get_scale())
            assert bad or runs[0].grad_norm.item() == runs[1].grad_norm.item()
        # Doubled after two good steps, halved by the bad one, doubled after two good ones.
        assert scales == [16.0, 32.0, 16.0, 16.0, 32.0], (rank, scales)
        assert runs[1].skipped_steps == 1
        for a, b in zip(plain, scaled, strict=True):
            assert torch.equal(a, b)
            for key, value in runs[0].state[a].items():
                other = runs[1].state[b][key]
                assert value == other if key == "step" else torch.equal(value, other), key

    backward(scaled, grads)
    scaler.unscale_(runs[1])
    with pytest.raises(RuntimeError, match=r"leave out scaler\.unscale_"):
        scaler.step(runs[1])
    runs[1].step()


def schedulers_work() -> None:
    """A torch scheduler drives lr as with any optimizer."""
    params = make_params()
    optimizer = ShardedAdaBelief(params, **HYPER)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=5, cycle_momentum=True
    )
    rates = []
    for step in range(4):
        backward(params, [make_grad(s, step, 0, i) for i, s in enumerate(SHAPES)])
        before = params[0].detach().clone()
        optimizer.step()
        rates.append((optimizer.param_groups[0]["lr"], float((params[0] - before).abs().max())))
        scheduler.step()
        optimizer.zero_grad()
    assert len({rate for rate, _ in rates}) == 4
    assert rates[0][1] < rates[1][1]  # a larger lr moves further


def forgotten_gradients_leave_nothing() -> None:
    """Gradients that were reduced, in part or as a whole, and then zeroed: as if never computed."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for stage, overlap, wire in itertools.product((1, 2), (True, False), (None, torch.int8)):
        options: dict[str, Any] = {"stage": stage, "overlap": overlap, "reduce_dtype": wire}
        trained = []
        # With int8, later also what rounding had kept back is forgotten.
        for forgets in ((), (0,) if wire else (0, 1, 2)):
            params = make_params()
            optimizer = ShardedAdaBelief(params, bucket_bytes=200, **HYPER, **options)
            for step in range(3):
                grads = [make_grad(p.shape, step, rank, i) for i, p in enumerate(params)]
                if step in forgets:
                    # Stage 2 ends a round with every backward; stage 1 may be in the middle of it.
                    some = stage == 1 and rank == world_size - 1
                    used = [None if some and i < 4 else 7 * g for i, g in enumerate(grads)]
                    backward(params, used)
                    optimizer.zero_grad(set_to_none=step != 1)
                backward(params, grads)
                optimizer.step()
                optimizer.zero_grad()
            trained.append(params)
        for ours, theirs in zip(*trained, strict=True):
            assert torch.equal(ours, theirs), options


def backward_twice_is_an_error() -> None:
    """Adding to a gradient that was summed over the ranks would be silently wrong."""
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=1500, **HYPER)
    grads = [make_grad(s, 1, dist.get_rank(), i) for i, s in enumerate(SHAPES)]
    backward(params, grads)
    with pytest.raises(RuntimeError, match=r"no_sync\(\)"):
        backward(params, grads)
    optimizer.step()
    optimizer.zero_grad()
    backward(params, grads)
    for param in params:
        param.grad = None  # the optimizer cannot know that all ranks do
    with pytest.raises(RuntimeError, match=r"forgets gradients by optimizer.zero_grad\(\)"):
        backward(params, grads)
    optimizer.zero_grad()
    backward(params, grads)
    optimizer.step()
    # zero_grad in place, through the model, is as good as the optimizer's own.
    for param in params:
        param.grad.zero_()
    backward(params, grads)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 3


@pytest.mark.parametrize("world_size", [1, 3])
def test_training_loop_habits(world_size: int, tmp_path: Path) -> None:
    run_ranks(
        world_size,
        tmp_path,
        resumes_exactly,
        loaded_weights_reach_the_masters,
        skips_together,
        grad_scaler_works,
        schedulers_work,
        forgotten_gradients_leave_nothing,
        backward_twice_is_an_error,
    )


# - Native reduction: right, though not in rank order


def native_is_close() -> None:
    """The backend's own reduce-scatter gives the same training within rounding."""
    rank = dist.get_rank()
    params, other = make_params(), make_params()
    native = ShardedAdaBelief(params, bucket_bytes=1500, reduction="native", **HYPER)
    ordered = ShardedAdaBelief(other, bucket_bytes=1500, reduction="ordered", **HYPER)
    for step in (1, 2, 3):
        for run, members in ((native, params), (ordered, other)):
            backward(members, [make_grad(s, step, rank, i) for i, s in enumerate(SHAPES)])
            run.step()
            run.zero_grad()
        # Norms in float64, of float32 sums in another order.
        assert math.isclose(native.grad_norm.item(), ordered.grad_norm.item(), rel_tol=1e-6)
    for a, b in zip(params, other, strict=True):
        # Three float32 steps of size lr; another order of W addends is an ulp or two per step.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world_size", [2, 3])
def test_native_reduction(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, tmp_path, native_is_close)

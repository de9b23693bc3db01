"""Gradients in 8 bits: how they are rounded, what is kept, and training with them."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from belief_dist import ShardedAdaBelief
from belief_dist.kernels import encode_int8_
from belief_dist.kernels.eager import decode_int8
from belief_dist.options import DEFAULTS
from belief_dist.sharding.grad_codec import BLOCK, Int8
from tests.harness.models import HYPER, SHAPES, make_grad, make_params
from tests.harness.ranks import run_ranks
from tests.harness.reference import Reference, backward, compare

Stage = Literal[1, 2]


def send(values: Tensor, error: Tensor) -> Tensor:
    """Return what arrives; `error` is updated."""
    wire = torch.empty(Int8().wire_numel(values.numel()), dtype=torch.uint8)
    encode_int8_(wire, values, error)
    return decode_int8(wire)


@settings(deadline=None)
@given(
    blocks=st.integers(1, 5),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 1000),
)
def test_nothing_is_lost(blocks: int, exponent: int, seed: int) -> None:
    """What arrives is within half a step of the block, and the error is the rest, exactly."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(blocks * BLOCK, generator=generator) * 2.0**exponent
    error = torch.zeros_like(values)
    arrived = send(values, error)
    steps = values.view(-1, BLOCK).abs().amax(1) / 127
    # Half a step, and the rounding of the two float32 operations that make it.
    assert bool((error.view(-1, BLOCK).abs().amax(1) <= steps * (0.5 + 1e-4)).all())
    # x - q * scale of nearby numbers is exact (Sterbenz) but for the rounding of q * scale.
    torch.testing.assert_close(arrived + error, values, rtol=2**-23, atol=0.0)


def test_errors_are_sent_later() -> None:
    """A constant gradient arrives in full, on average: the rest never grows beyond a step."""
    values = torch.randn(BLOCK, generator=torch.Generator().manual_seed(1))
    error, total = torch.zeros(BLOCK), torch.zeros(BLOCK, dtype=torch.float64)
    for _ in range(200):
        total += send(values, error)
    step = float(values.abs().max()) / 127
    assert float((total / 200 - values).abs().max()) < 2 * step / 200


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_arrives_so(bad: float) -> None:
    values = torch.ones(2 * BLOCK)
    values[7] = bad
    arrived = send(values, torch.zeros_like(values))
    assert not arrived[:BLOCK].isfinite().any()
    assert torch.equal(arrived[BLOCK:], values[BLOCK:])


def test_zeros_and_the_smallest_numbers() -> None:
    values = torch.zeros(2 * BLOCK)
    values[BLOCK:] = 1e-45
    error = torch.zeros_like(values)
    arrived = send(values, error)
    assert torch.equal(arrived, torch.zeros_like(values))
    assert torch.equal(error, values)


def rounded(grad: Tensor, error: Tensor) -> Tensor:
    """The definition, for one parameter: blocks start with it."""
    padded = torch.zeros(-(-max(grad.numel(), 1) // BLOCK) * BLOCK)
    padded[: grad.numel()] = grad.float().reshape(-1) + error.float().reshape(-1)
    arrived = torch.empty_like(padded)
    for start in range(0, len(padded), BLOCK):
        block = padded[start : start + BLOCK]
        scale = block.abs().max() / 127
        code = torch.round(block / scale) if scale > 0 else torch.zeros(BLOCK)
        arrived[start : start + BLOCK] = code * scale
    rest = (padded - arrived)[: grad.numel()].view(grad.shape)
    error.copy_(rest)
    return arrived[: grad.numel()].view(grad.shape)


def equals_the_definition(
    bucket_bytes: int, stage: Stage, micro_batches: int = 1, **options: Any
) -> None:
    """The same bits for any number of ranks, bucket size and schedule."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dtype = options.pop("dtype", torch.float32)
    params = make_params(dtype)
    reference = Reference(make_params(dtype), [{**DEFAULTS, **HYPER}] * len(params))
    optimizer = ShardedAdaBelief(
        params,
        bucket_bytes=bucket_bytes,
        stage=stage,
        reduce_dtype=torch.int8,
        max_grad_norm=1.0,
        **options,
        **HYPER,
    )
    errors = [[torch.zeros(s, dtype=dtype) for s in SHAPES] for _ in range(world_size)]
    for step in range(4):

        def grad(of: int, i: int, micro: int, step: int = step) -> Tensor | None:
            unused = (i == 2 and of != 0) or (i == 4 and step % 2) or (i == 6 and step == 1)
            return None if unused else make_grad(SHAPES[i], step, of, i, micro).to(dtype)

        everyone: list[list[Tensor | None]] = []
        numbers = range(len(SHAPES))
        if stage == 1:
            sends = []
            for of in range(world_size):
                parts = [[grad(of, i, micro) for micro in range(micro_batches)] for i in numbers]
                sends.append((of, [_sum(p) for p in parts]))
        else:
            sends = [
                (of, [grad(of, i, micro) for i in numbers])
                for micro in range(micro_batches)
                for of in range(world_size)
            ]
        for of, grads in sends:
            everyone.append(
                [None if g is None else rounded(g, errors[of][i]) for i, g in enumerate(grads)]
            )
        for micro in range(micro_batches):
            mine = [grad(rank, i, micro) for i in numbers]
            if micro + 1 < micro_batches:
                with optimizer.no_sync():
                    backward(params, mine)
            else:
                backward(params, mine)
        optimizer.step()
        reference.step(everyone, 1.0, world_size)
        context = f"int8, W={world_size}, stage {stage}, bucket {bucket_bytes}, step {step}"
        assert optimizer.grad_norm.item() == reference.norm.item(), context
        compare(optimizer, reference, context)
        for i, param in enumerate(params):
            kept = optimizer.state[param]["wire_error"]
            assert torch.equal(kept, errors[rank][i].reshape(-1)), f"{context}: error of {i}"
        optimizer.zero_grad()


def _sum(parts: list[Tensor | None]) -> Tensor | None:
    kept = [part for part in parts if part is not None]
    return sum(kept[1:], start=kept[0].clone()) if kept else None


def skipped_and_resumed() -> None:
    """A skipped step forgets the errors on all ranks; a saved state brings them back."""
    params = make_params()
    optimizer = ShardedAdaBelief(params, reduce_dtype=torch.int8, bucket_bytes=1500, **HYPER)

    def train(run: ShardedAdaBelief, members: list[nn.Parameter], step: int, bad: bool) -> None:
        grads = [make_grad(s, step, dist.get_rank(), i) for i, s in enumerate(SHAPES)]
        if bad and dist.get_rank() == 1:
            grads[7][3, 3] = math.nan
        backward(members, [*grads])
        run.step()
        run.zero_grad()

    train(optimizer, params, 1, bad=False)
    assert any(bool(s["wire_error"].any()) for s in optimizer.state.values())
    saved = copy.deepcopy(optimizer.state_dict())
    other = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = ShardedAdaBelief(other, reduce_dtype=torch.int8, bucket_bytes=1500, **HYPER)
    resumed.load_state_dict(saved)
    for run, members in ((optimizer, params), (resumed, other)):
        train(run, members, 2, bad=False)
    for a, b in zip(params, other, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["wire_error"], resumed.state[b]["wire_error"])
    before = [p.detach().clone() for p in params]
    train(optimizer, params, 3, bad=True)
    assert optimizer.skipped_steps == 1
    for param, value in zip(params, before, strict=True):
        assert torch.equal(param, value)
        assert not optimizer.state[param]["wire_error"].any()


def sends_a_quarter() -> None:
    """260 bytes for 256 gradients, counted where they leave."""
    params = [nn.Parameter(torch.zeros(300_000)) for _ in range(3)]
    optimizer = ShardedAdaBelief(
        params, reduce_dtype=torch.int8, bucket_bytes=2 << 20, shared_memory=False
    )
    sent = 0
    isend = dist.isend

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        sent += tensor.nbytes
        return isend(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "isend", counting)
        torch.stack([param.sum() for param in params]).sum().backward()
        optimizer.step()
    world_size = dist.get_world_size()
    elements = sum(bucket.numel for bucket in optimizer.layout.buckets)
    assert sent == (elements // 256 * 260 + elements * 4) * (world_size - 1) // world_size
    # Every gradient was 1: exactly 127 steps.
    assert optimizer.grad_norm.item() == math.sqrt(900_000)
    assert optimizer.bytes_per_rank()["wire errors"] == 4 * elements


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_training_with_int8(world_size: int, tmp_path: Path) -> None:
    cases = [
        partial(equals_the_definition, bucket_bytes, stage, micro_batches)
        for bucket_bytes, stage, micro_batches in (
            (1, 1, 1),
            (1500, 1, 1),
            (10**9, 1, 3),
            (1500, 2, 1),
            (10**9, 2, 3),
        )
    ]
    cases += [
        partial(equals_the_definition, 1500, 1, overlap=False),
        partial(equals_the_definition, 1500, 2, dtype=torch.bfloat16),
        partial(equals_the_definition, 1500, 1, offload="cpu"),
    ]
    more = (skipped_and_resumed, sends_a_quarter) if world_size > 1 else ()
    run_ranks(world_size, tmp_path, *cases, *more)


def test_int8_refuses_what_spoils_it() -> None:
    param = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="needs reduction='ordered'"):
        ShardedAdaBelief([param], reduce_dtype=torch.int8, reduction="native")
    with pytest.raises(ValueError, match="would narrow the gradient of float64"):
        ShardedAdaBelief([nn.Parameter(torch.ones(3).double())], reduce_dtype=torch.int8)
    optimizer = ShardedAdaBelief([param], reduce_dtype=torch.int8)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(param.sum()).backward()
    with (
        pytest.raises(RuntimeError, match="does not work with a GradScaler"),
        pytest.warns(FutureWarning),
    ):
        scaler.step(optimizer)


def test_neighbours_do_not_matter() -> None:
    """Blocks are anchored in their parameter."""
    grad = torch.randn(300, generator=torch.Generator().manual_seed(0))
    alone = nn.Parameter(torch.ones(300))
    among = [nn.Parameter(torch.ones(n)) for n in (7, 300, 500)]
    for params, member in (([alone], alone), (among, among[1])):
        optimizer = ShardedAdaBelief(params, reduce_dtype=torch.int8, **HYPER)
        backward(params, [grad * 1.0 if p is member else torch.full_like(p, 50) for p in params])
        optimizer.step()
    assert torch.equal(alone, among[1])

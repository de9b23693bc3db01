"""What users do around a sharded step: stage 2, saving, skips, scalers, schedulers, accidents."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from belief_dist import ShardedAdaBelief
from belief_dist.sharding.sharded_grad import ShardedGrad
from tests.harness.models import HYPER, SHAPES, make_grad, make_params
from tests.harness.ranks import run_ranks
from tests.harness.reference import backward

# - ZeRO-2


def gradients_are_sharded() -> None:
    """The bytes of stage 2, during backward too: two recycled buckets, no full gradient."""
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
                assert all(isinstance(param.grad, ShardedGrad) for param in params)
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

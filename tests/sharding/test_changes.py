"""What changes while training goes on: frozen parameters, new groups, the order of use.

Every case equals, bit for bit, one process with all ranks' gradients.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from belief_dist import ShardedAdaBelief
from belief_dist.options import DEFAULTS
from belief_dist.sharding.gradient_access import OwnGradient
from tests.harness.models import HYPER, SHAPES, make_grad, make_params, rank_order_sum
from tests.harness.ranks import run_ranks
from tests.harness.reference import Reference, backward, compare

Stage = Literal[1, 2]
OPTIONS = {**DEFAULTS, **HYPER}


def gradients(step: int, present: set[int]) -> list[list[Tensor | None]]:
    """Return a gradient for every rank and every parameter that is present."""
    return [
        [make_grad(s, step, rank, i) if i in present else None for i, s in enumerate(SHAPES)]
        for rank in range(dist.get_world_size())
    ]


def frozen_and_unfrozen(stage: Stage, overlap: bool) -> None:
    """Frozen from the start, frozen for a while, unfrozen on the way: each as if it were unused."""
    params = make_params()
    for index in (1, 3, 7):
        params[index].requires_grad_(False)
    reference = Reference(make_params(), [OPTIONS] * len(params))
    optimizer = ShardedAdaBelief(params, bucket_bytes=600, stage=stage, overlap=overlap, **HYPER)
    reducer = optimizer._engine.reducer
    left: list[int] = []
    end_round = reducer._end_round
    reducer._end_round = lambda: (  # type: ignore[method-assign]
        left.append(len(optimizer.layout.buckets) - reducer.schedule.next),
        end_round(),
    )[1]
    for step in range(6):
        params[3].requires_grad_(step >= 2)
        params[7].requires_grad_(step in (1, 2, 4))
        params[0].requires_grad_(step != 3)
        everyone = gradients(step, {i for i, p in enumerate(params) if p.requires_grad})
        backward(params, everyone[dist.get_rank()])
        if overlap and stage == 1:
            # Frozen parameters are not waited for: all buckets are under way when backward ends.
            assert left == [0] * (step + 1)
        optimizer.step()
        reference.step(everyone, None, dist.get_world_size())
        compare(optimizer, reference, f"stage {stage}, step {step}")
        optimizer.zero_grad()


def later_group(stage: Stage) -> None:
    """A group that comes later gets buckets of its own; what was there goes on as it was."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    params = make_params()
    late_options = {"lr": 0.02, "betas": (0.5, 0.9), "weight_decay": 0.0, "amsgrad": True}
    options = [OPTIONS] * 5 + [{**OPTIONS, **late_options}] * 3
    reference = Reference(make_params(), options)
    optimizer = ShardedAdaBelief(params[:5], bucket_bytes=1500, stage=stage, **HYPER)
    with torch.no_grad():
        for param in params[5:]:
            param.add_(rank)  # the optimizer must spread the first rank's
    homes = [param.data_ptr() for param in params[:5]]
    for step in range(4):
        if step == 2:
            params[4].requires_grad_(False)  # stays in its bucket all the same
            optimizer.add_param_group({"params": params[5:], **late_options})
            params[4].requires_grad_(True)
        everyone = gradients(step, set(range(5 if step < 2 else 8)))
        backward(params, everyone[rank])
        optimizer.step()
        reference.step(everyone, None, world_size)
        for i, param in enumerate(params[: len(everyone[0]) if step >= 2 else 5]):
            assert torch.equal(param, reference.low[i]), (stage, step, i)
        optimizer.zero_grad()
    assert [param.data_ptr() for param in params[:5]] == homes
    states = [optimizer.state[param] for param in params]
    assert [state["step"] for state in states] == reference.steps
    assert ["max_exp_avg_sq" in state for state in states] == [False] * 5 + [True] * 3


def refused_on_one_rank() -> None:
    """A group that one rank cannot add is added by none, and training goes on."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    params, more = make_params(), [nn.Parameter(torch.ones(3))]
    optimizer = ShardedAdaBelief(params, **HYPER)
    group: dict[str, Any] = {"params": more, "lr": -1.0 if rank == last else 0.1}
    with pytest.raises(ValueError, match=r"lr must be finite and >= 0, got -1\.0"):
        optimizer.add_param_group(group)
    with pytest.raises(ValueError, match=r"options of param group.*rank 1 has lr=0\.2"):
        optimizer.add_param_group({"params": more, "lr": 0.2 if rank == 1 else 0.1})
    reference = Reference(make_params(), [OPTIONS] * len(params))
    everyone = gradients(1, set(range(len(SHAPES))))
    backward(params, everyone[rank])
    optimizer.step()
    reference.step(everyone, None, dist.get_world_size())
    compare(optimizer, reference, "after a group was refused")


def group_without_clipping(stage: Stage) -> None:
    """`clip: False` takes a group out of norm and clipping; a NaN there still skips the step."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    params = make_params()
    options = [{**OPTIONS, "clip": i < 4} for i in range(len(params))]
    reference = Reference(make_params(), options)
    optimizer = ShardedAdaBelief(
        [{"params": params[:4]}, {"params": params[4:], "clip": False}],
        bucket_bytes=1500,
        stage=stage,
        max_grad_norm=0.5,
        **HYPER,
    )
    for step in range(3):
        everyone = gradients(step, set(range(len(SHAPES))))
        backward(params, everyone[rank])
        optimizer.step()
        reference.step(everyone, 0.5, world_size)
        assert optimizer.grad_norm.item() == reference.norm.item()
        compare(optimizer, reference, f"clip by group, stage {stage}, step {step}")
        optimizer.zero_grad()
    backward(params, [torch.full(shape, float("nan")) for shape in SHAPES[:4]] + [None] * 4)
    optimizer.step()
    optimizer.zero_grad()
    backward(params, [None] * 4 + [torch.full(shape, float("nan")) for shape in SHAPES[4:]])
    optimizer.step()
    assert optimizer.skipped_steps == 2
    compare(optimizer, reference, "after two steps that were skipped")


def groups_with_norms_of_their_own(stage: Stage, **options: Any) -> None:
    """Each is clipped by itself, and counts in no other norm; one that is not finite skips all."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    params = make_params()
    limits: list[dict[str, Any]] = [{}, {"max_grad_norm": 0.3}, {"clip": False}]
    limits.append({"max_grad_norm": 1e-3, "lr": 0.02})
    cuts = [params[:2], params[2:4], params[4:5], params[5:]]
    each = [{**OPTIONS, **more} for more, part in zip(limits, cuts, strict=True) for _ in part]
    reference = Reference(make_params(), each)
    groups = [{"params": part, **more} for more, part in zip(limits, cuts, strict=True)]
    seen: list[float] = []

    def look(gradients: Iterator[OwnGradient]) -> None:
        squares = sum((g.total.double() * g.factor).square().sum() for g in gradients)
        everyone = [float(x) for x in optimizer.comm.exchange(squares)]
        seen.append(sum(everyone) ** 0.5)

    optimizer = ShardedAdaBelief(
        groups, bucket_bytes=1500, stage=stage, max_grad_norm=0.5, **options, **HYPER
    )
    handle = optimizer.register_pre_clip_hook(look)
    assert optimizer.group_grad_norms == {}
    for step in range(3):
        everyone = gradients(step, set(range(len(SHAPES))))
        backward(params, everyone[rank])
        optimizer.step()
        reference.step(everyone, 0.5, world_size)
        found = {number: norm.item() for number, norm in optimizer.group_grad_norms.items()}
        own = {limit: norm.item() for limit, norm in reference.own_norms.items()}
        assert found == {1: own[0.3], 3: own[1e-3]}
        assert optimizer.grad_norm.item() == reference.norm.item()
        compare(optimizer, reference, f"norms by group, stage {stage}, step {step}")
        optimizer.zero_grad()
    # All gradients, of norms or none, in float64.
    total = [rank_order_sum([grads[i] for grads in everyone]) for i in range(len(params))]
    whole = sum((t.double() / world_size).square().sum().item() for t in total) ** 0.5
    assert math.isclose(seen[-1], whole, rel_tol=1e-9) and len(seen) == 3
    handle.remove()
    nans = [torch.full(SHAPES[2], float("nan"))]
    backward(params, [None] * 2 + nans + [None] * (len(params) - 3))
    optimizer.step()
    assert optimizer.skipped_steps == 1 and len(seen) == 3
    compare(optimizer, reference, "after a step that was skipped")
    optimizer.zero_grad()
    optimizer.param_groups[1]["max_grad_norm"] = None
    backward(params, everyone[rank])
    with pytest.raises(ValueError, match="max_grad_norm of param group 1 was set to None after"):
        optimizer.step()
    optimizer.param_groups[1]["max_grad_norm"] = 0.3
    optimizer.step()
    reference.step(everyone, 0.5, world_size)
    compare(optimizer, reference, "after a mistake that was taken back")


def a_hook_that_raises() -> None:
    """It does so on one rank, when the step has ended on all."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    params = make_params()
    optimizer = ShardedAdaBelief(params, **HYPER)
    reference = Reference(make_params(), [OPTIONS] * len(params))

    def fail(gradients: Iterator[OwnGradient]) -> None:
        if rank == last:
            raise ZeroDivisionError("no statistics")

    optimizer.register_pre_clip_hook(fail)
    everyone = gradients(0, set(range(len(SHAPES))))
    backward(params, everyone[rank])
    with pytest.raises(ZeroDivisionError) if rank == last else nullcontext():
        optimizer.step()
    reference.step(everyone, None, dist.get_world_size())
    compare(optimizer, reference, "after a hook has raised")


def sparse_embedding(stage: Stage) -> None:
    """A sparse gradient is made dense, with one warning; the bits are those of a dense one."""
    torch.manual_seed(0)
    sparse, dense = nn.Embedding(50, 7, sparse=True), nn.Embedding(50, 7)
    dense.load_state_dict(sparse.state_dict())
    runs = [
        (model, ShardedAdaBelief(model.named_parameters(), stage=stage, **HYPER))
        for model in (sparse, dense)
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, (model, optimizer) in itertools.product(range(3), runs):
            tokens = torch.tensor([dist.get_rank(), 3, 3, step])
            model(tokens).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(sparse.weight, dense.weight)
    assert [str(w.message)[:43] for w in caught if w.category is UserWarning] == [
        "the gradient of parameter 'weight' is spars"
    ]


def small_parameters() -> None:
    """5,000 parameters in a few buckets."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    params = [nn.Parameter(torch.full((3,), float(i))) for i in range(5000)]
    optimizer = ShardedAdaBelief(params, bucket_bytes=50_000, **HYPER)
    single = Reference([nn.Parameter(p.detach().clone()) for p in params], [OPTIONS] * 5000)
    assert len(optimizer.layout.buckets) == 2
    rows = [torch.randn(5000, 3, generator=torch.Generator().manual_seed(r)) for r in range(9)]
    (torch.stack(params) * rows[rank]).sum().backward()
    optimizer.step()
    single.step([list(rows[r]) for r in range(world_size)], None, world_size)
    compare(optimizer, single, "5,000 parameters")


@pytest.mark.parametrize("world_size", [3, 4])
def test_changes(world_size: int, tmp_path: Path) -> None:
    stages: tuple[Stage, ...] = (1, 2)
    run_ranks(
        world_size,
        tmp_path,
        *(partial(frozen_and_unfrozen, stage, o) for stage in stages for o in (True, False)),
        *(partial(later_group, stage) for stage in stages),
        refused_on_one_rank,
        *(partial(group_without_clipping, stage) for stage in stages),
        *(partial(groups_with_norms_of_their_own, stage) for stage in stages),
        partial(groups_with_norms_of_their_own, 2, offload=0.5, overlap=False),
        a_hook_that_raises,
        *(partial(sparse_embedding, stage) for stage in stages),
        small_parameters,
    )


# - The order of use


def order_is_learned(stage: Stage) -> None:
    """Reductions follow the order in which gradients came, the same on ranks that differ in it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(2)
    layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(6))
    params = list(layers.parameters())
    reference = Reference([nn.Parameter(p.detach().clone()) for p in params], [OPTIONS] * 12)
    optimizer = ShardedAdaBelief(params, bucket_bytes=1, stage=stage, **HYPER)
    buckets = len(optimizer.layout.buckets)
    assert optimizer._engine.reducer.schedule.order == list(range(buckets))
    # Registered 0 to 5, used in another order; on rank 0 two neighbours the other way round.
    use = [3, 0, 5, 1, 4, 2]
    mine = [0, 3, 5, 1, 4, 2] if rank == 0 else use
    for step in range(3):
        torch.manual_seed(10 + step)
        data = torch.randn(world_size, 4, 5)
        x = data[rank]
        for i in mine:
            x = torch.tanh(layers[i](x))
        x.square().sum().backward()
        # At stage 2 `.grad` is gone: the same pass again gives the gradients.
        grads = []
        for of in range(world_size):
            x = data[of]
            for i in [0, 3, 5, 1, 4, 2] if of == 0 else use:
                x = torch.tanh(layers[i](x))
            grads.append(list(torch.autograd.grad(x.square().sum(), params)))
        optimizer.step()
        reference.step(grads, None, world_size)
        compare(optimizer, reference, f"another order of use, stage {stage}, step {step}")
        optimizer.zero_grad()
    learned = optimizer._engine.reducer.schedule.order
    assert sorted(learned) == list(range(buckets))
    assert len(set(map(tuple, optimizer.comm.exchange(learned)))) == 1
    # Backward meets the layers from the last to the first; a layer is two buckets.
    met = [optimizer.layout.place(2 * i)[0] // 2 for i in use]
    assert [bucket // 2 for bucket in learned[::2]][:4] == met[::-1][:4]


@pytest.mark.parametrize("world_size", [3, 4])
def test_order_is_learned(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, tmp_path, partial(order_is_learned, 1), partial(order_is_learned, 2))

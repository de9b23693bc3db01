"""Backward passes in any number and order: several for a step, through several networks, raising.

Every case ends with the bits of one process that adds the same gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from belief_dist import ShardedAdaBelief
from belief_dist.options import DEFAULTS
from belief_dist.sharding.sharded_grad import ShardedGrad
from tests.harness.models import HYPER, SHAPES, make_grad, make_params
from tests.harness.ranks import run_ranks
from tests.harness.reference import Reference, backward, compare

Stage = Literal[1, 2]
Grads = Sequence[Tensor | None]
OPTIONS = {**DEFAULTS, **HYPER}


def grads_of(step: int, rank: int, micro: int = 0, used: Sequence[int] | None = None) -> Grads:
    return [
        make_grad(s, step, rank, i, micro) if used is None or i in used else None
        for i, s in enumerate(SHAPES)
    ]


def added(*addends: Grads) -> Grads:
    """Add as autograd does: one after the other, None being nothing."""
    total = list(addends[0])
    for grads in addends[1:]:
        for index, grad in enumerate(grads):
            if grad is not None:
                before = total[index]
                total[index] = grad if before is None else before + grad
    return total


def addends(stage: Stage, passes: Sequence[Sequence[Grads]]) -> list[Grads]:
    """Return what is summed, in order: `passes[micro][rank]`."""
    if stage == 2:  # every pass is reduced, and adds to the shards
        return [grads for ranks in passes for grads in ranks]
    return [added(*(ranks[rank] for ranks in passes)) for rank in range(dist.get_world_size())]


# - Several passes for one step


def several_passes(stage: Stage, wire: torch.dtype | None) -> None:
    """Without `no_sync` they add up, whichever parameters each of them reaches on which rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    everything, some, others = range(8), (0, 2, 4, 7), (1, 2, 3, 5, 6)
    params = make_params()
    optimizer = ShardedAdaBelief(
        params, bucket_bytes=600, stage=stage, max_grad_norm=0.5, reduce_dtype=wire, **HYPER
    )
    reference = Reference(make_params(), [OPTIONS] * len(params))
    plans = [
        [everything, everything],
        [some, others],  # disjoint parts of the loss, but for one parameter
        [some, everything, some],
        [everything],
        [others, some, others],
    ]
    for step, plan in enumerate(plans):
        passes = []
        for micro, used in enumerate(plan):
            # The last rank leaves one more parameter out.
            kept = [[i for i in used if i != 2 or r != world_size - 1] for r in range(world_size)]
            passes.append([grads_of(step, r, micro, kept[r]) for r in range(world_size)])
            backward(params, list(passes[-1][rank]))
        optimizer.step()
        reference.step([list(g) for g in addends(stage, passes)], 0.5, world_size)
        assert optimizer.grad_norm.item() == reference.norm.item()
        compare(optimizer, reference, f"stage {stage}, step {step}")
        optimizer.zero_grad()


def no_sync_in_any_place() -> None:
    """Local passes before, between and after those that are reduced."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=600, **HYPER)
    reference = Reference(make_params(), [OPTIONS] * len(params))
    for step, plan in enumerate(("ls", "sl", "lsl", "sls", "ll", "ssl")):
        passes = [[grads_of(step, r, m) for r in range(world_size)] for m in range(len(plan))]
        for kind, grads in zip(plan, passes, strict=True):
            if kind == "l":
                with optimizer.no_sync():
                    backward(params, list(grads[rank]))
            else:
                backward(params, list(grads[rank]))
        optimizer.step()
        reference.step([list(g) for g in addends(1, passes)], None, world_size)
        compare(optimizer, reference, plan)
        optimizer.zero_grad()


def gradients_that_nobody_zeroes(stage: Stage) -> None:
    """Without zero_grad, a step's gradient is added to that of the steps before."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=600, stage=stage, **HYPER)
    reference = Reference(make_params(), [OPTIONS] * len(params))
    passes = []
    for step in range(4):
        used = range(8) if step != 2 else (0, 3, 6, 7)
        passes.append([grads_of(step, r, 0, used) for r in range(world_size)])
        backward(params, list(passes[-1][rank]))
        optimizer.step()
        reference.step([list(g) for g in addends(stage, passes)], None, world_size)
        compare(optimizer, reference, f"stage {stage}, step {step}")


def gradients_stay_ones_own() -> None:
    """At stage 1 `param.grad` is this rank's own gradient, before and after the step."""
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=600, **HYPER)
    own = grads_of(0, dist.get_rank())
    backward(params, list(own))
    for _ in range(2):
        assert all(torch.equal(p.grad, g) for p, g in zip(params, own, strict=True))  # type: ignore[arg-type]
        optimizer.step()
    # Nothing was forgotten, so that the next backward adds, as everywhere in torch.
    backward(params, list(own))
    assert all(torch.equal(p.grad, g + g) for p, g in zip(params, own, strict=True))  # type: ignore[arg-type,operator]


def hooks_that_come_too_late() -> None:
    """A hook registered after ours may see a gradient that is on its way: then the step says so."""
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=1, **HYPER)  # each is sent at once
    before = [param.detach().clone() for param in params]

    def double(param: Tensor) -> None:
        assert param.grad is not None
        param.grad.mul_(2.0)

    handle = params[7].register_post_accumulate_grad_hook(double)
    backward(params, list(grads_of(0, dist.get_rank())))
    with pytest.raises(RuntimeError, match=r"number 7 .* was changed after it was summed"):
        optimizer.step()
    assert all(map(torch.equal, before, params))
    handle.remove()
    optimizer.zero_grad()
    backward(params, list(grads_of(0, dist.get_rank())))
    optimizer.step()


def eight_bits_need_no_sync() -> None:
    """Error feedback of a round that is sent again would be fed back twice."""
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=600, reduce_dtype=torch.int8, **HYPER)
    own = list(grads_of(0, dist.get_rank()))
    backward(params, own)
    with pytest.raises(RuntimeError, match=r"int8.*optimizer.no_sync\(\)"):
        backward(params, own)
    optimizer.zero_grad()
    for _ in range(2):
        with optimizer.no_sync():
            backward(params, own)
        backward(params, own)
        optimizer.step()
        optimizer.zero_grad()


# - Gradients that are dropped


def dropped_after_backward(stage: Stage) -> None:
    """`param.grad = None` on all ranks: no step for that parameter, and no part in the norm."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=600, stage=stage, max_grad_norm=0.5, **HYPER)
    reference = Reference(make_params(), [OPTIONS] * len(params))
    for step in range(4):
        frozen = [(), (6, 7), (0,), range(8)][step]
        used = [i for i in range(8) if i not in frozen]
        backward(params, list(grads_of(step, rank)))
        for index in frozen:
            params[index].grad = None
        optimizer.step()
        everyone = [list(grads_of(step, r, 0, used)) for r in range(world_size)]
        reference.step(everyone, 0.5, world_size)
        assert optimizer.grad_norm.item() == reference.norm.item()
        compare(optimizer, reference, f"stage {stage}, step {step}")
        optimizer.zero_grad()


def dropped_on_one_rank(stage: Stage) -> None:
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=600, stage=stage, **HYPER)
    before = [param.detach().clone() for param in params]
    backward(params, list(grads_of(0, dist.get_rank())))
    if dist.get_rank() == 1:
        params[4].grad = params[6].grad = None
    with pytest.raises(RuntimeError, match=r"number 4 .* was set to None .* only by rank \[1\]"):
        optimizer.step()
    assert all(map(torch.equal, before, params))
    optimizer.zero_grad()
    backward(params, list(grads_of(0, dist.get_rank())))
    optimizer.step()


# - Stage 2: what stands for the gradient


TOUCHES: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "clip_grad_norm_": lambda params: nn.utils.clip_grad_norm_(params, 1.0),
    "clip_grad_norm_, one by one": lambda params: nn.utils.clip_grad_norm_(
        params, 1.0, foreach=False
    ),
    "clip_grad_value_": lambda params: nn.utils.clip_grad_value_(params, 1.0),
    "norm": lambda params: params[0].grad.norm(),  # type: ignore[union-attr]
    "mul_": lambda params: params[0].grad.mul_(0.5),  # type: ignore[union-attr]
    "mask": lambda params: params[0].grad.__setitem__(0, 0.0),  # type: ignore[union-attr]
    "numpy": lambda params: params[0].grad.numpy(),  # type: ignore[union-attr]
    "item": lambda params: params[3].grad.item(),  # type: ignore[union-attr]
    "isfinite": lambda params: params[7].grad.isfinite().all(),  # type: ignore[union-attr]
}


def gradients_in_shards_say_so() -> None:
    """Whoever would read or change them is told, and whoever looks at their shape is not."""
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=600, stage=2, **HYPER)
    own = list(grads_of(0, dist.get_rank()))
    backward(params, own)
    for name, touch in TOUCHES.items():
        with pytest.raises((RuntimeError, TypeError), match=r"stage=2|numpy|ShardedGrad") as caught:
            touch(params)
        assert name == "numpy" or "max_grad_norm" in str(caught.value), name
    for param in params:
        grad = param.grad
        assert isinstance(grad, ShardedGrad) and grad.shape == param.shape
        assert grad.dtype == param.dtype and str(tuple(param.shape)) in repr(grad)
    params[7].register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2.0))
    with pytest.raises(RuntimeError, match="hook that is registered before the optimizer"):
        backward(params, own)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)


def set_and_added_by_hand() -> None:
    """At stage 2, `grad.add_` counts as another gradient, and `grad.zero_` leaves zero."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    params = make_params()
    optimizer = ShardedAdaBelief(params, bucket_bytes=600, stage=2, **HYPER)
    reference = Reference(make_params(), [OPTIONS] * len(params))
    backward(params, list(grads_of(0, rank)))
    noise = [grads_of(0, r, 1) for r in range(world_size)]
    for param, grad in zip(params, noise[rank], strict=True):
        assert param.grad is not None and grad is not None
        param.grad.add_(grad)
    params[6].grad.zero_()  # type: ignore[union-attr]
    optimizer.step()
    everyone = [list(grads_of(0, r)) for r in range(world_size)] + list(map(list, noise))
    for grads in everyone:
        grads[6] = torch.zeros(SHAPES[6])
    reference.step(everyone, None, world_size)
    compare(optimizer, reference, "added and zeroed")


# - Several networks


def gan(
    stage: Stage,
    forget: Callable[[nn.Module, ShardedAdaBelief, str], None],
    two_passes: bool,
) -> list[Tensor]:
    """Return the weights after some steps of a GAN's loop; `forget` stands at every place."""
    torch.manual_seed(0)
    generator, critic = nn.Linear(3, 6), nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    options: dict[str, Any] = {"bucket_bytes": 64, "lr": 0.05, "eps": 1e-2, "stage": stage}
    critic_optimizer = ShardedAdaBelief(critic.parameters(), **options)
    optimizer = ShardedAdaBelief(generator.parameters(), **options)
    seeds = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(4):
        forget(critic, critic_optimizer, "critic")
        fake = generator(torch.randn(4, 3, generator=seeds))
        real = torch.randn(4, 6, generator=seeds)
        if two_passes:  # DCGAN
            critic(real).mean().neg().backward()
            critic(fake.detach()).mean().backward()
        else:
            (critic(fake.detach()).mean() - critic(real).mean()).backward()
        # WGAN-GP: a gradient of a gradient.
        point = (real + fake.detach()).requires_grad_()
        (slope,) = torch.autograd.grad(critic(point).sum(), point, create_graph=True)
        (slope.norm(dim=1) - 1).square().mean().backward()
        critic_optimizer.step()
        forget(generator, optimizer, "generator")
        critic(fake).mean().neg().backward()
        optimizer.step()
    optimizer.wait_pending()
    critic_optimizer.wait_pending()
    return [p.detach().clone() for p in (*generator.parameters(), *critic.parameters())]


FORGET: dict[str, Callable[[nn.Module, ShardedAdaBelief, str], None]] = {
    "optimizer": lambda net, optimizer, which: optimizer.zero_grad(),
    "optimizer, in place": lambda net, optimizer, which: optimizer.zero_grad(set_to_none=False),
    "module": lambda net, optimizer, which: net.zero_grad(),
    "module, in place": lambda net, optimizer, which: net.zero_grad(set_to_none=False),
    "both": lambda net, optimizer, which: (net.zero_grad(), optimizer.zero_grad())[1],
}


def gans_train(stage: Stage) -> None:
    for two_passes in (False, True):
        right = gan(stage, FORGET["optimizer"], two_passes)
        for name, forget in FORGET.items():
            weights = gan(stage, forget, two_passes)
            assert all(map(torch.equal, weights, right)), (stage, name, two_passes)


# - What stands between backward and step


def a_collective_before_step(stage: Stage, overlap: bool) -> None:
    """One rank leaves a layer unused; the script's own collective waits for no `step`."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
    optimizer = ShardedAdaBelief(
        layers.named_parameters(), bucket_bytes=1, stage=stage, overlap=overlap
    )
    for step in range(3):
        x = torch.ones(4, 8)
        for index, layer in enumerate(layers):
            if dist.get_rank() != step % 2 or index != 5:
                x = layer(x).tanh()
        loss = x.square().mean()
        loss.backward()
        dist.all_reduce(loss.detach())
        dist.barrier()
        optimizer.step()
        optimizer.zero_grad()


# - Exceptions inside backward


class Raise(torch.autograd.Function):
    """Passes through, and raises in backward where it is told to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, on: bool) -> Tensor:
        ctx.on = on
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if ctx.on:
            raise torch.OutOfMemoryError("out of memory")
        return grads[0], None


def skips_what_raises(
    stage: Stage, who: str, overlap: bool, accumulate: int, places: Sequence[int]
) -> None:
    """Ranks that catch an exception in backward take the next batch, and nobody hangs."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(24, 24) for _ in range(6)], nn.Linear(24, 1))
    optimizer = ShardedAdaBelief(
        model.named_parameters(), bucket_bytes=4000, stage=stage, overlap=overlap, lr=0.01
    )
    begin = time.monotonic()
    skipped = 0
    for step in range(8):
        if step == 3:
            optimizer.wait_pending()
            before = [param.detach().clone() for param in model.parameters()]
        fails = step in (3, 5) and (who == "all" or rank == 1)
        # Not in the step's first pass, if there are several.
        try:
            for micro in range(accumulate):
                x = torch.full((4, 24), 0.1 * (step + rank))
                for index, layer in enumerate(model):
                    last = micro == accumulate - 1
                    x = layer(Raise.apply(x, fails and last and index == places[rank]))
                x.square().mean().backward()
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
            skipped += 1
            continue
        finally:
            if step == 3 and who == "all":
                optimizer.wait_pending()
                assert all(map(torch.equal, before, model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    optimizer.wait_pending()
    assert skipped == (2 if who == "all" or rank == 1 else 0)
    everyone = optimizer.comm.exchange([param.detach() for param in model.parameters()])
    assert all(map(torch.equal, everyone[0], everyone[rank]))
    if overlap or stage == 2:  # else nothing was on its way, and nobody knows of a step
        assert optimizer.skipped_steps == 2
        assert optimizer.state[model[0].weight]["step"] == 6
    assert time.monotonic() - begin < 20


def nothing_taken_back(stage: Stage) -> None:
    """A step after a backward that raised is an error on all ranks, and so is the next backward."""
    rank = dist.get_rank()
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    optimizer = ShardedAdaBelief(model.parameters(), bucket_bytes=200, stage=stage)

    def run(fails: bool) -> None:
        x = torch.ones(2, 8)
        for index, layer in enumerate(model):
            x = layer(Raise.apply(x, fails and index == 1))
        x.square().mean().backward()

    if rank == 1:
        with pytest.raises(torch.OutOfMemoryError):
            run(True)
        with pytest.raises(RuntimeError, match=r"has raised.*zero_grad\(\) before the next"):
            run(False)
    else:
        run(False)
    with pytest.raises(RuntimeError, match="rank 1: a backward pass has raised"):
        optimizer.step()
    optimizer.zero_grad()
    run(False)
    optimizer.step()
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("world_size", [3, 4])
def test_rounds(world_size: int, tmp_path: Path) -> None:
    run_ranks(
        world_size,
        tmp_path,
        *(partial(several_passes, stage, wire) for stage, wire in ((1, None), (2, None))),
        no_sync_in_any_place,
        *(partial(gradients_that_nobody_zeroes, stage) for stage in (1, 2)),
        gradients_stay_ones_own,
        hooks_that_come_too_late,
        eight_bits_need_no_sync,
        *(partial(dropped_after_backward, stage) for stage in (1, 2)),
        *(partial(dropped_on_one_rank, stage) for stage in (1, 2)),
        gradients_in_shards_say_so,
        set_and_added_by_hand,
        *(partial(gans_train, stage) for stage in (1, 2)),
        *(
            partial(a_collective_before_step, stage, overlap)
            for stage in (1, 2)
            for overlap in (True, False)
        ),
    )


@pytest.mark.parametrize("world_size", [3, 4])
def test_exceptions_in_backward(world_size: int, tmp_path: Path) -> None:
    run_ranks(
        world_size,
        tmp_path,
        *(
            partial(skips_what_raises, stage, who, overlap, accumulate, places)
            for stage in (1, 2)
            for who in ("one", "all")
            for overlap, accumulate in ((True, 1), (True, 2), (False, 1))
            if overlap or stage == 2 or who == "all"
            for places in ((3, 3, 3, 3), (1, 3, 5, 2), (5, 1, 2, 6))
        ),
        *(partial(nothing_taken_back, stage) for stage in (1, 2)),
    )


def test_one_process_skips_what_raises(tmp_path: Path) -> None:
    run_ranks(
        1,
        tmp_path,
        *(partial(skips_what_raises, stage, "all", True, 1, (3,)) for stage in (1, 2)),
    )

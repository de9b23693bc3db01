"""What ranks must have alike when an optimizer is built, and what it keeps them from editing."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from belief_dist import AdaBelief, NotAdaBelief, ShardedAdaBelief, checkpoint, verify
from belief_dist.options import DEFAULTS
from belief_dist.sharding.collectives import CommunicationError
from belief_dist.sharding.module_buffers import find_buffers
from tests.harness.models import HYPER, SHAPES, make_grad, make_params
from tests.harness.ranks import run_ranks
from tests.harness.reference import Reference, backward

Stage = Literal[1, 2]
OPTIONS = {**DEFAULTS, **HYPER}


# - Buffers


class Net(nn.Module):
    """Buffers of several dtypes and places; some beside the parameters, some above them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("features", torch.randn(3))
        self.register_buffer("table", torch.randint(0, 9, (5,)), persistent=False)
        self.register_buffer("flag", torch.rand(7) > 0.5)
        self.register_buffer("short", torch.randn(1).bfloat16())
        self.rotary = nn.Module()
        self.rotary.register_buffer("phases", torch.randn(2, 3).t())
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x * self.features))


def everyone(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same(states: list[dict[str, Tensor]]) -> bool:
    return all(torch.equal(s[key], states[0][key]) for s in states for key in states[0])


def ranks_begin_with_the_first_ones_buffers(stage: Stage) -> None:
    torch.manual_seed(dist.get_rank())
    model, bystander = Net(), nn.BatchNorm1d(3)
    bystander.running_mean.fill_(dist.get_rank())  # type: ignore[union-attr,operator]
    before = everyone(buffers_of(model))
    assert not same(before)
    ShardedAdaBelief(model.named_parameters(), stage=stage)
    after = everyone(buffers_of(model))
    assert same([before[0], *after])
    assert bystander.running_mean[0] == dist.get_rank()  # type: ignore[index]
    assert model.rotary.phases.stride() == (1, 3)  # type: ignore[union-attr,operator]

    torch.manual_seed(dist.get_rank())
    own = Net()
    ShardedAdaBelief(own.named_parameters(), stage=stage, sync_buffers=False)
    assert not same(everyone(buffers_of(own)))


def other_buffers_are_refused() -> None:
    model = nn.Linear(3, 3)
    if dist.get_rank() == 1:
        model.register_buffer("mine", torch.zeros(2))
    with pytest.raises(ValueError, match=r"rank 1 has other buffers.*sync_buffers=False"):
        ShardedAdaBelief(model.parameters())
    ShardedAdaBelief(model.parameters(), sync_buffers=False)


def checkpoints_hold_one_ranks_buffers(folder: Path) -> None:
    """Statistics drift apart, as every rank sees other data; a checkpoint has those of rank 0."""
    torch.manual_seed(dist.get_rank())
    for number, kind in enumerate((ShardedAdaBelief, AdaBelief)):
        torch.manual_seed(1)
        model = Net()
        optimizer: Any = kind(model.named_parameters(), lr=0.01)
        torch.manual_seed(dist.get_rank())
        model(torch.randn(8, 3)).square().sum().backward()
        mine = everyone(buffers_of(model))
        assert not same(mine)
        run = folder / str(number)
        checkpoint.save(run, 1, model=model, optimizer=optimizer)
        saver = checkpoint.BackgroundSaver(run, model=model, optimizer=optimizer)
        saver.save(2)
        saver.close()
        for step in (1, 2):
            checkpoint.load(run, step=step, model=model, optimizer=optimizer)
            saved = {k: v for k, v in buffers_of(model).items() if k != "table"}
            assert same([saved, {k: mine[0][k] for k in saved}])
            model(torch.randn(8, 3))


# - Order


def another_order_without_names() -> None:
    def build(last: bool) -> list[nn.Parameter]:
        torch.manual_seed(0)
        a, b, c = (nn.Parameter(torch.randn(4, 4)) for _ in "abc")
        swap = last and dist.get_rank() == dist.get_world_size() - 1
        return [a, c, b] if swap else [a, b, c]

    ShardedAdaBelief(build(False))
    with pytest.raises(ValueError, match=r"ranks 0 and .* the parameters \[0, 1, 2\] in another"):
        ShardedAdaBelief(build(True))
    torch.manual_seed(dist.get_rank())  # another seed on each rank is no mistake
    ShardedAdaBelief([nn.Parameter(torch.randn(4, 4)) for _ in "abc"])


# - Groups


def groups_share_buckets(state_dtype: torch.dtype, stage: Stage) -> None:
    """Groups with other numbers are reduced and gathered together, and updated each by its own."""
    params = make_params()
    numbers = [{"lr": 0.01 * (i + 1), "weight_decay": 0.1 * (i % 3)} for i in range(8)]
    groups = [{"params": [p], **own} for p, own in zip(params, numbers, strict=True)]
    groups[2]["clip"] = False
    groups[5]["amsgrad"] = True
    options = [{**OPTIONS, **{k: v for k, v in g.items() if k != "params"}} for g in groups]
    optimizer = ShardedAdaBelief(
        groups, stage=stage, max_grad_norm=0.5, state_dtype=state_dtype, **HYPER
    )
    assert len(optimizer.layout.buckets) == 3  # all alike, unclipped, with amsgrad
    reference = Reference(make_params(), options, state_dtype=state_dtype)
    world_size = dist.get_world_size()
    for step in range(3):
        grads = [
            [make_grad(s, step, r, i) if i != step else None for i, s in enumerate(SHAPES)]
            for r in range(world_size)
        ]
        backward(params, list(grads[dist.get_rank()]))
        optimizer.step()
        reference.step([list(g) for g in grads], 0.5, world_size)
        for index, (param, right) in enumerate(zip(params, reference.low, strict=True)):
            assert torch.equal(param, right), (step, index)
        optimizer.zero_grad()
        optimizer.param_groups[4]["lr"] = 0.3  # a schedule
        reference.options[4]["lr"] = 0.3


def clipped_by_value(stage: Stage) -> None:
    """As `clip_grad_value_` does to the mean gradient, which all ranks have in one process."""
    params, single = make_params(), make_params()
    optimizer = ShardedAdaBelief(
        params, bucket_bytes=600, stage=stage, max_grad_value=0.05, **HYPER
    )
    alone = AdaBelief(single, **HYPER)
    world_size = dist.get_world_size()
    for step in range(3):
        grads = [
            [make_grad(s, step, r, i) for i, s in enumerate(SHAPES)] for r in range(world_size)
        ]
        backward(params, list(grads[dist.get_rank()]))
        for param, *each in zip(single, *grads, strict=True):
            param.grad = torch.stack(each).sum(0) / world_size
        norm = nn.utils.get_total_norm([p.grad for p in single])  # type: ignore[misc]
        nn.utils.clip_grad_value_(single, 0.05)
        optimizer.step()
        alone.step()
        optimizer.zero_grad()
        torch.testing.assert_close(optimizer.grad_norm.float(), norm)
        for param, right in zip(params, single, strict=True):
            # Sums in another order, and the limit is rounded before the mean is taken.
            torch.testing.assert_close(param, right, rtol=1e-5, atol=1e-5)


# - Edits by hand


def append(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(3)))


def replace(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(3, 3))


def remove(optimizer: Any) -> None:
    del optimizer.param_groups[0]["params"][1]


def swap(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].reverse()


def move(optimizer: Any) -> None:
    optimizer.param_groups.append({"params": [nn.Parameter(torch.ones(1))]})


def reset(optimizer: Any) -> None:
    optimizer.state = defaultdict(dict)


def clear(optimizer: Any) -> None:
    optimizer.state.clear()


def replace_one(optimizer: Any) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][1]] = {}


def edits_by_hand(edit: Callable[[Any], None]) -> None:
    model = nn.Linear(3, 3)
    optimizer = ShardedAdaBelief(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    before = [param.detach().clone() for param in model.parameters()]
    edit(optimizer)
    with pytest.raises(ValueError, match=r"were edited|was edited"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


# - Time limits


def limits_come_from_the_group() -> None:
    """Half the process group's limit is the optimizer's, and its error says who is late."""
    ranks = list(range(dist.get_world_size()))
    group = dist.new_group(ranks, timeout=timedelta(seconds=2))
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    optimizer = ShardedAdaBelief(model.parameters(), process_group=group, bucket_bytes=300)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    optimizer.wait_pending()
    dist.barrier()
    begin = time.monotonic()
    if dist.get_rank() != 1:  # which is late
        with pytest.raises(CommunicationError) as caught:
            model(torch.ones(1, 8)).sum().backward()
        assert 0.8 < time.monotonic() - begin < 20
        said = str(caught.value)
        assert re.match(rf"rank {dist.get_rank()} of .*, summing the gradients of bucket \d+", said)
        assert re.search(r"rank 1 \(process \d+\) has not come with its gradients", said), said
    else:
        time.sleep(4)
    dist.barrier()


# - Readers that torch.func makes


def transforms_wait_for_parameters() -> None:
    model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(6)])
    optimizer = ShardedAdaBelief(model.parameters(), lr=0.01, bucket_bytes=1 << 17)
    readers: list[Callable[[dict[str, Tensor]], dict[str, Tensor]]] = [
        torch.func.grad(lambda ps: sum(p.square().sum() / 2 for p in ps.values())),
        torch.func.vmap(lambda ps: {k: p.clone() for k, p in ps.items()}),
    ]
    for step in range(4):
        model(torch.ones(4, 128) * (step + dist.get_rank())).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen = readers[step % 2](dict(model.named_parameters()))
        optimizer.wait_pending()
        for name, param in model.named_parameters():
            assert torch.equal(seen[name], param), name


# - What verify says


def verify_refuses_an_outer_reducer() -> None:
    model = nn.Linear(3, 3)
    optimizer = ShardedAdaBelief(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=10)
    assert "lr 0.001 (of 0.1, by a schedule)" in str(verify(optimizer))
    around = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(NotAdaBelief, match="DistributedDataParallel is around a model"):
        verify(optimizer)
    del around, schedule
    verify(optimizer)


EDITS = [append, replace, remove, swap, move, reset, clear, replace_one]


@pytest.mark.parametrize("world_size", [3, 4])
def test_ranks_alike(world_size: int, tmp_path: Path) -> None:
    run_ranks(
        world_size,
        tmp_path,
        *(partial(ranks_begin_with_the_first_ones_buffers, stage) for stage in (1, 2)),
        other_buffers_are_refused,
        partial(checkpoints_hold_one_ranks_buffers, tmp_path / "run"),
        another_order_without_names,
        *(
            partial(groups_share_buckets, dtype, stage)
            for dtype, stage in ((torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1))
        ),
        *(partial(clipped_by_value, stage) for stage in (1, 2)),
        *(partial(edits_by_hand, edit) for edit in EDITS),
        transforms_wait_for_parameters,
        verify_refuses_an_outer_reducer,
        limits_come_from_the_group,
    )


def test_buffers_are_found_in_the_order_of_the_model() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(3)))
    found = find_buffers(list(model.parameters()))
    assert [id(each) for each in found] == [id(each) for each in model.buffers()]
    assert find_buffers([nn.Parameter(torch.ones(1))]) == []

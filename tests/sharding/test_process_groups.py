"""Which ranks shard: any process group or one dimension of a mesh; and ranks that differ in use."""

from __future__ import annotations

import random
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from belief_dist import ShardedAdaBelief, checkpoint
from belief_dist.options import DEFAULTS
from tests.harness.models import HYPER, SHAPES, make_grad, make_params, rank_order_sum
from tests.harness.ranks import run_ranks
from tests.harness.reference import Reference, backward, compare

KINDS = ("masters", "exp_avg", "exp_avg_sq")


def trains_in_its_group(process_group: Any, ranks: list[int], stage: Literal[1, 2]) -> None:
    """Equal to one process that sees the gradients of the group's ranks, and of no other."""
    params = make_params(seed=dist.get_rank())  # the group's first rank gives its own
    reference = Reference(make_params(seed=ranks[0]), [{**DEFAULTS, **HYPER}] * len(params))
    optimizer = ShardedAdaBelief(
        params, process_group=process_group, bucket_bytes=1500, stage=stage, **HYPER
    )
    for step in range(3):
        grads: list[list[torch.Tensor | None]] = [
            [make_grad(shape, step, rank, i) for i, shape in enumerate(SHAPES)] for rank in ranks
        ]
        backward(params, grads[ranks.index(dist.get_rank())])
        optimizer.step()
        reference.step(grads, None, len(ranks))
        compare(optimizer, reference, f"ranks {ranks}, stage {stage}, step {step}")
        optimizer.zero_grad()


def sub_groups() -> None:
    """Two groups of two, of which the second lists its ranks backwards."""
    groups = [dist.new_group([0, 2]), dist.new_group([3, 1])]
    for stage in (1, 2):
        mine = groups[dist.get_rank() % 2]
        trains_in_its_group(mine, dist.get_process_group_ranks(mine), stage)


def after_groups_of_some() -> None:
    """Ranks that are in different numbers of groups find each other all the same."""
    made = [dist.new_group([0, 2]), dist.new_group([2, 3])]
    before = len(dist.distributed_c10d._world.pg_names)
    trains_in_its_group(None, [0, 1, 2, 3], 1)
    if dist.get_rank() in (2, 3):
        trains_in_its_group(made[1], [2, 3], 1)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    ShardedAdaBelief(make_params(), process_group=mesh)
    assert len(dist.distributed_c10d._world.pg_names) > before


def mesh_dimension() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    first = 2 * (dist.get_rank() // 2)
    trains_in_its_group(mesh["local"], [first, first + 1], 1)
    cube = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("a", "b", "c"))
    with pytest.raises(ValueError, match=r"of 1 or 2 dimensions, got one of 3 .*\('b', 'c'\)"):
        ShardedAdaBelief(make_params(), process_group=cube)
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup, a DeviceMesh or"):
        ShardedAdaBelief(make_params(), process_group=[0, 1])


def test_any_group(tmp_path: Path) -> None:
    run_ranks(4, tmp_path, sub_groups, mesh_dimension, after_groups_of_some)


def copies_of_shards(
    shape: tuple[int, int], stage: Literal[1, 2], micro_batches: int, **options: Any
) -> None:
    """Shard inside rows or over both: sums of rows are added row by row, in this order."""
    rows, columns = shape
    rank = dist.get_rank()
    params = make_params(seed=rank)
    reference = Reference(make_params(seed=0), [{**DEFAULTS, **HYPER}] * len(params))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    optimizer = ShardedAdaBelief(
        params, process_group=mesh, bucket_bytes=1500, stage=stage, **options, **HYPER
    )
    is_whole = options.get("shard_over") == "mesh"
    assert optimizer.layout.num_shards == (4 if is_whole else columns)
    for step in range(3):
        micros = [
            [[make_grad(s, step, of, i, micro) for i, s in enumerate(SHAPES)] for of in range(4)]
            for micro in range(micro_batches)
        ]
        if stage == 1:  # micro-batches add up on each rank before anything travels
            summed = [
                [rank_order_sum([micro[of][i] for micro in micros]) for i in range(len(SHAPES))]
                for of in range(4)
            ]
            rounds = [summed]
        else:
            rounds = micros
        addends: list[list[torch.Tensor | None]] = [
            [
                rank_order_sum([grads[row * columns + c][i] for c in range(columns)])
                for i in range(len(SHAPES))
            ]
            for grads in rounds
            for row in range(rows)
        ]
        for micro, grads in enumerate(micros):
            with optimizer.no_sync() if micro + 1 < micro_batches else nullcontext():
                backward(params, [*grads[rank]])
        optimizer.step()
        reference.step(addends, options.get("max_grad_norm"), 4)
        assert optimizer.grad_norm.item() == reference.norm.item(), (shape, stage, step)
        for i, (param, value) in enumerate(zip(params, reference.low, strict=True)):
            assert torch.equal(param, value), (shape, stage, step, i)
        window = optimizer.fragment(7)
        shard = rank % columns * rows + rank // columns if is_whole else rank % columns
        assert window == optimizer.layout.fragment(7, shard)
        whole = reference.exp_avg_sq[7].view(-1)[window.in_param :][: window.numel]
        assert torch.equal(optimizer.state[params[7]]["exp_avg_sq"], whole)
        optimizer.zero_grad()


def copies_that_come_apart() -> None:
    """A rank of another row counts as a copy too, and so does its gradient that is not finite."""
    params = make_params()
    optimizer = ShardedAdaBelief(
        params, process_group=init_device_mesh("cpu", (2, 2)), bucket_bytes=1500, **HYPER
    )
    grads = [make_grad(s, 1, dist.get_rank(), i) for i, s in enumerate(SHAPES)]
    if dist.get_rank() == 3:
        grads[0][0, 0] = float("inf")
    backward(params, [*grads])
    optimizer.step()
    assert optimizer.skipped_steps == 1
    optimizer.zero_grad()
    if dist.get_rank() == 3:
        params[0].data[0, 0] += 1.0
    backward(params, [*grads])
    with pytest.raises(RuntimeError, match=r"parameter number 0 .* rank 3 differs from"):
        optimizer.step()


def test_mesh_of_two_dimensions(tmp_path: Path) -> None:
    run_ranks(
        4,
        tmp_path,
        *(
            partial(copies_of_shards, shape, stage, micro_batches, overlap=overlap)
            for shape in ((2, 2), (4, 1))
            for stage, micro_batches in ((1, 1), (1, 3), (2, 1), (2, 3))
            for overlap in (True, False)
        ),
        partial(copies_of_shards, (1, 4), 1, 1),  # nothing but a row
        partial(copies_of_shards, (2, 2), 1, 1, max_grad_norm=0.5),
        copies_that_come_apart,
    )


def a_peer_does_not_wait_for_the_script() -> None:
    """Gathers go on although some ranks stand behind a barrier, and read nothing before it."""
    mesh = init_device_mesh("cpu", (2, 2))
    params = make_params()
    optimizer = ShardedAdaBelief(
        params, process_group=mesh, shard_over="mesh", bucket_bytes=1500, **HYPER
    )
    for step in range(3):
        backward(params, [make_grad(s, step, dist.get_rank(), i) for i, s in enumerate(SHAPES)])
        optimizer.step()
        if dist.get_rank() in (0, 3):
            optimizer.wait_pending()
        dist.barrier()
        optimizer.zero_grad()


def a_mesh_that_is_none() -> None:
    for ranks in (None, init_device_mesh("cpu", (4,))):
        with pytest.raises(ValueError, match="needs a process_group that is a mesh of two"):
            ShardedAdaBelief(make_params(), process_group=ranks, shard_over="mesh")


def whole_mesh_follows_others(folder: Path) -> None:
    """Saved by shards over the whole mesh, loaded by those of a row, and the other way round."""
    mesh = init_device_mesh("cpu", (2, 2))

    def one(over: Literal["row", "mesh"], seed: int) -> tuple[list[nn.Parameter], ShardedAdaBelief]:
        params = make_params(torch.bfloat16, seed)
        named = [(f"p{i}", p) for i, p in enumerate(params)]
        return params, ShardedAdaBelief(
            named, process_group=mesh, shard_over=over, bucket_bytes=1500, stage=2, **HYPER
        )

    def step(params: list[nn.Parameter], optimizer: ShardedAdaBelief, number: int) -> None:
        grads = [make_grad(s, number, dist.get_rank(), i) for i, s in enumerate(SHAPES)]
        backward(params, [grad.bfloat16() for grad in grads])
        optimizer.step()
        optimizer.zero_grad()

    for first, second in (("row", "mesh"), ("mesh", "row")):
        params, optimizer = one(first, 0)
        step(params, optimizer, 1)
        checkpoint.save(folder / first, 1, optimizer=optimizer)
        others, other = one(second, 1)
        checkpoint.load(folder / first, optimizer=other)
        for each in (params, optimizer), (others, other):
            step(*each, 2)
        for ours, theirs in zip(params, others, strict=True):
            assert torch.equal(ours, theirs), (first, second)
        # Masters and states are those of a rank, or of a row's: 12 bytes for each element.
        held = [sum(each.bytes_per_rank()[kind] for kind in KINDS) for each in (optimizer, other)]
        small, large = sorted(held)
        assert 1.9 < large / small <= 2


def test_shards_over_a_whole_mesh(tmp_path: Path) -> None:
    over: dict[str, Any] = {"shard_over": "mesh"}
    run_ranks(
        4,
        tmp_path,
        *(
            partial(copies_of_shards, shape, stage, micro_batches, overlap=overlap, **over)
            for shape in ((2, 2), (4, 1))
            for stage, micro_batches in ((1, 1), (2, 3))
            for overlap in (True, False)
        ),
        partial(copies_of_shards, (2, 2), 1, 1, max_grad_norm=0.5, **over),
        partial(copies_of_shards, (2, 2), 1, 1, shared_memory=False, **over),
        partial(copies_of_shards, (2, 2), 2, 3, offload="cpu", **over),
        a_peer_does_not_wait_for_the_script,
        a_mesh_that_is_none,
        partial(whole_mesh_follows_others, tmp_path),
    )


def used_at_random(stage: Literal[1, 2], seeds: range) -> None:
    """Like a mixture of experts: every rank draws which parameters its backward reaches."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    params = make_params()
    reference = Reference(make_params(), [{**DEFAULTS, **HYPER}] * len(params))
    optimizer = ShardedAdaBelief(params, bucket_bytes=1500, stage=stage, **HYPER)
    for seed in seeds:
        draw = random.Random(seed)
        share = draw.choice((0.1, 0.5, 0.9))
        grads: list[list[torch.Tensor | None]] = [
            [
                make_grad(shape, seed, of, i) if draw.random() < share else None
                for i, shape in enumerate(SHAPES)
            ]
            for of in range(world_size)
        ]
        if any(grad is not None for grad in grads[rank]):  # else this rank runs no backward
            backward(params, grads[rank])
        optimizer.step()
        reference.step(grads, None, world_size)
        compare(optimizer, reference, f"W={world_size}, stage {stage}, seed {seed}")
        optimizer.zero_grad()


@pytest.mark.parametrize("world_size", [3, 4])
def test_ranks_use_different_parameters(world_size: int, tmp_path: Path) -> None:
    """No hang (a lost message would end in a timeout) and the right result, for 200 draws."""
    run_ranks(
        world_size,
        tmp_path,
        partial(used_at_random, 1, range(100)),
        partial(used_at_random, 2, range(100, 200)),
    )

"""Which ranks shard: any process group or one dimension of a mesh; and ranks that differ in use."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from belief_dist import ShardedAdaBelief
from belief_dist.options import DEFAULTS
from models import HYPER, SHAPES, make_grad, make_params
from ranks import run_ranks
from reference import Reference, backward, compare


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


def mesh_dimension() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    first = 2 * (dist.get_rank() // 2)
    trains_in_its_group(mesh["local"], [first, first + 1], 1)
    with pytest.raises(ValueError, match=r"of 1 dimension, got one of 2 .*mesh\['local'\]"):
        ShardedAdaBelief(make_params(), process_group=mesh)
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup, a DeviceMesh or"):
        ShardedAdaBelief(make_params(), process_group=[0, 1])


def test_any_group(tmp_path: Path) -> None:
    run_ranks(4, tmp_path, sub_groups, mesh_dimension)


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

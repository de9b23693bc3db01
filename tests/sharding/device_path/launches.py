"""How many launches a step takes on a GPU: the formula of docs/gpu.md, to the last one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from belief_dist import ShardedAdaBelief
from belief_dist.sharding import engine
from benchmarks.gpu.one_of_eight import alone
from tests.harness.device_path import Watch

ELEMENTS = 25_600  # of ten parameters, whole blocks of 8-bit states


def formula(
    optimizer: ShardedAdaBelief,
    *,
    stage: int = 1,
    check_replicas: bool = True,
    check_states: bool = False,
    spike_guard: float | None = None,
    max_grad_value: float | None = None,
    reduce_dtype: torch.dtype | None = None,
    turns: int = 1,
    **others: Any,
) -> int:
    """Return the launches of backward, `step` and `zero_grad`, as docs/gpu.md has them."""
    buckets = optimizer._engine.buckets
    b, several = len(buckets), optimizer.comm.world_size > 1
    clips = [group["clip"] for group in optimizer.param_groups]
    padded = sum(bool(each.gaps) for each in buckets) if stage == 2 else 0
    # Of each dtype, clipped or not; where there are several, their scalars are copied.
    kinds: dict[tuple[bool, str], set[int]] = {}
    for spec in optimizer.layout.params:
        kinds.setdefault((clips[spec.group], spec.dtype), set()).add(spec.group)
    groups = len(kinds) + sum(len(each) > 1 for each in kinds.values())
    in_place = stage == 1 and reduce_dtype is None
    if max_grad_value is not None:
        in_place &= buckets[0].flat_param.dtype == torch.float32
    squares = len({(clips[each.bucket.group], each.flat_param.dtype) for each in buckets})
    updates = groups * turns  # in these tests, every turn has every group
    total = 4 * b + updates + 41 if several else b + groups + 7 + (squares if in_place else b)
    total += padded
    total += 2 if several and check_replicas else 0
    if check_states:
        total += 46 if several else 44
    if spike_guard is not None:
        total += 29 if several else 27
    total += 3 if not all(clips) else 0
    if any(each.has_master for each in buckets):
        total += 8 if several else 9
    total += 2 + 3 * b if max_grad_value is not None else 0
    total += b if reduce_dtype is not None else 0
    return total


def launches(
    params: int,
    buckets: int,
    ranks: int,
    *,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    clip_all: bool = True,
    turns: int = 1,
    **options: Any,
) -> tuple[int, int, Watch]:
    """Return the launches of a step after some others, what the formula says, and what was seen.

    There are about as many `buckets`.
    """
    numel, each = ELEMENTS // params, params // groups
    with alone(ranks) if ranks > 1 else nullcontext(), Watch(computes=False) as watch:
        tensors = [nn.Parameter(torch.zeros(numel, dtype=dtype)) for _ in range(params)]
        named = [(f"p{index}", param) for index, param in enumerate(tensors)]
        optimizer = ShardedAdaBelief(
            [
                {"params": named[start : start + each], "clip": clip_all or start > 0}
                for start in range(0, params, each)
            ],
            bucket_bytes=numel * params * dtype.itemsize // buckets,
            **options,
        )
        grads = [torch.zeros_like(param) for param in tensors]
        for number in range(3):
            watch.refuses = number >= 2
            watch.next_step()
            torch.autograd.backward(tensors, grads)
            optimizer.step()
            optimizer.zero_grad()
    return watch.total, formula(optimizer, turns=turns, **options), watch


CHOICES: list[dict[str, Any]] = [
    {},
    {"max_grad_norm": 1.0},
    {"check_replicas": False},
    {"check_states": True},
    {"check_states": True, "dtype": torch.bfloat16},
    {"spike_guard": 2.0},
    {"overlap": False},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "master": "remainder"},
    {"dtype": torch.bfloat16, "state_dtype": torch.uint8},
    {"groups": 2},
    {"groups": 5, "dtype": torch.bfloat16},
    {"groups": 2, "clip_all": False},
    {"max_grad_value": 1.0},
    {"reduce_dtype": torch.bfloat16},
    {"ema_decay": 0.9},
    {"ema_decay": 0.9, "ema_dtype": torch.bfloat16, "dtype": torch.bfloat16},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("ranks", [1, 8])
def test_launches_are_those_of_the_formula(ranks: int, stage: int, choice: dict[str, Any]) -> None:
    for buckets in (2, 10):
        found, expected, watch = launches(10, buckets, ranks, stage=stage, **choice)
        assert found == expected, (buckets, sorted(watch.places.items()))


@pytest.mark.parametrize("buckets_at_once", [1, 2, 3])
def test_large_shards_are_updated_in_several_launches(
    monkeypatch: pytest.MonkeyPatch, buckets_at_once: int
) -> None:
    """So that the first ones are on their way while the others are updated."""
    monkeypatch.setattr(engine, "_TURN", buckets_at_once * ELEMENTS // 10 // 8)
    found, expected, watch = launches(10, 10, 8, turns=-(-10 // buckets_at_once))
    assert found == expected, sorted(watch.places.items())


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("ranks", [1, 8])
def test_the_number_of_parameters_does_not_matter(ranks: int, stage: int) -> None:
    few, expected, _ = launches(10, 5, ranks, stage=stage)
    many, with_padding, watch = launches(400, 5, ranks, stage=stage)
    assert few == expected
    assert many == with_padding, sorted(watch.places.items())
    assert with_padding - expected in (0, 5)  # a fill for each bucket that has padding

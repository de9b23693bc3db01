"""The layout: every element is owned exactly once, aligned and padded as designed."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from belief_dist.sharding.layout import (
    PARAM_ALIGN_BYTES,
    SHARD_ALIGN_BYTES,
    ParamSpec,
    plan_layout,
)

ITEMSIZE = {"float32": 4, "float64": 8, "bfloat16": 2}

shapes = st.one_of(
    st.just(()),  # scalar
    st.lists(st.integers(0, 70), min_size=1, max_size=3).map(tuple),
    st.just((2**33 + 1, 7)),  # huge: nothing is allocated
)


@st.composite
def specs(draw: st.DrawFn) -> list[ParamSpec]:
    """Parameters of several shapes, dtypes and groups."""
    drawn = draw(
        st.lists(
            st.tuples(shapes, st.sampled_from(sorted(ITEMSIZE)), st.integers(0, 2)),
            min_size=1,
            max_size=12,
        )
    )
    return [
        ParamSpec(f"p{i}", shape, dtype, ITEMSIZE[dtype], group)
        for i, (shape, dtype, group) in enumerate(drawn)
    ]


@given(specs(), st.integers(1, 9), st.sampled_from([1, 1000, 10**6, 2**62]))
@settings(max_examples=300, deadline=None)
def test_every_element_has_one_owner(
    params: list[ParamSpec], world_size: int, bucket_bytes: int
) -> None:
    layout = plan_layout(params, world_size, bucket_bytes)
    for index, param in enumerate(params):
        parts = [layout.fragment(index, rank) for rank in range(world_size)]
        owned = sorted((part.in_param, part.in_param + part.numel) for part in parts if part.numel)
        # Half-open ranges that follow each other from 0 to numel: all elements, none twice.
        edges = [0, *(stop for _, stop in owned)]
        assert [start for start, _ in owned] == edges[:-1]
        assert edges[-1] == param.numel
        for rank, part in enumerate(parts):
            if part.numel:
                start, stop = layout.buckets[part.bucket].shard_range(rank)
                assert part.in_bucket == start + part.in_shard
                assert part.in_bucket + part.numel <= stop


@given(specs(), st.integers(1, 9), st.sampled_from([1, 1000, 10**6]))
@settings(max_examples=300, deadline=None)
def test_alignment_and_padding(params: list[ParamSpec], world_size: int, bucket_bytes: int) -> None:
    layout = plan_layout(params, world_size, bucket_bytes)
    placed = [slot.param for bucket in layout.buckets for slot in bucket.slots]
    assert sorted(placed) == list(range(len(params)))
    for bucket in layout.buckets:
        assert bucket.numel == bucket.shard_numel * world_size
        assert bucket.shard_numel * bucket.itemsize % SHARD_ALIGN_BYTES == 0
        members = [params[slot.param] for slot in bucket.slots]
        assert {p.dtype for p in members} == {bucket.dtype}
        assert bucket.group == members[0].group
        order = [slot.param for slot in bucket.slots]
        assert order == sorted(order, reverse=True)  # as backward reaches them
        end = 0
        for slot, param in zip(bucket.slots, members, strict=True):
            assert slot.start * bucket.itemsize % PARAM_ALIGN_BYTES == 0
            assert slot.stop - slot.start == param.numel
            assert 0 <= slot.start - end < PARAM_ALIGN_BYTES  # no gap but alignment
            end = slot.stop
        assert bucket.numel - end < world_size * SHARD_ALIGN_BYTES // bucket.itemsize + world_size
        if len(bucket.slots) > 1:
            assert end * bucket.itemsize <= bucket_bytes


def test_bucket_size_changes_the_cut_and_nothing_else() -> None:
    params = [ParamSpec(f"p{i}", (100,), "float32", 4, 0) for i in range(10)]
    assert len(plan_layout(params, 2, 1).buckets) == 10
    assert len(plan_layout(params, 2, 1200).buckets) == 4
    assert len(plan_layout(params, 2, 10**6).buckets) == 1


def test_fingerprint_tells_layouts_apart() -> None:
    a = ParamSpec("a", (3, 4), "float32", 4, 0)
    b = ParamSpec("b", (4, 3), "float32", 4, 0)
    same = {plan_layout([a, b], 2, 100).fingerprint() for _ in range(2)}
    assert len(same) == 1
    others = [
        plan_layout([b, a], 2, 100),
        plan_layout([a, b], 3, 100),
        plan_layout([a, b], 2, 10),
        plan_layout([a], 2, 100),
    ]
    assert len({layout.fingerprint() for layout in others} | same) == 5


@pytest.mark.parametrize("world_size, bucket_bytes", [(0, 1), (-1, 1), (1, 0)])
def test_refuses_nonsense(world_size: int, bucket_bytes: int) -> None:
    with pytest.raises(ValueError, match="must be >= 1, got"):
        plan_layout([], world_size, bucket_bytes)


def test_plans_100_billion_parameters_on_1024_ranks() -> None:
    """Pure arithmetic: about a second would be acceptable, nothing is allocated."""
    d, layers = 12288, 56
    block = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d), (d,), (d,), (3 * d,), (4 * d,)]
    params = [
        ParamSpec(f"layers.{layer}.{i}", shape, "bfloat16", 2, int(len(shape) == 1))
        for layer in range(layers)
        for i, shape in enumerate(block)
    ]
    assert sum(math.prod(p.shape) for p in params) > 100e9
    begin = time.perf_counter()
    layout = plan_layout(params, 1024, 256 << 20)
    elapsed = time.perf_counter() - begin
    assert layout.fragment(0, 1023).numel >= 0
    assert elapsed < 5.0  # seconds; it takes a few milliseconds, this allows for a busy machine

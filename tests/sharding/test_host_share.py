"""Which buckets `offload` takes to the host."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from belief_dist import ShardedAdaBelief
from belief_dist.sharding.host_share import check_parts, choose_on_host
from tests.harness.models import make_params

pytestmark = pytest.mark.filterwarnings("ignore:offload=.* updates on 1 thread")

sizes = st.lists(st.integers(0, 10**9), min_size=1, max_size=12)
fractions = st.floats(0, 1, exclude_min=True)


def chosen(sizes: list[int], offload: str | float | None) -> list[bool]:
    return choose_on_host(sizes, offload, sets=[0] * len(sizes), kept=[None] * len(sizes))


@given(sizes, fractions, fractions)
def test_it_is_the_first_buckets_and_no_more_than_asked_for(
    sizes: list[int], one: float, other: float
) -> None:
    small, large = (chosen(sizes, part) for part in sorted((one, other)))
    assert small == sorted(small, reverse=True)  # a beginning
    assert all(b or not a for a, b in zip(small, large, strict=True))  # a part of the larger one
    moved = sum(size for size, goes in zip(sizes, large, strict=True) if goes)
    # Within a rounding error of the fraction's product.
    assert moved >= max(one, other) * sum(sizes) - 1e-6
    count = sum(large)
    assert count == 0 or sum(sizes[: count - 1]) < max(one, other) * sum(sizes)


@given(sizes, st.integers(2, 10**10))
def test_bytes_leave_the_device(sizes: list[int], wanted: int) -> None:
    moved = sum(size for size, goes in zip(sizes, chosen(sizes, wanted), strict=True) if goes)
    assert moved >= min(wanted, sum(sizes)) - 1e-3  # see above
    assert all(chosen(sizes, "cpu")) and not any(chosen(sizes, None))


@given(sizes, sizes, fractions)
def test_ranks_that_share_a_bucket_agree(mine: list[int], common: list[int], part: float) -> None:
    """Whatever other buckets each of them has."""
    for own in (mine, mine[:1], []):
        found = choose_on_host(
            [*own, *common],
            part,
            sets=[0] * len(own) + [1] * len(common),
            kept=[None] * (len(own) + len(common)),
        )
        assert found[len(own) :] == chosen(common, part)


def test_buckets_stay_where_they_are_when_parameters_come() -> None:
    found = choose_on_host([8, 8, 8, 8], 0.5, sets=[0] * 4, kept=[None, None, True, False])
    assert found == [True, False, True, False]
    found = choose_on_host([8, 8, 8, 8], 0.5, sets=[0] * 4, kept=[None, True, True, False])
    assert found == [False, True, True, False]


def test_added_parameters_are_offloaded_too() -> None:
    first, *others = make_params()
    optimizer = ShardedAdaBelief([first], offload=0.9, bucket_bytes=1)
    optimizer.add_param_group({"params": others})
    places = [bucket.on_host for bucket in optimizer._engine.buckets]
    assert places[-1] and any(places[:-1])
    for param in (first, *others):
        param.grad = torch.ones_like(param)
    optimizer.step()


def test_stages_of_a_pipeline_take_fractions_only() -> None:
    check_parts(0.5, is_pipeline=True)
    check_parts(500, is_pipeline=False)
    with pytest.raises(ValueError, match=r"offload=500 bytes .* such as offload=0.5"):
        check_parts(500, is_pipeline=True)

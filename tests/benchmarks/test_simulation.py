"""The simulation of a step agrees with what can be said by hand, and never promises too much."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from belief_dist.sharding.layout import Layout, ParamSpec, plan_layout
from benchmarks.forecast import Cluster, best, plan_at_scale
from benchmarks.record import record_profile
from benchmarks.simulation import Device, Network, Profile, lower_bound, predict
from benchmarks.team import Workload

INSTANT = Device(sum_bandwidth=1e30, update_rate=1e30, check_bandwidth=1e30)


def layout_of(numels: list[int], ranks: int, bucket_bytes: int = 1) -> Layout:
    """Return a layout of float32 vectors; one bucket each, unless `bucket_bytes` says otherwise."""
    specs = [ParamSpec(str(i), (numel,), "float32", 4, 0) for i, numel in enumerate(numels)]
    return plan_layout(specs, ranks, bucket_bytes)


def even_profile(count: int, forward: float, backward: float) -> Profile:
    """Return a profile in which layers take equal times, and backward goes the other way."""
    needed = tuple(forward * i / count for i in range(count))
    ready = tuple(backward * (count - i) / count for i in range(count))
    return Profile(forward, backward, needed, ready)


def test_one_bucket_by_hand() -> None:
    # 1,024 float32 on 4 ranks: three quarters leave each rank, in three messages.
    layout, profile = layout_of([1024], 4), Profile(1.0, 2.0, (0.25,), (2.0,))
    step = predict(layout, profile, Network(0.5, 1024.0), INSTANT)
    exchange = 3 * 0.5 + 4096 * 3 / 4 / 1024
    message = 2 * 2 * 0.5  # to the root and back, in a tree of four
    assert step.backward == 2.0
    assert step.step == pytest.approx(exchange + message)
    assert step.forward == pytest.approx(1.0 + exchange - 0.25)
    late = predict(layout, profile, Network(0.5, 1024.0), INSTANT, overlap=False)
    assert (late.forward, late.backward) == (1.0, 2.0)
    assert late.step == pytest.approx(2 * exchange + message)


def test_what_is_fast_enough_is_hidden() -> None:
    layout, profile = layout_of([1024] * 10, 4), even_profile(10, 1.0, 2.0)
    network = Network(0.0, 4096 * 3 / 4 / 0.1)  # a tenth of a second for every bucket
    step = predict(layout, profile, network, INSTANT)
    # The last reduction and the first gather have nothing to hide behind.
    assert step.total - step.compute == pytest.approx(0.2)
    assert predict(layout, profile, network, INSTANT, overlap=False).exposed == pytest.approx(2.0)


def test_a_third_reduction_waits_for_the_first() -> None:
    layout = layout_of([1024] * 3, 2)
    profile = Profile(1.0, 1.0, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    network = Network(0.0, 2048.0)  # a second for every bucket
    assert predict(layout, profile, network, INSTANT).backward == pytest.approx(2.0)


@settings(max_examples=200, deadline=None)
@given(
    numels=st.lists(st.integers(1, 10**6), min_size=1, max_size=30),
    ranks=st.integers(2, 64),
    bucket_bytes=st.integers(1, 10**7),
    bandwidth=st.floats(1e5, 1e10),
    latency=st.floats(0, 1e-2),
    overlap=st.booleans(),
)
def test_never_below_the_bound_and_never_faster_on_a_worse_link(
    numels: list[int],
    ranks: int,
    bucket_bytes: int,
    bandwidth: float,
    latency: float,
    overlap: bool,
) -> None:
    layout, profile = layout_of(numels, ranks, bucket_bytes), even_profile(len(numels), 0.1, 0.2)
    network = Network(latency, bandwidth)
    step = predict(layout, profile, network, INSTANT, overlap=overlap)
    rounding = 1e-9 * step.total
    assert step.exposed >= lower_bound(layout, profile, network) - rounding
    slower = predict(layout, profile, Network(latency, bandwidth / 2), INSTANT, overlap=overlap)
    assert slower.total >= step.total - rounding
    if overlap:
        late = predict(layout, profile, network, INSTANT, overlap=False)
        assert step.total <= late.total + rounding


def test_a_recorded_backward_reaches_the_last_layer_first() -> None:
    work = Workload(1, 1, 6, 64, 1, 64, "float32")
    profile = record_profile(work)
    names = [name for name, _ in work.model().named_parameters()]
    blocks = [[i for i, name in enumerate(names) if f"blocks.{b}." in name] for b in range(6)]
    ready = [max(profile.ready[i] for i in block) for block in blocks]
    needed = [min(profile.needed[i] for i in block) for block in blocks]
    assert ready == sorted(ready, reverse=True) and needed == sorted(needed)
    assert 0 < ready[-1] < ready[0] <= profile.backward
    assert 0 < needed[0] < needed[-1] < profile.forward
    twice = profile.scaled(2 * profile.forward, profile.backward)
    assert twice.needed[-1] == pytest.approx(2 * profile.needed[-1])
    assert twice.ready == pytest.approx(profile.ready)


@pytest.mark.parametrize("ranks, rows", [(1024, 1), (16384, 1), (16384, 16)])
def test_a_hundred_billion_parameters_on_thousands_of_ranks(ranks: int, rows: int) -> None:
    plans = [plan_at_scale(80, 10240, ranks, rows, mib, 8192, Cluster()) for mib in (512, 2048)]
    for plan in plans:
        assert 0 < plan.padding < 0.003
        assert plan.step.exposed > 0
    assert plans[0].buckets > plans[1].buckets > 100
    # So many ranks send so many messages that only large buckets are worth them.
    assert best(plans).bucket_mib == 2048

"""What a step costs in Python, counted in calls and not in seconds."""

from __future__ import annotations

import sys
from types import FrameType
from unittest import mock

import pytest

from belief_dist import kernels, replacement_warning
from benchmarks.overhead import settle, sharded_step


def calls(count: int, world_size: int, stage: int) -> int:
    """Return how many Python functions a step calls on `count` parameters."""
    total = 0

    def on_event(frame: FrameType, event: str, argument: object) -> None:
        nonlocal total
        total += event == "call" and "belief_dist" in frame.f_code.co_filename

    with (
        mock.patch.object(kernels, "update_", lambda *_, **__: None),
        # Optimizers of earlier tests that have not stepped: they are looked for in ten steps.
        mock.patch.object(replacement_warning, "_unstepped", []),
    ):
        train = sharded_step(count, world_size, stage)
        for _ in range(2):  # the first step agrees on an order of buckets
            list(train())
        sys.setprofile(on_event)
        try:
            list(train())
        finally:
            sys.setprofile(None)
        settle(train)
    return total


@pytest.mark.parametrize("stage", [1, 2])
def test_calls_per_parameter_are_few_and_do_not_depend_on_the_ranks(stage: int) -> None:
    few, many, wide = calls(500, 4, stage), calls(1500, 4, stage), calls(1500, 1024, stage)
    # The hook, what it counts, what it takes and the gradient of this rank; at stage 2 also the
    # place in a recycled buffer. Nothing else calls a function for every parameter.
    assert (many - few) / 1000 <= {1: 4.0, 2: 5.0}[stage]
    assert few - 500 * (many - few) / 1000 < 250
    assert abs(wide - many) < 10

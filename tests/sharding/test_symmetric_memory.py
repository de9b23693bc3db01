"""GPUs that read each other's memory, proven without one: see symmetric_memory_interpreted.py."""

from __future__ import annotations

from tests.harness.interpreter import run_interpreted


def test_ranks_read_each_others_memory() -> None:
    run_interpreted("tests/sharding/symmetric_memory_interpreted.py")

"""What a step does on a GPU, proven on a CPU: launches, waits, late verdicts and CUDA graphs."""

from __future__ import annotations

from tests.harness.interpreter import run_interpreted

FILES = ("launches", "waits", "verdicts", "graphs")


def test_the_device_path() -> None:
    run_interpreted(*(f"tests/sharding/device_path/{name}.py" for name in FILES))

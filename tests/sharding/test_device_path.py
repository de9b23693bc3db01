"""What a step does on a GPU, proven on a CPU: launches, waits, late verdicts and CUDA graphs."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.harness.paths import ROOT

FILES = ("launches", "waits", "verdicts", "graphs")


def test_the_device_path() -> None:
    """In a process of its own: Triton decides on import whether it compiles or interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        + [f"tests/sharding/device_path/{name}.py" for name in FILES],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "BELIEF_DIST_BACKEND": "triton"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:]

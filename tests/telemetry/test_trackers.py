"""Weights & Biases and MLflow, each in a process that has it: see trackers_installed.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.harness.installed import installed
from tests.harness.paths import ROOT


@pytest.mark.parametrize("tracker", ["wandb==0.31.0", "mlflow-skinny==3.17.2"])
def test_a_run_is_written_offline(tracker: str) -> None:
    name = tracker.split("==")[0].split("-")[0]
    path = f"{installed(tracker)}{os.pathsep}{ROOT}"
    file = "tests/telemetry/trackers_installed.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", name],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]

"""The GAN example as users start it, on two ranks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from benchmarks.jobs import run_job
from tests.harness.paths import BIN, ROOT


@pytest.mark.parametrize("stage", [1, 2])
def test_the_distance_falls(stage: int, tmp_path: Path) -> None:
    command = [BIN / "torchrun", "--standalone", "--nproc-per-node", 2, ROOT / "examples/gan.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = run_job([*command, "--steps", 60, "--stage", stage], tmp_path, environment, 120)
    assert done.returncode == 0, done.stdout
    distances = [float(each) for each in re.findall(r"distance (\S+)", done.stdout)]
    assert len(distances) == 10
    # The critic first learns to tell them apart, then the generator catches up.
    assert 0 < distances[-1] < max(distances) / 2

"""The GAN example, on two ranks."""

from __future__ import annotations

import re
from pathlib import Path

from tests.harness.forked import PRELOADED, Job, run_all_forked
from tests.harness.paths import ROOT

STAGES = (1, 2)


def test_the_distance_falls(tmp_path: Path) -> None:
    jobs = [Job(2, ["--steps", 60, "--stage", stage]) for stage in STAGES]
    modules = [*PRELOADED, "sklearn.datasets"]
    for said in run_all_forked(ROOT / "examples" / "gan.py", tmp_path, jobs, preloaded=modules):
        distances = [float(each) for each in re.findall(r"distance (\S+)", said)]
        assert len(distances) == 10
        # The critic first learns to tell them apart, then the generator catches up.
        assert 0 < distances[-1] < max(distances) / 2

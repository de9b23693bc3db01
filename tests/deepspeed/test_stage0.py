"""ShardedAdaBelief in DeepSpeed's engine, see `stage0_job.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stage0_job import PARTS
from tests.harness.forked import PRELOADED, Job, run_all_forked
from tests.harness.launch import launch

JOB = Path(__file__).with_name("stage0_job.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return where each part finds what the one before has saved."""
    return tmp_path_factory.mktemp("sharded")


# Three ranks train every case and save, under the launcher.
def test_engine(folder: Path) -> None:
    """Every rank has run every case of the part, which asserts by itself."""
    launch(folder, "train", job=[JOB], world_size=3)
    assert_ran_everything(folder, "train", 3)


def test_engine_of_another_number_of_ranks(folder: Path) -> None:
    """Two resume what three have saved, and save; three resume theirs."""
    without_deepspeed = [name for name in PRELOADED if name != "deepspeed"]
    jobs = [Job(2, [folder, "resume"]), Job(3, [folder, "back"])]
    run_all_forked(JOB, folder, jobs, preloaded=without_deepspeed)
    assert_ran_everything(folder, "resume", 2)
    assert_ran_everything(folder, "back", 3)


def assert_ran_everything(folder: Path, part: str, world_size: int) -> None:
    for rank in range(world_size):
        done = json.loads((folder / f"{part}.{rank}.json").read_text())
        assert done == [case.__name__ for case in PARTS[part]]

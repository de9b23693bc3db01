"""ShardedAdaBelief in DeepSpeed's engine, under its launcher; see `stage0_job.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stage0_job import PARTS
from tests.harness.launch import launch

JOB = Path(__file__).with_name("stage0_job.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return where each part finds what the one before has saved."""
    return tmp_path_factory.mktemp("sharded")


# Three ranks train every case and save; two resume that and save; three resume theirs.
@pytest.mark.parametrize(("part", "world_size"), [("train", 3), ("resume", 2), ("back", 3)])
def test_engine(folder: Path, part: str, world_size: int) -> None:
    """Every rank has run every case of the part, which asserts by itself."""
    launch(folder, part, job=[JOB], world_size=world_size)
    for rank in range(world_size):
        done = json.loads((folder / f"{part}.{rank}.json").read_text())
        assert done == [case.__name__ for case in PARTS[part]]

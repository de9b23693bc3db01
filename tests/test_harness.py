"""What tests stand on: a failing rank says what it ran, and every rank begins afresh."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.harness import lanes
from tests.harness.forked import Job, run_forked
from tests.harness.paths import ROOT
from tests.harness.ranks import describe, run_ranks


def fails_on(rank: int, values: list[int], **more: object) -> None:
    assert dist.get_rank() != rank, "as it shall"


def begins_afresh(variable: str) -> None:
    """The process that this one is a fork of has no thread that would be lost."""
    assert os.environ["BELIEF_DIST_TEST"] == variable
    status = Path(f"/proc/{os.getppid()}/status").read_text()
    assert "\nThreads:\t1\n" in status
    assert not hasattr(torch, "belief_dist_test")
    torch.belief_dist_test = True


def test_a_failing_rank_says_with_what_arguments(tmp_path: Path) -> None:
    case = partial(fails_on, 1, list(range(1000)), dtype=torch.bfloat16, options={"amsgrad": True})
    with pytest.raises(Exception) as caught:
        run_ranks(3, tmp_path, partial(fails_on, -1, []), case)
    said = str(caught.value)
    assert (
        "rank 1, fails_on(1, [0, 1, 2, 3, 4, 5, 6, 7, ...], dtype=torch.bfloat16, "
        "options={'amsgrad': True}):\nTraceback"
    ) in said
    assert "as it shall" in said


def test_a_case_is_described_in_a_line() -> None:
    assert describe(begins_afresh) == "begins_afresh"
    nested = partial(partial(fails_on, 7), text="x" * 1000)
    assert describe(nested).startswith("fails_on(7, text='xxx")
    assert len(describe(nested)) < 150


def test_every_rank_begins_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("first", "second"):
        monkeypatch.setenv("BELIEF_DIST_TEST", value)
        run_ranks(2, tmp_path, partial(begins_afresh, value))


FORK = """
import os, sys, time, torch
rank, what = int(os.environ.get("RANK", -1)), sys.argv[1]
assert "belief_dist" not in sys.modules and not hasattr(torch, "belief_dist_test")
torch.belief_dist_test = True
print(what, rank, os.environ.get("WORLD_SIZE"))
if what == "refused":
    sys.exit("as it shall")
if what == "fails":
    assert rank != 1, "as it shall"
    time.sleep(600)
"""


def test_forks_are_new_processes_and_one_that_fails_ends_its_job(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(FORK)
    asked = [Job(1, ["alone"]), Job(3, ["fails"]), Job(1, ["refused"]), Job(2, ["last"])]
    alone, fails, refused, last = run_forked(script, tmp_path, asked, preloaded=["torch"])
    assert (alone.returncode, alone.stdout) == (0, "alone -1 None\n")
    assert fails.returncode == 1 and "AssertionError: as it shall" in fails.stderr
    assert refused.returncode == 1 and refused.stderr == "as it shall\n"
    assert last.returncode == 0
    assert sorted(last.stdout.splitlines()) == ["last 0 2", "last 1 2"]


def test_long_files_are_there() -> None:
    files = [*lanes.WAITING, *lanes.LONG]
    assert [path for path in files if not (ROOT / "tests" / path).is_file()] == []
    assert len(set(files)) == len(files)

"""The mpi4py backend in real MPI jobs of 2 to 4 processes, alone and beside gloo.

The MPI library is the one that mpi4py loads.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from benchmarks.jobs import run_job
from benchmarks.mpi_launch import find_launcher
from tests.harness.paths import ROOT

pytest.importorskip("mpi4py")
try:
    LAUNCHER = find_launcher()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)

JOB = Path(__file__).parent / "mpi_job.py"


def mpiexec(ranks: int, *arguments: object) -> tuple[int, str]:
    command = LAUNCHER.command(ranks, JOB, *arguments)
    environment = {**LAUNCHER.environment, "PYTHONPATH": str(ROOT)}
    done = run_job(command, Path.cwd(), environment, seconds=280)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "ranks, default", [(2, "mpi4py"), (3, "mpi4py"), (4, "mpi4py"), (3, "gloo")]
)
def test_every_operation_and_training(ranks: int, default: str, tmp_path: Path) -> None:
    code, output = mpiexec(ranks, default, tmp_path, 13)
    assert code == 0, output
    assert len(re.findall("has passed", output)) == ranks


def test_a_stopped_rank_is_an_error_within_the_timeout(tmp_path: Path) -> None:
    code, output = mpiexec(3, "SIGSTOP", tmp_path)
    assert code != 0
    assert output.count("has seen it") == 2, output


def test_a_killed_rank_ends_the_job(tmp_path: Path) -> None:
    code, output = mpiexec(3, "SIGKILL", tmp_path)
    assert code != 0
    assert re.search(r"signal:? 9\b", output, re.IGNORECASE), output


@pytest.mark.skipif(LAUNCHER.is_open_mpi, reason="Open MPI starts without waiting for others")
def test_mpi_that_cannot_start_ends_the_job(tmp_path: Path) -> None:
    code, output = mpiexec(3, "start_without_a_rank", tmp_path)
    assert code != 0
    assert "in _start_mpi" in output


def test_a_group_that_cannot_be_made_ends_the_job(tmp_path: Path) -> None:
    code, output = mpiexec(3, "make_a_group_without_a_rank", tmp_path)
    assert code != 0
    assert re.search("making .* has not returned from MPI in 3 s", output), output


def test_a_call_that_does_not_return_ends_the_process() -> None:
    call = (
        "import datetime, time; from belief_dist.mpi_backend.watch import WATCH\n"
        "with WATCH.limit(datetime.timedelta(seconds=60), 'first'): pass\n"
        "with WATCH.limit(datetime.timedelta(seconds=0.1), 'second'): time.sleep(60)"
    )
    done = run_job([sys.executable, "-c", call], Path.cwd(), os.environ, seconds=50)
    assert done.returncode == 1
    assert "belief_dist: second has not returned from MPI in 0.1 s" in done.stdout

"""The mpi4py backend in real MPI jobs of 2 to 4 processes, alone and beside gloo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mpi4py")
MPIEXEC = Path(sys.executable).parent / "mpiexec"
if not MPIEXEC.exists():
    pytest.skip("needs pip install mpich", allow_module_level=True)

JOB = Path(__file__).parent / "mpi_job.py"


def mpiexec(ranks: int, *arguments: str) -> tuple[int, str]:
    command = [str(MPIEXEC), "-n", str(ranks), sys.executable, str(JOB), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "ranks, default", [(2, "mpi4py"), (3, "mpi4py"), (4, "mpi4py"), (3, "gloo")]
)
def test_every_operation_and_training(ranks: int, default: str, tmp_path: Path) -> None:
    code, output = mpiexec(ranks, default, str(tmp_path / "store"))
    assert code == 0, output
    assert output.count("has passed") == ranks


def test_a_stopped_rank_is_an_error_within_the_timeout(tmp_path: Path) -> None:
    code, output = mpiexec(3, "SIGSTOP", str(tmp_path / "store"))
    assert code != 0
    assert output.count("has seen it") == 2, output


def test_a_killed_rank_ends_the_job(tmp_path: Path) -> None:
    code, output = mpiexec(3, "SIGKILL", str(tmp_path / "store"))
    assert code != 0 and "Killed (signal 9)" in output

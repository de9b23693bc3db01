"""Which lane a test runs in, on which worker, and when.

Its folder marks the subject, what it calls marks `processes`. A worker runs a file at a time, and
one of them all that mostly waits, so that it leaves its core to the others. Files that take minutes
come first: the last one to begin is what the other workers wait for.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

from tests.harness.paths import ROOT

SUBJECTS = {
    "cluster": ("cluster", "processes"),
    "deepspeed": ("deepspeed",),
    "gpu": ("gpu",),
    "launch": ("launch",),
    "mpi_backend": ("mpi",),
}
# A function that names one of these starts processes.
STARTERS = {"multiprocessing", "run_job", "run_ranks", "subprocess"}
# Where functions are followed. The package may start a compiler, which makes no test slow.
FOLLOWED = (ROOT / "tests", ROOT / "benchmarks")

# Of several hosts, launchers and timeouts: of nine minutes, three were computed in.
WAITING = (
    "cluster/test_failures.py",
    "cluster/test_slurm.py",
    "cluster/test_launchers.py",
    "cluster/test_elastic.py",
    "checkpoint/test_standby.py",
    "launch/test_launch.py",
)
# Of all else that takes more than a minute, the longest first.
LONG = (
    "launch/test_images.py",
    "examples/test_train_gpt.py",
    "sharding/test_device_path.py",
    "sharding/test_symmetric_memory.py",
    "kernels/test_triton.py",
    "kernels/test_triton_versions.py",
    "sharding/test_sharded.py",
    "examples/test_clients.py",
    "examples/test_evidence.py",
    "benchmarks/test_benchmarks.py",
    "benchmarks/test_gpu_report.py",
    "mpi_backend/test_mpi.py",
    "kernels/test_build.py",
    "sharding/test_micro_batches.py",
    "sharding/test_spike_guard.py",
    "sharding/test_process_groups.py",
    "sharding/test_averages.py",
    "distributed/test_distributed.py",
    "deepspeed/test_stage0.py",
    "deepspeed/test_zero_stages.py",
    "deepspeed/test_zero_checkpoints.py",
)


def order(item: pytest.Item) -> int:
    """Return by what tests are sorted; those of one file stay as they are."""
    path, files = _path(item), (*WAITING, *LONG)
    return files.index(path) if path in files else len(files)


def worker(nodeid: str) -> str:
    """Return a name that tests share which one worker runs, one after the other."""
    path = nodeid.partition("::")[0].removeprefix("tests/")
    return "waiting" if path in WAITING else path


def _path(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT / "tests").as_posix()


def mark(item: pytest.Function) -> None:
    """Add the markers of a test's folder, and `processes` where it starts any."""
    folder = item.path.relative_to(ROOT / "tests").parts[0]
    for name in SUBJECTS.get(folder, ()):
        item.add_marker(name)
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    functions = [item.function, *(definition.func for some in fixtures for definition in some)]
    seen: set[CodeType] = set()
    if any(starts_processes(function, seen) for function in functions):
        item.add_marker("processes")


def starts_processes(function: Any, seen: set[CodeType]) -> bool:
    """Say whether a function or class, or one that it names, starts processes."""
    if isinstance(function, type):
        methods = [each for each in vars(function).values() if isinstance(each, FunctionType)]
        return any(starts_processes(each, seen) for each in methods)
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType) or function.__code__ in seen:
        return False
    seen.add(function.__code__)
    file = Path(function.__code__.co_filename)
    if not any(file.is_relative_to(folder) for folder in FOLLOWED):
        return False
    names = set(names_of(function.__code__))
    if names & STARTERS:
        return True
    known = function.__globals__
    return any(starts_processes(known[name], seen) for name in names if name in known)


def names_of(code: CodeType) -> Iterator[str]:
    """Give the names that a function uses, and the functions within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_of(constant)

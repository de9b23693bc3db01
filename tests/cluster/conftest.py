"""One lab of four nodes for all tests of this folder, and what a job on it needs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import local
from lab import Lab, why_not


@pytest.fixture(scope="session")
def shared_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    # Workers of pytest-xdist run files side by side: each has its own lab, and none waits.
    name = f"belief-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"
    with Lab(4, tmp_path_factory.mktemp("lab"), name) as made:
        yield made


@pytest.fixture
def lab(shared_lab: Lab) -> Iterator[Lab]:
    """Give the lab; a test that leaves processes of its jobs behind fails."""
    yield shared_lab
    deadline = time.monotonic() + 15
    while (left := shared_lab.pids()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, 9)
    assert not left, "processes of the job are left on the nodes"


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the run of four ranks on this machine, that all others are compared with."""
    return local(4, tmp_path_factory.mktemp("local") / "run")

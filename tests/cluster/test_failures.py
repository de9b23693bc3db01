"""What goes wrong on several hosts: said within seconds, no hang, no process left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jobs import (
    ENDLESS,
    LAUNCH,
    OPEN_MPI,
    ROOT,
    SETTINGS,
    environment,
    hostfile,
    rank_on,
    wait_for_step,
)
from lab import Job, Lab

# Of all checks before a job starts: 1 to 4 seconds where nothing else runs.
SECONDS_TO_CHECK = 60
TORCHRUN = {"HEAD": "node0", "NNODES": "2", "NPROC": "1"}


def start(lab: Lab, script: str, folder: Path, *settings: str, **variables: str) -> Job:
    """Start a recipe on the first two nodes, one rank each, as its users do."""
    command = [LAUNCH / script, *SETTINGS, *settings, "--folder", folder / "run"]
    nodes = {0: command, 1: command}
    if script != "torchrun.sh":
        hosts = folder / "hostfile"
        if not hosts.exists():
            hostfile(folder, node0=1, node1=1)
        nodes = {0: [command[0], hosts, *command[1:]]}
    return lab.job(nodes, environment(**variables), folder, 200)


@pytest.fixture
def without_cable(lab: Lab) -> Iterator[None]:
    lab.nodes[1].plug("down")
    yield
    lab.nodes[1].plug("up")


@pytest.fixture
def without_key(lab: Lab) -> Iterator[None]:
    keys = lab.folder / "node1" / "ssh" / "authorized_keys"
    kept = keys.read_text()
    keys.write_text("")
    yield
    keys.write_text(kept)


def refused(lab: Lab, script: str, folder: Path, **variables: str) -> str:
    """Start a job that must not start; return what it says."""
    job = start(lab, script, folder, **variables)
    assert all(job.wait()), job.output
    assert job.seconds < SECONDS_TO_CHECK, f"took {job.seconds:.0f} s\n{job.output}"
    assert "Traceback" not in job.output
    assert not (folder / "run").exists()
    return job.output


@pytest.mark.parametrize("script", ["deepspeed.sh", "mpirun.sh"])
@pytest.mark.usefixtures("without_cable")
def test_a_host_that_cannot_be_reached_is_named(script: str, lab: Lab, tmp_path: Path) -> None:
    assert f"{script}: node1: ssh: connect to host node1 port 22" in refused(lab, script, tmp_path)


@pytest.mark.parametrize("script", ["deepspeed.sh", "mpirun.sh"])
@pytest.mark.usefixtures("without_key")
def test_a_host_without_the_key_is_named(script: str, lab: Lab, tmp_path: Path) -> None:
    said = refused(lab, script, tmp_path)
    assert f"{script}: node1: root@node1: Permission denied (publickey)" in said


@pytest.mark.parametrize("script", ["deepspeed.sh", "mpirun.sh"])
def test_a_name_that_nobody_has_is_named(script: str, lab: Lab, tmp_path: Path) -> None:
    hostfile(tmp_path, node0=1, nodeX=1)
    said = refused(lab, script, tmp_path)
    assert f"{script}: nodeX: ssh: Could not resolve hostname nodex" in said


def test_torchrun_names_a_head_that_nobody_has(lab: Lab, tmp_path: Path) -> None:
    said = refused(lab, "torchrun.sh", tmp_path, **TORCHRUN | {"HEAD": "nodeX"})
    for node in ("node0", "node1"):
        assert f"torchrun.sh: HEAD is 'nodeX', which {node} cannot resolve" in said


@pytest.mark.usefixtures("without_cable")
def test_torchrun_names_a_head_that_does_not_answer(lab: Lab, tmp_path: Path) -> None:
    """The head itself waits for the others as long as torchrun's join_timeout, here 300 s."""
    job = start(lab, "torchrun.sh", tmp_path, **TORCHRUN)
    try:
        while "HEAD, node0, does not answer node1: No route to host" not in job.output:
            assert job.elapsed < SECONDS_TO_CHECK, job.output
            time.sleep(0.05)
    finally:
        job.kill()


@pytest.mark.parametrize("script", ["deepspeed.sh", "mpirun.sh", "torchrun.sh"])
def test_a_port_that_is_taken_is_named(script: str, lab: Lab, tmp_path: Path) -> None:
    listen = "import socket, time; s = socket.create_server(('', 23456)); time.sleep(100)"
    other = lab.job({0: ["python", "-c", listen]}, environment(), tmp_path, 110)
    try:
        while not lab.nodes[0].run("ss", "-Htln", "sport = :23456").strip():
            time.sleep(0.05)
        job = start(
            *(lab, script, tmp_path),
            **TORCHRUN | {"MASTER_PORT": "23456", "PORT": "23456"},
        )
        while "is taken on node0" not in job.output:
            assert job.elapsed < SECONDS_TO_CHECK, job.output
            time.sleep(0.05)
        assert "PORT is 23456, which is taken on node0: choose another" in job.output
    finally:
        job.kill()
        other.kill()


def mount_changed(lab: Lab, folder: Path, original: Path, text: str) -> None:
    changed = folder / original.name
    shutil.copy(original, changed)
    with changed.open("a") as file:
        file.write(text)
    lab.nodes[1].mount(changed, original)


@pytest.mark.parametrize(
    ("script", "variables"), [("deepspeed.sh", {}), ("mpirun.sh", OPEN_MPI)], ids=["ds", "mpi"]
)
def test_hosts_with_other_code_do_not_train(
    script: str, variables: dict[str, str], lab: Lab, tmp_path: Path
) -> None:
    rule = ROOT / "belief_dist" / "rule.py"
    mount_changed(lab, tmp_path, rule, "# one host has this line\n")
    try:
        job = start(lab, script, tmp_path, **variables)
        assert all(job.wait())
    finally:
        lab.nodes[1].unmount(rule)
    assert "train_gpt.py: the source code of belief_dist differs: " in job.output
    assert "on rank 1 (node1). Start every rank with the same environment" in job.output
    assert not (tmp_path / "run").exists()


def test_a_clock_that_is_wrong_is_named_and_the_job_trains(lab: Lab, tmp_path: Path) -> None:
    """A host's clock cannot differ from its neighbour's on one machine: Python's is changed."""
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "sitecustomize.py").write_text(
        "import socket, time\n"
        "if socket.gethostname() == 'node1':\n"
        "    right = time.time\n"
        "    time.time = lambda: right() - 100\n"
    )
    path = f"{tmp_path / 'late'}:{ROOT}"
    job = start(lab, "torchrun.sh", tmp_path, **TORCHRUN | {"PYTHONPATH": path})
    assert not any(job.wait()), job.output
    skew = re.search(r"the clock of node1 \(rank 1\) is (\d+) s behind that of rank 0", job.output)
    assert skew and 95 <= int(skew[1]) <= 105, job.output


def test_hosts_with_another_torch_do_not_train(lab: Lab, tmp_path: Path) -> None:
    version = Path(torch.__file__).with_name("version.py")
    mount_changed(lab, tmp_path, version, "\n__version__ = '2.12.1+cpu'\n")
    try:
        job = start(lab, "torchrun.sh", tmp_path, **TORCHRUN)
        assert all(job.wait())
    finally:
        lab.nodes[1].unmount(version)
    assert (
        f"the version of torch differs: {torch.__version__} on rank 0 (node0), 2.12.1+cpu on rank 1"
    ) in job.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("script", "variables"),
    [("deepspeed.sh", {}), ("mpirun.sh", OPEN_MPI), ("mpirun.sh", {}), ("torchrun.sh", TORCHRUN)],
    ids=["deepspeed", "openmpi", "mpich", "torchrun"],
)
def test_a_killed_rank_ends_the_job(
    script: str, variables: dict[str, str], lab: Lab, tmp_path: Path
) -> None:
    job = start(lab, script, tmp_path, *ENDLESS, **variables)
    wait_for_step(tmp_path / "run", 3, 120)
    killed = job.elapsed
    os.kill(rank_on(lab.nodes[1]), signal.SIGKILL)
    assert all(job.wait()), job.output
    # At most 3 s on a quiet machine; without a word from the launcher it were the timeout, 60 s.
    assert job.seconds - killed < 20, job.output


@pytest.mark.parametrize(
    ("script", "variables", "grace"),
    # Seconds that the launcher, or the recipe, gives the stopped rank: torchrun its SIGTERM.
    [("deepspeed.sh", {}, 10), ("mpirun.sh", {}, 0), ("torchrun.sh", TORCHRUN, 30)],
    ids=["deepspeed", "mpich", "torchrun"],
)
def test_a_stopped_rank_ends_the_job_at_the_timeout(
    script: str, variables: dict[str, str], grace: int, lab: Lab, tmp_path: Path
) -> None:
    job = start(lab, script, tmp_path, *ENDLESS, "--timeout", "5", **variables)
    wait_for_step(tmp_path / "run", 3, 120)
    stopped = job.elapsed
    os.kill(rank_on(lab.nodes[1]), signal.SIGSTOP)
    assert all(job.wait()), job.output
    # The timeout, the grace, and time for a loaded machine.
    assert 4 < job.seconds - stopped < 5 + grace + 15, job.output
